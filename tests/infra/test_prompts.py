"""What `rewatch prompt` asks of several servers, of which some are away: scripted LLMs, no commands."""

from unittest.mock import AsyncMock

import pytest

from infra.config import Settings, load
from infra.prompts import canary, check, shown, try_out
from processors.analyze.fakes import FakeLlm
from processors.analyze.judge import CANARY
from processors.analyze.port import AttemptError
from schemas import prompts
from streams.errors import UnavailableError
from tests.processors.analyze_samples import answer

DEFAULT = prompts.default()
AWAY = UnavailableError("llm", "connection refused")


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load()


def server(name: str, **options: float) -> FakeLlm:
    async def says(_: object) -> str:
        return answer()

    return FakeLlm(says, name=name, **options)  # type: ignore[arg-type]


def away(name: str) -> FakeLlm:
    found = server(name)
    found.server = AsyncMock(side_effect=AWAY)  # type: ignore[method-assign]
    found.count_tokens = AsyncMock(side_effect=AWAY)  # type: ignore[method-assign]
    return found


async def test_recorded_windows_are_judged_by_the_servers_that_are_there_whichever_is_named_first(
    settings: Settings,
) -> None:
    [tried] = await try_out(settings, [away("a"), server("b")], DEFAULT, [canary()], lambda: None)
    assert tried.event is not None
    assert tried.event.conditions["endpoint"] == "b"


async def test_with_all_servers_away_trying_says_so(settings: Settings) -> None:
    with pytest.raises(UnavailableError, match="connection refused"):
        await try_out(settings, [away("a")], DEFAULT, [canary()], lambda: None)


async def test_with_all_servers_away_a_version_is_shown_and_checked_by_its_bytes(settings: Settings) -> None:
    found = await shown(settings, [away("a"), away("b")], CANARY, DEFAULT)
    assert not found.counted
    await check(settings, [away("a")], DEFAULT)


@pytest.mark.parametrize("error", [AWAY, AttemptError("error", "HTTP 500")])
async def test_tokens_are_counted_by_the_first_server_that_does(error: Exception, settings: Settings) -> None:
    first = server("a")
    first.count_tokens = AsyncMock(side_effect=error)  # type: ignore[method-assign]
    found = await shown(settings, [first, server("b", tokens_per_byte=0.25)], CANARY, DEFAULT)
    assert found.counted
