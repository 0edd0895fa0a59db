"""`rewatch prompt` on a topic in memory and a scripted LLM: versions made, compared, tried, put in force and back."""

import json
import stat
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from infra import prompts as prompts_of_people
from infra.cli import complete
from infra.cli import prompts as commands
from infra.config import Settings
from infra.recorded import Recorded
from processors.analyze.fakes import FakeLlm
from processors.replay.plan import Change, Plan
from schemas import prompts
from schemas.records import Replay
from streams.prompts import Prompts
from tests.infra.cli_kit import answer, invoke
from tests.infra.prompt_kit import changed, in_memory, pointer
from tests.processors.analyze_samples import answer as said
from tests.processors.analyze_samples import context, section

DEFAULT = prompts.default()
STRICT = prompts.deliveries_strict_nights()


class Site:
    """What the commands find: a topic, the LLM, and the windows in ClickHouse."""

    def __init__(self) -> None:
        self.known, self.table = in_memory([DEFAULT.to_record(1, "first"), pointer(DEFAULT.digest, comment="first")])
        self.llm = FakeLlm(self._say, context_size=2048, slots=2)
        self.windows: list[Recorded] = []
        self.replays: dict[str, Replay] = {}
        self.says: Callable[[], str] = said

    async def _say(self, _: object) -> str:
        return self.says()

    def active(self, camera: str = "door") -> str:
        return self.known.of(camera).digest


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Site:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # texts that `edit` keeps
    found = Site()

    async def load(_: Settings) -> Prompts:
        return found.known

    async def load_replays(_: Settings) -> dict[str, Replay]:
        return found.replays

    async def windows(_: Settings, *, camera: str | None, batch: str = "", limit: int) -> list[Recorded]:
        fits = [w for w in found.windows if camera in {None, w.context.camera_id}]
        return [w for w in fits if w.context.batch_id.startswith(batch)][:limit]

    async def check_camera(_: Settings, camera: str) -> None: ...

    @asynccontextmanager
    async def servers(_: Settings) -> AsyncIterator[list[FakeLlm]]:
        yield [found.llm]

    monkeypatch.setattr(commands, "load_prompts", load)
    monkeypatch.setattr(commands, "load_replays", load_replays)
    monkeypatch.setattr(commands, "_windows", windows)
    monkeypatch.setattr(commands, "check_camera", check_camera)
    monkeypatch.setattr(prompts_of_people, "servers", servers)
    return found


def editor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """$EDITOR is this shell script; its arguments are the files."""
    path = tmp_path / "editor.sh"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", str(path))


def test_ls_tells_what_is_in_force_for_whom_since_when_and_why(site: Site) -> None:
    invoke("prompt", "promote", "deliveries-strict-nights", "--camera", "yard", "--comment", "foxes")
    listed = {row["name"]: row for row in answer("prompt", "ls")}
    assert [row["scope"] for row in listed["default"]["active"]] == ["default"]
    [yard] = listed["deliveries-strict-nights"]["active"]
    assert (yard["scope"], yard["comment"]) == ("yard", "foxes")
    assert yard["since"] > 1_793_613_600_000
    shown = invoke("prompt", "ls").stdout
    assert "all cameras" in shown
    assert "camera yard" in shown
    assert "foxes" in shown


def test_ls_lists_what_comes_with_the_product_without_writing_it(site: Site) -> None:
    before = len(site.table.records)
    listed = {row["name"]: row["on_log"] for row in answer("prompt", "ls")}
    assert listed == {"default": True, "deliveries-strict-nights": False}
    assert len(site.table.records) == before


def test_history_shows_every_move_newest_first(site: Site) -> None:
    for name in ("deliveries-strict-nights", "default"):
        invoke("prompt", "promote", name)
    moves = answer("prompt", "ls", "--history")
    assert [move["digest"] for move in moves] == [DEFAULT.digest, STRICT.digest, DEFAULT.digest]
    assert "deliveries-strict-nights" in invoke("prompt", "ls", "--history").stdout


@pytest.mark.parametrize("which", ["default", DEFAULT.digest, DEFAULT.digest[:6], "active", "active/yard"])
def test_a_version_goes_by_its_name_its_digest_or_by_being_in_force(which: str, site: Site) -> None:
    assert answer("prompt", "show", which)["digest"] == DEFAULT.digest


def test_a_version_that_is_not_there_names_what_is_near(site: Site) -> None:
    result = invoke("prompt", "show", "delivery-strict-night")
    assert result.exit_code == 1
    assert "deliveries-strict-nights" in result.stderr


def test_show_prints_every_part(site: Site) -> None:
    shown = invoke("prompt", "show", "default").stdout
    assert all(file in shown for file in prompts.FILES)
    assert answer("prompt", "show", "default")["files"] == DEFAULT.to_files()


def test_show_rendered_is_the_chat_with_its_tokens(site: Site) -> None:
    chat = answer("prompt", "show", "default", "--rendered")
    assert [message["role"] for message in chat["messages"]] == ["system", "user"]
    assert chat["messages"][1]["content"].startswith("camera: front-door\ntime: 11:00 day")
    assert chat["tokens_at_most"] == 2048 - 400
    assert chat["dropped_sections"] == []
    assert f"{chat['tokens']} tokens of 1648" in invoke("prompt", "show", "default", "--rendered").stdout


def test_show_of_a_window_says_what_was_dropped_to_fit(site: Site) -> None:
    found = context(camera="yard", sections=(section("memory", "m" * 2000), section("zones", "The porch.")))
    site.windows = [Recorded(found, "e", 1, "low", "s")]
    for option in (("--camera", "yard"), ("--batch", found.batch_id[:12])):
        chat = answer("prompt", "show", "default", *option)
        assert chat["dropped_sections"] == ["memory"]
        assert chat["messages"][1]["content"].endswith('zones: "The porch."')
    assert "dropped to fit: memory" in invoke("prompt", "show", "default", "--camera", "yard").stdout


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (("--camera", "a", "--batch", "b"), 2, "name one of them"),
        (("--camera", "nowhere"), 1, "no window of it was recorded yet"),
        (("--batch", "nowhere"), 1, "there is no such window"),
    ],
)
def test_show_of_no_window_says_why(options: tuple[str, ...], code: int, told: str, site: Site) -> None:
    result = invoke("prompt", "show", "default", *options)
    assert (result.exit_code, told in result.stderr) == (code, True)


def test_new_begins_with_the_files_of_a_version_and_makes_one_of_what_they_become(site: Site, tmp_path: Path) -> None:
    assert invoke("prompt", "new", "shop").exit_code == 2
    assert "--from default" in invoke("prompt", "new", "shop").stderr
    assert invoke("prompt", "new", "shop", "--from", "deliveries-strict-nights").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "shop").iterdir()) == sorted(prompts.FILES)
    (tmp_path / "shop" / "system.txt").write_text("You watch a shop.\n")
    made = answer("prompt", "new", "shop", "--comment", "a shop")
    assert (made["name"], made["added"]) == ("shop", True)
    assert site.known.find("shop").templates.system == "You watch a shop."
    assert site.known.versions()[made["digest"]].comment == "a shop"
    assert site.active() == DEFAULT.digest
    assert answer("prompt", "new", "shop")["added"] is False


def test_new_takes_what_the_folder_does_not_hold_from_another_version(site: Site, tmp_path: Path) -> None:
    (tmp_path / "warm").mkdir()
    (tmp_path / "warm" / "parameters.json").write_text('{"temperature": 0.5}')
    answer("prompt", "new", "warm", "--from", "deliveries-strict-nights")
    made = site.known.find("warm")
    assert made.templates.system == STRICT.templates.system
    assert made.sampling == {"temperature": 0.5}


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("system.text.txt", b"x", "no file of a prompt; there are system.txt"),
        ("user.txt", b"{{ broken", "TemplateSyntaxError"),
        ("user.txt", b"{% for i in range(9) %}{% endfor %}", "is not taken in prompts"),
        ("output_schema.json", b"{", "output_schema.json: Expecting"),
        ("output_schema.json", b'{"type": "object"}', "must require"),
        ("parameters.json", b"[]", "parameters are not a JSON object"),
        ("sections.json", b'{"zones": "high"}', "Expected `int`"),
        ("user.txt", b"\xff", "not UTF-8"),
    ],
)
def test_new_refuses_what_is_no_prompt_with_the_reason(
    file: str, text: bytes, told: str, site: Site, tmp_path: Path
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / file).write_bytes(text)
    before = len(site.table.records)
    result = invoke("prompt", "new", "bad")
    assert result.exit_code == 2
    assert told in result.stderr
    assert len(site.table.records) == before


def test_edit_makes_a_new_version_and_leaves_nothing_behind(site: Site, monkeypatch, tmp_path: Path) -> None:
    editor(monkeypatch, tmp_path, f'dirname "$1" > {tmp_path}/where; echo Be kind. >> "$1"')
    made = answer("prompt", "edit", "active", "--part", "system", "--name", "kind")
    assert site.known.find("kind").templates.system.endswith("\nBe kind.")
    assert made["digest"] != DEFAULT.digest
    assert site.active() == DEFAULT.digest
    assert not Path((tmp_path / "where").read_text().strip()).exists()


def test_edit_refuses_what_does_not_parse_and_keeps_the_text(site: Site, monkeypatch, tmp_path: Path) -> None:
    editor(monkeypatch, tmp_path, 'echo "{{ mine" >> "$2"')
    result = invoke("prompt", "edit", "default", "--name", "mine")
    assert result.exit_code == 2
    assert "TemplateSyntaxError" in result.stderr
    command = result.stderr.split("`")[1]
    folder = Path(command.split()[3])
    assert "{{ mine" in (folder / "user.txt").read_text()
    (folder / "user.txt").write_text("mended")
    assert answer(*command.split()[1:])["name"] == "mine"


@pytest.mark.parametrize(
    ("script", "told"), [("true", "nothing was changed"), ("exit 3", "exit code 3"), (None, "name an editor in EDITOR")]
)
def test_edit_without_a_change_or_an_editor_makes_nothing(
    script: str | None, told: str, site: Site, monkeypatch, tmp_path: Path
) -> None:
    editor(monkeypatch, tmp_path, script or "")
    if script is None:
        monkeypatch.setenv("EDITOR", str(tmp_path / "none"))
    result = invoke("prompt", "edit", "default")
    assert result.exit_code in {1, 2}
    assert told in result.stderr
    assert len(site.table.records) == 2


def test_diff_is_part_by_part_and_of_the_same_nothing(site: Site) -> None:
    shown = invoke("prompt", "diff", "default", "deliveries-strict-nights").stdout
    assert "+You judge the risk of what a security camera saw." in shown
    assert "Be stricter at night." in shown
    assert "user.txt" not in shown
    assert list(answer("prompt", "diff", "default", "deliveries-strict-nights")["parts"]) == ["system.txt"]
    assert "they say the same" in invoke("prompt", "diff", "default", "active").stdout


def test_test_judges_recorded_windows_beside_what_was_said_and_writes_nothing(site: Site) -> None:
    found = [context(camera=name) for name in ("yard", "door")]
    site.windows = [Recorded(window, f"{window.batch_id}:live", 10, "low", "A cat.") for window in found]
    tried = answer("prompt", "test", "deliveries-strict-nights")
    assert [(one["old"]["score"], one["new"]["score"], one["new"]["level"]) for one in tried] == [(10, 71, "high")] * 2
    assert site.llm.asked[0][0].content == STRICT.templates.system
    assert len(answer("prompt", "test", "default", "--camera", "yard")) == 1
    shown = invoke("prompt", "test", "default", "--windows", "1").stdout
    assert "1 of 1 levels changed; scores moved by +61.0 on average" in shown
    assert len(site.table.records) == 2


def test_test_without_history_judges_the_stored_window(site: Site) -> None:
    assert [one["batch_id"] for one in answer("prompt", "test", "default")] == ["canary"]
    assert "no window was recorded yet" in invoke("prompt", "test", "default").stdout


def test_test_says_which_windows_could_not_be_judged(site: Site) -> None:
    empty = context(zone="Atlantis/Capital")
    site.windows = [Recorded(empty, "", 0, "", ""), Recorded(context(), "", 0, "", "")]
    tried = answer("prompt", "test", "default", code=1)
    assert "Atlantis" in tried[0]["failure"]
    assert tried[1]["new"]["score"] == 71


def test_promote_puts_a_version_on_the_log_and_in_force_once(site: Site) -> None:
    assert answer("prompt", "promote", "deliveries-strict-nights", "--comment", "nights") == {
        "digest": STRICT.digest,
        "name": "deliveries-strict-nights",
        "scope": "default",
        "changed": True,
        "evidence": None,
    }
    assert site.active() == STRICT.digest
    records = len(site.table.records)
    assert answer("prompt", "promote", STRICT.digest[:8])["changed"] is False
    assert "already" in invoke("prompt", "promote", "deliveries-strict-nights").stdout
    assert len(site.table.records) == records == 4


def replayed(
    name: str, state: str = "done", kind: str = "change", *, at: int = 1, digest: str = STRICT.digest
) -> dict[str, Replay]:
    plan = Plan(kind=kind, change=Change(prompt=digest))
    made = Replay(replay_id=f"r-{name}", name=name, state=state, plan=plan.encode(), updated_at=at)
    return {made.replay_id: made}


def test_promote_names_the_newest_replay_or_shadow_that_judged_with_the_version_and_keeps_it(site: Site) -> None:
    site.replays = (
        replayed("older", at=1)
        | replayed("calmer", at=5)
        | replayed("half", "paused", at=9)
        | replayed("other", at=9, digest=DEFAULT.digest)
        | {"bad": Replay(replay_id="bad", name="bad", state="done", plan="{", updated_at=9)}
    )
    assert "on the strength of calmer (r-calmer)" in invoke("prompt", "promote", STRICT.name).stdout.replace("\n", " ")
    assert site.known.history("default")[-1].evidence == "r-calmer"
    assert "calmer" in invoke("prompt", "ls").stdout
    assert "calmer" in invoke("prompt", "ls", "--history").stdout
    assert "on the strength of calmer" in invoke("prompt", "show", STRICT.name).stdout
    [active] = answer("prompt", "show", STRICT.name)["active"]
    assert active["evidence"] == "r-calmer"
    assert answer("prompt", "rollback")["to"] == DEFAULT.digest
    assert site.known.history("default")[-1].evidence == ""


def test_a_shadow_is_evidence_also_while_it_runs_and_one_can_be_named(site: Site) -> None:
    site.replays = replayed("calmer", at=5) | replayed("watching", "running", "shadow", at=7)
    assert answer("prompt", "promote", STRICT.name)["evidence"] == {"replay_id": "r-watching", "name": "watching"}
    answer("prompt", "rollback")
    assert answer("prompt", "promote", STRICT.name, "--evidence", "r-calm")["evidence"]["name"] == "calmer"


def test_what_did_not_judge_with_the_version_is_no_evidence_and_without_any_it_warns_and_goes_on(site: Site) -> None:
    site.replays = replayed("other", digest=DEFAULT.digest)
    refused = invoke("prompt", "promote", STRICT.name, "--evidence", "other")
    assert refused.exit_code == 1
    assert "did not judge with" in refused.stderr
    assert invoke("prompt", "promote", STRICT.name, "--evidence", "nothing").exit_code == 1
    assert site.active() == DEFAULT.digest
    gone_on = invoke("prompt", "promote", STRICT.name)
    assert gone_on.exit_code == 0
    assert f"`rewatch replay run --prompt {STRICT.digest[:12]}` first" in gone_on.stderr
    assert site.active() == STRICT.digest


def test_a_cameras_own_version_wins_over_everyones(site: Site) -> None:
    answer("prompt", "promote", "deliveries-strict-nights", "--camera", "yard")
    assert (site.active("yard"), site.active("door")) == (STRICT.digest, DEFAULT.digest)


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ({"user": "{{ nowhere }}"}, "'nowhere' is undefined"),
        ({"user": "{% for s in sections %}{{ s.nowhere }}{% endfor %}"}, "nowhere"),
        ({"user": "{{ moves.label }}"}, "None"),
        ({"repair": "{{ what }}"}, "'what' is undefined"),
        ({"system": "Judge. " * 300}, "tokens without any section, and 1648 are left"),
        ({"parameters": '{"max_tokens": 2000}'}, "tokens without any section, and 48 are left"),
    ],
)
def test_promote_refuses_what_cannot_be_rendered_or_leaves_no_room(texts: dict, told: str, site: Site) -> None:
    part = {f"{name}.json" if name == "parameters" else f"{name}.txt": text for name, text in texts.items()}
    bad = prompts.PromptVersion.from_texts(DEFAULT.to_files() | part, "bad")
    site.table.put(bad.to_record(2))
    result = invoke("prompt", "promote", "bad")
    assert result.exit_code == 1
    assert told in result.stderr
    assert site.active() == DEFAULT.digest


def test_rollback_goes_back_by_one_and_says_what_it_did(site: Site) -> None:
    answer("prompt", "promote", "deliveries-strict-nights")
    said = invoke("prompt", "rollback")
    assert said.exit_code == 0
    assert f"default ({DEFAULT.digest[:12]}) judges all cameras again" in said.stdout
    assert f"instead of deliveries-strict-nights ({STRICT.digest[:12]})" in said.stdout
    assert site.active() == DEFAULT.digest
    assert answer("prompt", "rollback") == {"scope": "default", "from": DEFAULT.digest, "to": STRICT.digest}


def test_rollback_of_a_cameras_first_version_gives_it_back_to_everyones(site: Site) -> None:
    answer("prompt", "promote", "deliveries-strict-nights", "--camera", "yard")
    assert (
        "the version of all cameras judges camera yard again" in invoke("prompt", "rollback", "--camera", "yard").stdout
    )
    assert site.active("yard") == DEFAULT.digest
    assert [row["scope"] for row in answer("prompt", "ls")[0]["active"]] in (["default"], [])


def test_what_undoes_a_cameras_version_is_printed_with_its_camera(site: Site) -> None:
    name = "deliveries-strict-nights"
    assert "`rewatch prompt rollback --camera yard` undoes it" in invoke(
        "prompt", "promote", name, "--camera", "yard"
    ).stdout.replace("\n", " ")
    assert "`rewatch prompt rollback` undoes it" in invoke("prompt", "promote", name).stdout.replace("\n", " ")
    site.table.put(pointer("0" * 32, "yard"))
    assert "its windows wait; `rewatch prompt rollback --camera yard`" in invoke("prompt", "ls").stdout


@pytest.mark.parametrize("command", [("promote", "deliveries-strict-nights"), ("rollback",)])
def test_a_camera_named_default_does_not_move_everyones_version(command: tuple[str, ...], site: Site) -> None:
    before = list(site.table.records)
    result = invoke("prompt", *command, "--camera", "default")
    assert result.exit_code == 2
    assert "`default` is the pointer of every camera without one" in " ".join(result.stderr.split())
    assert site.table.records == before


def test_rollback_of_nothing_is_1(site: Site) -> None:
    for option in ((), ("--camera", "yard")):
        result = invoke("prompt", "rollback", *option)
        assert result.exit_code == 1
        assert "nothing to roll back" in result.stderr


def test_completion_knows_the_versions_that_come_with_the_product() -> None:
    assert tuple(prompts.shipped()) == complete.PROMPTS


def test_json_is_json_whatever_a_version_is_called(site: Site) -> None:
    site.table.put(changed("\x1b[2J", user="x").to_record(3, "\x1b[2J"))
    assert "\x1b" not in invoke("prompt", "ls").stdout
    assert json.loads(invoke("prompt", "ls", "--json").stdout)
