"""What a replay starts, and refuses to start; and how replays are found by name."""

from pathlib import Path

import pytest

from infra import replaying, replays
from infra.config import Settings, load
from infra.installation import Installation
from infra.replaying import Place
from infra.replays import UnknownReplayError, choose
from processors.analyze.port import Server
from processors.replay.plan import Llm, PlanError
from streams.serving import SettingsError


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


async def test_another_llm_is_an_address_or_a_file_that_is_there(settings: Settings, tmp_path: Path) -> None:
    place = Place(settings, None, {})
    assert await replaying.another_llm(place, "http://gpu:8000/v1/") == Llm(url="http://gpu:8000")
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


def test_with_an_llm_elsewhere_the_rest_of_a_plan_stays() -> None:
    from processors.replay.plan import Change, Plan

    made = replays.Made("r1", "n", Plan(kind="change", change=Change(prompt="p", llm=Llm(url="a", model_path="m"))))
    moved = replays.with_llm(made, Llm(url="b", model_path="m"))
    assert moved.plan.change == Change(prompt="p", llm=Llm(url="b", model_path="m"))
