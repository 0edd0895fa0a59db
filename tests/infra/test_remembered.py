"""Prompt versions that only ClickHouse has: which of them a replay puts on the log again, and as what."""

import json
import secrets

import msgspec
import pytest

from infra import replays
from infra.config import Settings, load
from processors.analyze.port import Server
from processors.replay.plan import Plan, Scope
from schemas import prompts
from schemas.prompts import PromptVersion
from tests.processors.recorded_kit import judged, on_log, put, windows

pytestmark = pytest.mark.real

LONG_AGO = 1_700_000_000_000


@pytest.fixture
def mine(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The running servers, with a database of this test's own."""
    monkeypatch.setenv("REWATCH_CLICKHOUSE__DATABASE", f"remembered_{secrets.token_hex(4)}")
    return load()


def version(name: str) -> PromptVersion:
    """A version like no other."""
    default = prompts.default()
    templates = json.loads(default.template)
    templates["user"] += f"{{# {secrets.token_hex(4)} #}}"
    return PromptVersion(
        name=name,
        template=json.dumps(templates),
        output_schema=default.output_schema,
        parameters=default.parameters,
    )


async def test_what_the_windows_need_is_put_back_as_old_as_it_was_and_nothing_else(mine: Settings) -> None:
    name = f"calmer-{secrets.token_hex(3)}"
    old, new, other = version(name), version(name), version(f"{name}-other")
    contexts = windows(6)
    here, elsewhere = contexts[0].camera_id, contexts[1].camera_id
    prompt_of = {here: old.digest, elsewhere: other.digest}
    events = [
        msgspec.structs.replace(event, prompt_digest=prompt_of.get(event.camera_id, event.prompt_digest))
        for event in judged(contexts)
    ]
    await put(
        mine.clickhouse,
        on_log("prompts", [old.to_record(LONG_AGO, "the first"), other.to_record(LONG_AGO + 1)]),
        on_log("contexts", contexts),
        on_log("risk_events", events),
    )
    async with replays.office(mine) as office:
        await office.prompts.add(new, "the second")
        plan = await office.drawn(Plan(kind="baseline", scope=Scope(cameras=(here,))))
        judging = office.judging(plan, Server("", "", 0, 0, ""))
        await office.weigh(plan, judging)
        assert old.digest not in office.prompts.versions(), "a plan writes nothing"
        sorter = await office.sorter(plan, judging, judges=True)
        judge = [
            todo
            for page in [p async for p in office.windows(plan).pages(lambda _: False)]
            for todo in (await sorter.sort(page)).judge
        ]
        assert {prompt.digest for _, prompt in judge} == {old.digest}
    async with replays.office(mine) as later:
        known = later.prompts.versions()
        assert known[old.digest].created_at == LONG_AGO
        assert other.digest not in known, "no window of this replay was judged by it"
        assert later.prompts.find(name).digest == new.digest, "the newer one goes by the name, as before"
