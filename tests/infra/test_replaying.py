"""What a replay starts, and refuses to start; and how replays are found by name."""

import asyncio
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from infra import replaying, replays
from infra.cli import replay_show
from infra.config import Settings, load
from infra.installation import Installation
from infra.local.process import BEHIND, ProcessSpec
from infra.local.stack import LocalStack
from infra.local.supervisor import Supervisor
from infra.replaying import Place
from infra.replays import UnknownReplayError, choose
from processors.analyze.port import Server
from processors.replay.plan import Change, Llm, Plan, PlanError
from processors.store.queries import Queries
from schemas.records import Replay
from streams.serving import SettingsError
from tests.processors.planner_kit import letter, replay_event, verdict
from tests.processors.recorded_kit import on_log, put, windows


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load().model_copy(update={"data_dir": tmp_path / "data"})


def names(installation: Installation) -> set[str]:
    return {spec.name for spec in installation._specs()}


def test_only_the_named_processes_start_and_without_one_that_judges_no_llm(settings: Settings) -> None:
    everything = names(Installation(settings))
    assert {"ingest", "detect", "batch", "enrich", "analyze", "sink"} <= everything
    judging = Installation(settings, only=("sink", "replay"))
    assert names(judging) == {"sink"}, "processes of replay are the command's own"
    assert judging.stack.llm_url
    quiet = Installation(settings, only=("sink",))
    with pytest.raises(ValueError, match="without an LLM"):
        assert quiet.stack.llm_url


def test_workers_of_two_commands_share_no_name_and_have_the_commands_settings(settings: Settings) -> None:
    first, second = (Place(settings, None, {"REWATCH_LLM__SLOTS": "1"}) for _ in range(2))
    specs = [place._worker(index) for place in (first, second) for index in range(2)]
    assert len({spec.name for spec in specs}) == 4
    members = [spec.argv[spec.argv.index("--member") + 1] for spec in specs]
    assert len(set(members)) == 4
    assert all(spec.env["REWATCH_LLM__SLOTS"] == "1" and "replay" in spec.argv for spec in specs)


async def test_over_nothing_recorded_no_server_starts(settings: Settings) -> None:
    with pytest.raises(SettingsError, match=r"nothing was recorded in .* yet: `rewatch demo`"):
        async with replaying.store(settings):
            pass
    with pytest.raises(SettingsError, match="nothing was recorded"):
        async with replaying.place(settings, None, judging=True):
            pass
    assert not settings.data_dir.exists()


async def test_strict_refuses_an_embedded_server_that_is_set_otherwise(settings: Settings) -> None:
    (settings.data_dir / "clickhouse").mkdir(parents=True)
    llm = type(settings.llm).model_validate(dict(settings.llm) | {"slots": 2})
    settings = settings.model_copy(update={"llm": llm})
    with pytest.raises(SettingsError, match=r"one slot and no prompt cache.*llm.slots: 1 and llm.prompt_cache: false"):
        async with replaying.place(settings, None, judging=True, strict=True):
            pass


@pytest.mark.parametrize(("slots", "cache", "refused"), [(1, False, False), (2, False, True), (1, True, True)])
async def test_strict_takes_a_server_that_runs_only_as_it_must_be(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, slots: int, cache: bool, refused: bool
) -> None:
    async def told(*_: object) -> Server:
        return Server("analyst", "c" * 64, 4096, slots, "b1")

    monkeypatch.setattr(replaying, "server", told)
    monkeypatch.setattr(replaying, "running", lambda _: {"analyze": {}, "llama": {}})
    settings = settings.model_copy(update={"llm": settings.llm.model_copy(update={"prompt_cache": cache})})
    if refused:
        with pytest.raises(SettingsError, match=f"has {slots} slots, llm.prompt_cache is {str(cache).lower()}"):
            async with replaying.place(settings, None, judging=True, strict=True):
                pass
    else:
        async with replaying.place(settings, None, judging=True, strict=True) as place:
            assert place.workers == 0, "analyze judges units, too"


async def test_beside_live_stages_another_model_stands_behind_them(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs: list[ProcessSpec] = []

    async def started(_: object, *given: ProcessSpec) -> None:
        specs.extend(given)

    monkeypatch.setattr(Place, "_start", started)
    beside, alone = Place(settings, None, {}), Place(settings, None, {})
    alone.use(Supervisor(tmp_path))
    for place in (beside, alone):
        await place.start_llm(tmp_path / "m.gguf")
        specs.append(place._worker(0))
    assert [spec.nice for spec in specs] == [BEHIND, BEHIND, 0, 0]


@pytest.mark.parametrize("told", [{"model_path": "/models/other.gguf"}, {}, []])
async def test_who_listens_on_the_old_port_with_another_model_is_somebody_else(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, told: object
) -> None:
    asked: list[tuple[Path, int | None]] = []

    async def start(_: Place, model: Path, port: int | None = None) -> str:
        asked.append((model, port))
        return "http://127.0.0.1:2"

    monkeypatch.setattr(Place, "start_llm", start)
    async with served(told) as url:
        llm = Llm(url=url, model_path="/models/mine.gguf")
        assert await replaying.again(Place(settings, None, {}), llm) == replaying.replace_llm(llm, "http://127.0.0.1:2")
    assert asked == [(Path("/models/mine.gguf"), None)], "not on its port"
    async with served({"model_path": "/models/mine.gguf"}) as url:
        llm = Llm(url=url, model_path="/models/mine.gguf")
        assert await replaying.again(Place(settings, None, {}), llm) == llm


@asynccontextmanager
async def served(props: object) -> AsyncIterator[str]:
    """A server that tells this of itself; its address."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            body = json.dumps(props).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_another_llm_is_an_address_or_a_file_that_is_there(settings: Settings, tmp_path: Path) -> None:
    place = Place(settings, None, {})
    assert await replaying.another_llm(place, "http://gpu:8000/v1/") == Llm(url="http://gpu:8000")
    for wrong in ("http://", "http:///v1", "http://gpu:many", "http://gpu:8000,http://"):
        with pytest.raises(PlanError, match="no address of a server"):
            await replaying.another_llm(place, wrong)
    for wrong in ("no-such.gguf", str(tmp_path)):
        with pytest.raises(PlanError, match="neither an address, nor a GGUF file, nor a name"):
            await replaying.another_llm(place, wrong)
    away = Llm(url="http://gpu:8000")
    assert await replaying.again(place, away) == away, "another's server is not started"


def test_another_detector_is_a_folder_that_is_there(settings: Settings, tmp_path: Path) -> None:
    assert Path(replaying.another_detector(settings, "demo"), "config.json").is_file()
    assert replaying.another_detector(settings, str(tmp_path)) == str(tmp_path)
    with pytest.raises(PlanError, match="neither a model's folder, nor a name"):
        replaying.another_detector(settings, "no-such")


@pytest.mark.real
async def test_another_model_is_served_beside_and_again_on_its_port_after_a_kill(
    settings: Settings, tmp_path: Path
) -> None:
    from infra.models.library import DEMO

    model = tmp_path / "other.gguf"
    model.write_bytes((DEMO / "analyst.gguf").read_bytes())
    place = Place(settings, None, {})
    try:
        llm = await replaying.another_llm(place, str(model))
        told = await replaying.server(settings, llm)
        assert (told.model, len(told.model_digest)) == ("other", 64)
        assert await replaying.again(place, llm) == llm, "it is there"
    finally:
        await place.stop()
    later = Place(settings, None, {})
    try:
        assert await replaying.again(later, llm) == llm
        assert (await replaying.server(settings, llm)).model == "other"
    finally:
        await later.stop()


KNOWN = [("r1111aaaa", "calmer", 1), ("r1111bbbb", "baseline", 2), ("r2222cccc", "calmer", 3)]


@pytest.mark.parametrize(
    ("text", "found"),
    [("calmer", "r2222cccc"), ("baseline", "r1111bbbb"), ("r1111aaaa", "r1111aaaa"), ("r2222", "r2222cccc")],
)
def test_a_replay_goes_by_its_name_its_id_or_the_beginning_of_one(text: str, found: str) -> None:
    assert choose(text, KNOWN) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("calmr", "there is no replay 'calmr'; there are, among others: calmer"),
        ("r1111", "the beginning of several replays; say more of it: r1111bbbb, r1111aaaa"),
        ("r2", "there is no replay 'r2'"),
    ],
)
def test_what_goes_by_no_name_is_told_what_is_near(text: str, said: str) -> None:
    with pytest.raises(UnknownReplayError, match=said):
        choose(text, KNOWN)


def test_a_planner_that_ended_on_this_machine_is_known_and_of_others_nobody_says_so() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait(30)
    here = socket.gethostname()
    assert replays.has_ended(f"process {child.pid} on {here} (abc123)")
    assert not replays.has_ended(f"process {os.getpid()} on {here} (abc123)")
    assert not replays.has_ended(f"process {child.pid} on elsewhere (abc123)")
    assert not replays.has_ended("paused by `rewatch replay pause`")


async def test_a_replay_that_runs_without_its_planner_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait(30)
    plan = Plan(kind="change").encode()
    counts = {"judged": 1, "reused": 0, "failed": 0, "tokens": 9, "llm_ms": 9.0}
    for pid, gone in ((child.pid, True), (os.getpid(), False)):
        running = {"state": "running", "detail": f"process {pid} on {socket.gethostname()} (abc123)"}
        [row] = await replays.listed(Rows(plan, **running, **counts))
        assert row["gone"] == gone
        replay_show.print_rows([row], "UTC")
        replay_show.print_row(row, [], "UTC")
        assert capsys.readouterr().out.count("but its planner ended: resume it") == (2 if gone else 0)


class Rows:
    """ClickHouse with these replays."""

    def __init__(self, *plans: str, **columns: object) -> None:
        self._plans = plans
        self._columns = columns

    async def rows(self, _: str, **__: object) -> list[dict[str, object]]:
        row = {"state": "done", "detail": "", "began": 1} | self._columns
        return [row | {"replay_id": f"r{n}000", "name": f"n{n}", "plan": plan} for n, plan in enumerate(self._plans)]


async def test_a_plan_that_cannot_be_read_stands_in_nobodys_way_but_says_so_of_itself() -> None:
    newer = Plan(kind="change").encode().replace('"change"', '"of-tomorrow"', 1)
    shadow = Plan(kind="shadow").encode()
    store = Rows(newer, Plan(kind="baseline").encode(), shadow)
    assert [row["name"] for row in await replays.listed(store)] == ["n1"]
    assert (await replays.one(store, "n1"))["plan"].kind == "baseline"
    with pytest.raises(PlanError, match="the plan of n0 cannot be read: a newer version wrote it"):
        await replays.one(store, "n0")
    with pytest.raises(UnknownReplayError):
        await replays.one(store, "n2")

    class Table:
        def all(self) -> dict[str, Replay]:
            return {
                f"r{n}000": Replay(replay_id=f"r{n}000", name=f"n{n}", state="done", plan=plan, updated_at=n)
                for n, plan in enumerate((newer, Plan(kind="baseline").encode(), shadow))
            }

    office = replays.Office(load(), None, None, prompts=None, cameras=None, table=Table(), metas={})
    assert office.find("n1").plan.kind == "baseline"
    with pytest.raises(PlanError, match="the plan of n0 cannot be read"):
        office.find("n0")


GONE = "http://127.0.0.1:1, the LLM of replay calmer, is away: connection refused"


@pytest.mark.real
async def test_a_replay_that_lacked_its_llm_is_known_by_its_dead_letters_until_it_has_its_results(
    stack: LocalStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWATCH_CLICKHOUSE__URL", stack.clickhouse_url)
    monkeypatch.setenv("REWATCH_CLICKHOUSE__DATABASE", f"lacked_{secrets.token_hex(4)}")
    settings = load()
    [one, other] = windows(2)
    letters = [
        msgspec.structs.replace(letter(f"r1:{one.batch_id}", one.camera_id), message=GONE),
        letter(f"r2:{other.batch_id}", other.camera_id),
    ]
    await put(settings.clickhouse, on_log("dead_letters", letters))
    async with aclosing(Queries(settings.clickhouse)) as store:
        office = replays.Office(settings, None, store, prompts=None, cameras=None, table=None, metas={})
        assert await office.lacked_llm("r1")
        assert not await office.lacked_llm("r2"), "it failed by itself"
        await put(settings.clickhouse, on_log("replay_events", [replay_event(verdict(one, "r1"))]))
        assert not await office.lacked_llm("r1")


def test_with_an_llm_elsewhere_the_rest_of_a_plan_stays() -> None:
    made = replays.Made("r1", "n", Plan(kind="change", change=Change(prompt="p", llm=Llm(url="a", model_path="m"))))
    moved = replays.with_llm(made, Llm(url="b", model_path="m"))
    assert moved.plan.change == Change(prompt="p", llm=Llm(url="b", model_path="m"))
