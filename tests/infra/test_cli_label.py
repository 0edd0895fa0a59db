"""`rewatch label` on the real broker and the real ClickHouse engine: labels one by one, and sessions on a terminal."""

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from infra import topology
from infra.cli.labelling import Item, Keyboard, Session
from infra.config import Settings, load
from infra.local.stack import LocalStack
from processors.analyze.answers import risk_level
from processors.replay.labelling import Window
from processors.replay.sampling import Chosen
from schemas.records import Label, Record, ReplayEvent, RiskEvent
from streams.admin import ensure_topics
from streams.errors import UnavailableError
from streams.kafka import Kafka
from streams.labels import LabelLog
from tests import examples
from tests.conftest import PARTITIONS
from tests.infra.cli_kit import answer, invoke
from tests.infra.terminal import Terminal
from tests.infra.test_cli_complete import tab, url
from tests.processors import gateway_kit as kit
from tests.processors.gateway_kit import AT, window

__all__ = ["url"]

HOUR = 3_600_000


class House:
    """Two cameras with twenty events in a database of their own; on the log are their labels alone."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        tag = secrets.token_hex(3)
        self.front, self.gate = f"front-{tag}", f"gate-{tag}"
        # Three are near the threshold; the rarest are the critical one and the gate's high one.
        scores = (0, 5, 10, 15, 20, 25, 30, 10, 5, 95, 0, 5, 10, 15, 20, 55, 60, 65)
        self._windows = [self._window(self.front, n, score) for n, score in enumerate(scores)]
        self._windows += [self._window(self.gate, n, score) for n, score in enumerate((10, 80))]
        self.events: list[RiskEvent] = [made[-1] for made in self._windows]  # type: ignore[misc]
        self._stored = 0

    def _window(self, camera: str, n: int, score: int) -> list[Record]:
        *behind, event = window(camera, AT + n * HOUR)
        return [*behind, msgspec.structs.replace(event, risk_score=score, risk_level=risk_level(score))]

    async def build(self) -> None:
        """The third was flipped by a replay that is done, the fourth by a baseline; a third replay runs still."""
        await ensure_topics(Kafka(self.settings.kafka))
        done = msgspec.structs.replace(examples.replay, state="done", plan='{"kind": "change"}')
        await self.store(
            [
                *(kit.camera(name) for name in (self.front, self.gate)),
                *(record for made in self._windows for record in made),
                _flipped(self.events[2], "r1"),
                _flipped(self.events[3], "r0"),
                done,
                msgspec.structs.replace(done, replay_id="r0", name="the same again", plan='{"kind": "baseline"}'),
                msgspec.structs.replace(done, replay_id="r2", name="gentler", state="running"),
            ]
        )

    async def store(self, records: Sequence[Record]) -> None:
        """Into ClickHouse, as the sink does."""
        await kit.store(self.settings, records, start=self._stored)
        self._stored += len(records)

    def labels(self) -> list[Label]:
        """The labels of its cameras that are on the log, in the order in which they were given."""
        kafka = Kafka(self.settings.kafka)
        found = asyncio.run(LabelLog(kafka, topology.cameras(self.settings, kafka)).read())
        mine = [label for label in found if label.camera_id in {self.front, self.gate}]
        return sorted(mine, key=lambda label: label.labelled_at)

    def labels_of(self, event: RiskEvent) -> list[Label]:
        return [label for label in self.labels() if label.event_id == event.event_id]


def _flipped(event: RiskEvent, replay_id: str) -> ReplayEvent:
    name = f"{event.batch_id}:{replay_id}"
    verdict = msgspec.structs.replace(event, event_id=name, run=replay_id, risk_score=70, risk_level="high")
    return ReplayEvent(
        replay_id=replay_id,
        unit_id=f"{replay_id}:{event.batch_id}",
        event_id=name,
        camera_id=event.camera_id,
        reused=False,
        event=verdict,
    )


def built(stack: LocalStack) -> House:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("REWATCH_KAFKA__BOOTSTRAP_SERVERS", stack.bootstrap_servers)
        environment.setenv("REWATCH_KAFKA__PARTITIONS", str(PARTITIONS))
        environment.setenv("REWATCH_CLICKHOUSE__URL", stack.clickhouse_url)
        environment.setenv("REWATCH_CLICKHOUSE__DATABASE", f"label_{secrets.token_hex(4)}")
        house = House(load())
    asyncio.run(house.build())
    return house


@pytest.fixture(scope="module")
def untouched(stack: LocalStack) -> House:
    return built(stack)


@pytest.fixture(scope="module")
def touched(stack: LocalStack) -> House:
    return built(stack)


def _moved_in(house: House, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> House:
    assert settings.kafka.system  # the servers, and a name of this test's own
    monkeypatch.setenv("REWATCH_CLICKHOUSE__DATABASE", house.settings.clickhouse.database)
    return house


@pytest.fixture
def unlabelled(untouched: House, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> House:
    """A house that nobody labels anything of."""
    return _moved_in(untouched, settings, monkeypatch)


@pytest.fixture
def house(touched: House, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> House:
    """A house in which other tests have labelled other events, perhaps."""
    return _moved_in(touched, settings, monkeypatch)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("rewatch lab", ["label"]),
        ("rewatch label ", ["missed", "ls", "session", "7c1b22", "9d00aa"]),
        ("rewatch label m", ["missed"]),
        ("rewatch label 7", ["7c1b22"]),
        ("rewatch label 7c1b22 ", ["true", "false"]),
        ("rewatch label 7c1b22 f", ["false"]),
        ("rewatch label 7c1b22 true --no", ["--note"]),
        ("rewatch label missed --camera y", ["yard"]),
        ("rewatch label session --c", ["--count", "--camera"]),
    ],
)
def test_tab_completes_commands_events_and_verdicts(line: str, offered: list[str], url: str) -> None:
    assert tab(line, REWATCH_CLICKHOUSE__URL=url) == offered


def test_help_tells_both_ways_to_label(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = invoke("label", "--help").output
    for part in ("EVENT true|false | COMMAND", "missed", "session", "rewatch label front-door:7c1b true"):
        assert part in shown
    assert "label EVENT [OPTIONS] {true|false}" in invoke("label", "7c1b", "--help").output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sesion",), "Did you mean 'session'"),
        (("mised", "--camera", "yard"), "Did you mean 'missed'"),
        (("7c1b",), "Missing argument"),
        (("7c1b", "maybe"), "'maybe' is not one of 'true', 'false'"),
        (("7c1b", "true", "--bogus"), "No such option"),
        (("7c1b", "true", "--note", "x" * 2001), "--note: 2001 characters; 2000 at most"),
        (("7c1b", "true", "--chance", "0.5"), "--selection and --chance belong together"),
        (("7c1b", "true", "--selection", "rare", "--chance", "0"), "--selection and --chance belong together"),
        (("missed", "--camera", "yard", "--from", "soon", "--to", "1h"), "--from soon: neither an age"),
        (("missed", "--camera", "yard", "--from", "1h", "--to", "2h"), "--to must not lie before --from"),
        (("missed", "--camera", "yard", "--from", "40d", "--to", "1h"), "31 days"),
        (("missed", "--camera", "yard", "--from", "0001-02-03", "--to", "1h"), "1 is no year of a camera"),
        (("session", "--count", "0"), "--count"),
        (("ls", "--since", "soon"), "--since soon"),
    ],
)
def test_what_makes_no_sense_is_2_and_says_why(
    words: tuple[str, ...], said: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("label", *words)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.real
def test_an_event_is_labelled_once_on_the_log_though_the_broker_never_had_it(house: House) -> None:
    event = house.events[0]
    said = answer("label", event.event_id[:30], "false", "--note", "the post", "--author", "me")
    [written] = house.labels_of(event)
    assert (written.label_id, written.event_id, written.verdict) == (said["label_id"], event.event_id, "false_alarm")
    assert (written.started_at, written.ended_at) == (event.started_at, event.ended_at)
    assert (written.note, written.author, written.selection, written.chance) == ("the post", "me", "", 0.0)
    assert datetime.fromisoformat(said["started_at"]).timestamp() * 1000 == event.started_at
    # Options may stand anywhere, also before the event; a session elsewhere says what it had chosen it as.
    digest = event.event_id.split(":")[1]
    result = invoke("label", "--selection", "rare", "--chance", "0.25", digest, "true")
    assert result.output == f"{event.event_id} is labelled a true alarm\n"
    [_, second] = house.labels_of(event)
    assert (second.verdict, second.selection, second.chance) == ("true_alarm", "rare", 0.25)


@pytest.mark.real
def test_no_single_event_is_1_and_nothing_is_labelled(unlabelled: House) -> None:
    several = invoke("label", unlabelled.front, "true")
    assert several.exit_code == 1
    assert "is the beginning of several events; say more of it" in several.stderr
    none = invoke("label", f"{unlabelled.front}:zz", "true")
    assert none.exit_code == 1
    assert "there is no event" in none.stderr
    assert unlabelled.labels() == []


@pytest.mark.real
def test_a_missed_alarm_is_a_span_of_a_camera_that_there_is(house: House) -> None:
    span = ("--from", "2026-11-02T10:00", "--to", "2026-11-02T10:05")
    said = answer("label", "missed", "--camera", house.gate, *span)
    assert (said["verdict"], said["event_id"], said["ended_at"]) == ("missed", None, "2026-11-02T10:05:00+00:00")
    [written] = [label for label in house.labels() if label.event_id is None]
    assert (written.camera_id, written.started_at, written.ended_at) == (house.gate, AT, AT + 300_000)
    nowhere = invoke("label", "missed", "--camera", "nowhere", *span)
    assert nowhere.exit_code == 1
    assert f"there are {house.front}, {house.gate}" in nowhere.stderr


@pytest.mark.real
def test_labels_reach_clickhouse_and_the_page_with_their_chance_newest_first(house: House) -> None:
    first, second = house.events[9], house.events[16]
    answer("label", first.event_id, "true", "--selection", "near_threshold", "--chance", "0.5", "--author", "sorter")
    answer("label", second.event_id, "false", "--selection", "rare", "--chance", "0.25", "--author", "sorter")
    asyncio.run(house.store([label for label in house.labels() if label.author == "sorter"]))
    listed = [label for label in answer("label", "ls") if label["author"] == "sorter"]
    assert [(label["verdict"], label["selection"], label["chance"], label["risk_score"]) for label in listed] == [
        ("false_alarm", "rare", 0.25, 60),
        ("true_alarm", "near_threshold", 0.5, 95),
    ]
    assert answer("label", "ls", "--camera", house.gate) == answer("label", "ls", "--since", "2100-01-01") == []
    assert "60 high" in invoke("label", "ls").output
    query = "SELECT selection, chance FROM labels FINAL WHERE author = 'sorter' ORDER BY chance"
    assert answer("sql", query) == [
        {"selection": "rare", "chance": 0.25},
        {"selection": "near_threshold", "chance": 0.5},
    ]

    async def shown() -> dict[str, Any]:
        async with kit.source_of(house.settings) as source:
            return (await source.event(first.event_id)).labels[0].model_dump()

    # What programs that read the page's API know stays as it was.
    label = asyncio.run(shown())
    assert label["verdict"] == "true_alarm"
    assert set(label) == {
        *("label_id", "camera_id", "started_at", "ended_at", "verdict"),
        *("event_id", "author", "note", "labelled_at"),
    }


@pytest.mark.real
@pytest.mark.parametrize("command", ["event", "missed", "session"])
def test_without_a_broker_it_is_3_and_names_the_setting(
    unlabelled: House, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWATCH_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:9")
    span = ("--camera", unlabelled.front, "--from", "2h", "--to", "1h")
    words = {"event": (unlabelled.events[9].event_id, "true"), "missed": ("missed", *span), "session": ("session",)}
    result = invoke("label", *words[command])
    assert result.exit_code == 3
    assert "kafka.bootstrap_servers" in result.stderr


@pytest.mark.real
def test_without_clickhouse_it_is_3_and_names_the_setting(unlabelled: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWATCH_CLICKHOUSE__URL", "http://127.0.0.1:9")
    for words in ((unlabelled.events[0].event_id, "true"), ("ls",), ("session",)):
        result = invoke("label", *words)
        assert result.exit_code == 3
        assert "clickhouse.url" in result.stderr


@pytest.mark.real
def test_a_session_without_a_terminal_is_a_list_with_strata_and_chances(unlabelled: House) -> None:
    names = [event.event_id for event in unlabelled.events]
    listed = answer("label", "session", "--count", "9", "--seed", "7")
    assert listed["seed"] == 7
    assert len({event["event_id"] for event in listed["events"]} & set(names)) == 9
    assert all(0 < event["chance"] <= 1 for event in listed["events"])
    sizes = {"near_threshold": 3, "flipped": 1, "rare": 2, "random": 20}
    assert {name: stratum["without_label"] for name, stratum in listed["strata"].items()} == sizes
    # Two thirds of nine are as many as there are to prefer: each of them is chosen for what it is.
    assert {name: stratum["chosen"] for name, stratum in listed["strata"].items()} == sizes | {"random": 3}
    chosen = {event["event_id"]: event["selection"] for event in listed["events"]}
    assert chosen[names[2]] == "flipped"
    assert chosen[names[9]] == chosen[names[19]] == "rare"
    assert answer("label", "session", "--count", "9", "--seed", "7") == listed
    first = listed["events"][0]
    assert [seen["label"] for seen in first["seen"]] == ["person", "car"]
    assert first["page"].endswith(f"/events/{first['event_id']}")
    assert first["image"].endswith(".jpg")
    assert {"summary", "reasoning", "risk_score", "camera_name", "time_zone"} <= first.keys()
    output = invoke("label", "session", "--count", "9", "--seed", "7").output
    assert all(event["event_id"] in output for event in listed["events"])
    assert unlabelled.labels() == []


@pytest.mark.real
def test_a_session_asks_for_what_fits(unlabelled: House) -> None:
    gate = answer("label", "session", "--count", "100", "--camera", unlabelled.gate)
    assert [event["camera_id"] for event in gate["events"]] == [unlabelled.gate] * 2
    late = answer("label", "session", "--count", "100", "--since", "2026-11-03T00:00")
    assert {event["event_id"] for event in late["events"]} == {e.event_id for e in unlabelled.events[14:18]}
    assert invoke("label", "session", "--since", "2100-01-01").output == "no event without a label that fits\n"


@pytest.mark.real
@pytest.mark.parametrize(
    ("replay", "flipped"), [("stricter", 2), ("r1", 2), ("the same again", 3), ("r0", 3), ("gentler", None)]
)
def test_flipped_is_what_the_named_replay_judged_otherwise(unlabelled: House, replay: str, flipped: int | None) -> None:
    listed = answer("label", "session", "--count", "12", "--replay", replay)
    chosen = [event["event_id"] for event in listed["events"] if event["selection"] == "flipped"]
    assert chosen == ([] if flipped is None else [unlabelled.events[flipped].event_id])


@pytest.mark.real
def test_a_replay_that_there_is_not_is_1_and_names_those_that_there_are(unlabelled: House) -> None:
    result = invoke("label", "session", "--replay", "milder")
    assert result.exit_code == 1
    assert "gentler" in result.stderr
    assert "several replays begin so" in invoke("label", "session", "--replay", "r").stderr


@pytest.mark.real
def test_a_session_leaves_out_what_is_labelled_also_where_clickhouse_does_not_know_yet(house: House) -> None:
    stored, fresh = house.events[5], house.events[6]
    answer("label", stored.event_id, "true", "--author", "early")
    asyncio.run(house.store([label for label in house.labels() if label.author == "early"]))
    answer("label", fresh.event_id, "true")
    names = {event["event_id"] for event in answer("label", "session", "--count", "100")["events"]}
    labelled = {label.event_id for label in house.labels()}
    assert {stored.event_id, fresh.event_id} <= labelled
    assert names == {event.event_id for event in house.events} - labelled


class Keys(Keyboard):
    """Somebody whose keys are known before; `shown` is what stood there when one was pressed."""

    def __init__(self, keys: str, lines: Sequence[str] = ()) -> None:
        self._keys = list(keys)
        self._lines = list(lines)
        self.forgotten = 0

    def forget(self) -> None:
        self.forgotten += 1

    async def key(self) -> str:
        return self._keys.pop(0)

    async def line(self, ask: str) -> str:
        assert ask
        return self._lines.pop(0)


def items(number: int) -> list[Item]:
    event = {
        "camera_id": "front",
        "camera_name": "Front [red]door\x1b[2J",
        "started_at": datetime(2026, 11, 2, 10, tzinfo=UTC),
        "ended_at": datetime(2026, 11, 2, 10, 1, tzinfo=UTC),
        "time_zone": "UTC",
        "risk_score": 10,
        "risk_level": "low",
        "summary": "A cat.",
        "reasoning": "It is a cat.",
    }
    return [
        Item(Chosen(f"front:{n}:live", "random", 0.5), Window(event | {"event_id": f"front:{n}:live"}, ()), {})
        for n in range(number)
    ]


class Log:
    """Takes labels, but for those whose turn is in `away`."""

    def __init__(self, *away: int) -> None:
        self.taken: list[Label] = []
        self._away = set(away)
        self._turn = 0

    async def append(self, label: Label) -> Label:
        self._turn += 1
        if self._turn in self._away:
            raise UnavailableError("broker", "no answer (kafka.bootstrap_servers)")
        self.taken.append(label)
        return label


async def sit(keyboard: Keys, log: Log, number: int = 3) -> Session:
    session = Session(items(number), give=log.append, keyboard=keyboard, author="")
    await session.run()
    session.tell({"random": frozenset(f"front:{n}:live" for n in range(10))})
    return session


async def test_a_broker_that_goes_away_costs_no_label_and_no_place(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(2)
    session = await sit(Keys("tfftt"), log)
    assert [(label.event_id, label.verdict) for label in log.taken] == [
        ("front:0:live", "true_alarm"),
        ("front:1:live", "false_alarm"),
        ("front:2:live", "true_alarm"),
    ]
    assert len(session.given) == 3
    said = capsys.readouterr().out
    assert "not labelled: no answer (kafka.bootstrap_servers)" in said
    assert "Front [red]door\\x1b[2J (front)" in said  # neither markup nor a way to steer the terminal
    assert said.split("random")[-1].split()[:5] == ["2", "1", "0", "0", "7"]


async def test_keys_for_what_stood_there_before_answer_nothing() -> None:
    keyboard = Keys("tusq")
    await sit(keyboard, Log())
    assert keyboard.forgotten == 4  # before each that is shown: two, back to the first, and the second again


async def test_undo_at_the_first_one_a_skip_undone_and_a_note_that_stays_with_its_event() -> None:
    log = Log()
    session = await sit(Keys("uns" + "uf" + "tq", ["not for the next one"]), log)
    assert [(label.event_id, label.verdict, label.note) for label in log.taken] == [
        ("front:0:live", "false_alarm", ""),
        ("front:1:live", "true_alarm", ""),
    ]
    assert len(session.given) == 2


async def test_ctrl_c_while_a_label_is_on_its_way_waits_for_it() -> None:
    began, go_on, log = asyncio.Event(), asyncio.Event(), Log()

    async def slowly(label: Label) -> Label:
        began.set()
        await go_on.wait()
        return await log.append(label)

    session = Session(items(2), give=slowly, keyboard=Keys("t"), author="")
    running = asyncio.create_task(session.run())
    await began.wait()
    for _ in range(3):  # impatient
        running.cancel()
        await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [label.event_id for label in log.taken] == list(session.given) == ["front:0:live"]


class Person(Terminal):
    """Somebody who labels."""

    def answer(self, shown: str, keys: str) -> None:
        """Wait until it is shown, behind what was answered before, then press the keys."""
        self.until(shown)
        self.raw = self.raw[self.raw.rindex(shown) + len(shown) :]
        self.press(keys)


ASKED = ("label", "session", "--count", "4", "--seed", "3")


@pytest.fixture
def person(house: House) -> Iterator[Person]:
    assert house.events
    with Person(*ASKED, "--author", "me", columns=160) as terminal:
        yield terminal


@pytest.mark.real
def test_a_session_shows_each_event_and_puts_each_answer_on_the_log_at_once(house: House, person: Person) -> None:
    before = len(house.labels())
    order = answer(*ASKED)["events"]
    person.until("? help")
    for part in (
        "1 of 4",
        f"chance {order[0]['chance']:.2g}",
        f"{order[0]['risk_score']} {order[0]['risk_level']}",
        order[0]["summary"],
        f"why: {order[0]['reasoning']}",
        "seen: person 0.99 (2 at once), car 0.88",
        f"page: {order[0]['page']}",
        f"image: {order[0]['image']}",
    ):
        assert part in person.text
    person.answer("? help", "t")
    person.until("on the log")
    assert [label.event_id for label in house.labels()[before:]] == [order[0]["event_id"]]
    # Back, and something else is said of it, with a note; the next is skipped.
    person.answer("2 of 4", "u")
    person.until("you said: a true alarm")
    person.answer("? help", "n")
    person.answer("note: ", "the post\n")
    person.answer("it goes with the label", "f")
    person.answer("2 of 4", "s")
    person.answer("3 of 4", "x")
    person.answer("Ctrl-C", "t")
    person.answer("4 of 4", "q")
    assert person.end() == 0
    assert "2 labels given" in person.text
    given = house.labels()[before:]
    assert [(label.event_id, label.verdict, label.note) for label in given] == [
        (order[0]["event_id"], "true_alarm", ""),
        (order[0]["event_id"], "false_alarm", "the post"),
        (order[2]["event_id"], "true_alarm", ""),
    ]
    assert [(label.selection, label.chance, label.author) for label in given] == [
        (order[n]["selection"], order[n]["chance"], "me") for n in (0, 0, 2)
    ]
    left = {
        row[0]: int(row[-1]) for line in person.text.splitlines() if (row := line.split())[-1:] and row[-1].isdigit()
    }
    for name, stratum in answer("label", "session", "--count", "100")["strata"].items():
        assert left[name.split("_")[0]] == stratum["without_label"]


@pytest.mark.real
def test_ctrl_c_loses_no_label_and_tells_what_was_given(house: House, person: Person) -> None:
    before = len(house.labels())
    person.answer("? help", "t")
    person.answer("2 of 4", "f")
    person.until("a false alarm")
    person.interrupt()  # while it is on its way
    assert person.end() == 130
    assert "2 labels given" in person.text
    assert "Traceback" not in person.text
    assert [label.verdict for label in house.labels()[before:]] == ["true_alarm", "false_alarm"]


@pytest.mark.real
def test_ctrl_c_where_it_waits_for_a_note_ends_it(house: House, person: Person) -> None:
    before = house.labels()
    person.answer("? help", "n")
    person.until("note: ")
    person.interrupt()
    assert person.end() == 130
    assert "0 labels given" in person.text
    assert house.labels() == before
