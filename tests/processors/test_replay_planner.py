"""The planner of a replay on a log in memory: killed anywhere, fenced, paused; what it reuses and never does."""

import asyncio

import msgspec
import pytest

from processors.replay.history import Said, Window
from processors.replay.ledger import AWAY
from processors.replay.plan import Change, Llm, Plan
from processors.replay.planner import EndedError, TakenOverError
from schemas import ids
from streams import codec
from streams.errors import UnavailableError
from streams.redrives import again
from tests.processors.planner_kit import (
    CAMERAS,
    DEFAULT,
    OTHER,
    REPLAY,
    Desk,
    KilledError,
    Source,
    World,
    judging,
    letter,
    live_of,
    planner,
    replay_event,
    verdict,
    windows_of,
)
from tests.processors.replay_kit import Known, judge_of, replay, stage_of, unit

CHANGE = Plan(kind="change", change=Change(prompt=OTHER.digest))
BASELINE = Plan(kind="baseline")
STRICT = Plan(kind="baseline", mode="strict")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits between two tries."""
    monkeypatch.setattr("processors.replay.planner._AGAIN_S", 0)
    monkeypatch.setattr("processors.replay.planner._CLAIM_S", 0)


def exactly_once(world: World, windows: list[Window]) -> None:
    wanted = sorted(window.context.batch_id for window in windows)
    assert sorted(world.units) == [f"{REPLAY}:{batch}" for batch in wanted]
    assert sorted(event.event.batch_id for event in world.events) == wanted


async def test_every_window_is_one_unit_on_its_cameras_partition_and_has_one_result() -> None:
    world, windows = World(), windows_of(10)
    told = await planner(world, windows).run()
    exactly_once(world, windows)
    assert (told.judged, told.reused, told.failed, told.skipped, told.total) == (10, 0, 0, 0, 10)
    assert told.tokens == 1000
    for record in world.of("replay_units"):
        assert CAMERAS[record.partition] == record.key.decode().split(":")[1]
    assert {event.event.prompt_digest for event in world.events} == {OTHER.digest}
    assert [step.state for step in world.steps] == ["running", "done"]
    assert world.steps[-1].detail == "10 judged, 0 reused, 0 failed, 0 left out"


class Doubled(Source):
    """Windows that come twice, though known ones are left out: in one page, and in a page much later."""

    async def pages(self, known):
        async for page in super().pages(known):
            yield [*page, *page]
        async for page in super().pages(lambda _: False):
            yield page


@pytest.mark.parametrize("slots", [1, 8])
async def test_a_window_that_comes_twice_is_one_unit_or_one_result(slots) -> None:
    """With eight slots its second copy comes while the first still waits to be handed out."""
    world, windows = World(), windows_of(12)
    source = Doubled(windows)
    told = await planner(world, [], source=source, slots=slots, said=recorded(windows[6:])).run()
    batches = sorted(event.event.batch_id for event in world.events)
    assert batches == sorted(window.context.batch_id for window in windows)
    assert sorted(world.units) == [f"{REPLAY}:{batch}" for batch in sorted(w.context.batch_id for w in windows[:6])]
    assert (told.judged, told.reused) == (6, 6)


async def test_killed_at_any_step_and_resumed_every_unit_is_there_exactly_once() -> None:
    windows = windows_of(24)
    deaths = 0
    for die in range(1000):
        world = World()
        try:
            await planner(world, windows, die=die).run()
        except KilledError:
            deaths += 1
        else:
            break
        await planner(world, windows, who="b").run()
        exactly_once(world, windows)
        assert world.steps[-1].state == "done"
    assert deaths > 30, "each step of a life was the last one once"


@pytest.mark.parametrize("steps", [3, 4, 5, 7, 11])
async def test_killed_again_and_again_it_comes_to_its_end(steps: int) -> None:
    world, windows = World(), windows_of(24)
    lives = 0
    while True:
        lives += 1
        assert lives < 200
        try:
            await planner(world, windows, die=steps + lives, who=str(lives)).run()
        except KilledError:
            continue
        break
    assert lives > 2
    exactly_once(world, windows)


async def test_an_append_of_unknown_outcome_is_looked_at_not_repeated() -> None:
    world, windows = World(), windows_of(10)
    desk = Desk(world)
    desk.uncertain = 4
    await planner(world, windows, desk=desk).run()
    exactly_once(world, windows)


@pytest.mark.parametrize("state", ["paused", "running"])
async def test_what_was_asked_for_while_the_broker_was_away_is_heeded_before_anybody_is_fenced(state) -> None:
    world, windows = World(), windows_of(10)
    desk = Desk(world)
    desk.uncertain = 1
    owner = object()

    def meanwhile() -> None:
        world.owner = owner
        world.say(state, "another")

    world.meanwhile = meanwhile
    with pytest.raises(EndedError, match="another"):
        await planner(world, windows, desk=desk).run()
    assert world.owner is owner
    assert world.steps[-1].detail == "another"


async def test_few_units_are_ahead_of_their_results() -> None:
    world, windows = World(), windows_of(60)
    await planner(world, windows, slots=2).run()
    exactly_once(world, windows)
    assert world.most_waiting <= 12, "2 a slot and 2 more, or five seconds of two a second"


async def test_a_second_planner_fences_the_first_and_both_together_double_nothing() -> None:
    world, windows = World(), windows_of(12)
    world.worker = False
    first = asyncio.create_task(planner(world, windows, who="first").run())
    while not world.units:
        await asyncio.sleep(0)
    world.worker = True
    await planner(world, windows, who="second").run()
    with pytest.raises(TakenOverError):
        async with asyncio.timeout(10):
            await first
    exactly_once(world, windows)


async def test_a_planner_that_only_waits_notices_that_another_goes_on() -> None:
    world, windows = World(), windows_of(3)
    world.worker = False
    first = asyncio.create_task(planner(world, windows, who="first").run())
    while not world.units:
        await asyncio.sleep(0)
    second = asyncio.create_task(planner(world, windows, who="second").run())
    with pytest.raises(TakenOverError, match="it is run by second now"):
        async with asyncio.timeout(10):
            await first
    world.worker = True
    await second
    exactly_once(world, windows)


@pytest.mark.parametrize("state", ["running", "done"])
async def test_a_planner_that_was_fenced_by_another_says_so_and_appends_nothing(state) -> None:
    world, windows = World(), windows_of(12)
    task = asyncio.create_task(planner(world, windows).run())
    while not world.units:
        await asyncio.sleep(0)
    before = len(world.units)
    world.owner = None
    world.hidden.append(lambda: world.say(state, "another"))  # it is on the log, and not read yet
    with pytest.raises(TakenOverError, match="another"):
        await task
    assert len(world.units) == before
    assert world.steps[-1].detail == "another", "the last word is the other one's"


async def test_fenced_by_nobody_it_begins_anew() -> None:
    """The coordinator ends a transaction that takes too long: a laptop slept."""
    world, windows = World(), windows_of(12)
    task = asyncio.create_task(planner(world, windows).run())
    while not world.units:
        await asyncio.sleep(0)
    world.owner = None
    await task
    exactly_once(world, windows)
    assert world.steps[-1].state == "done"


@pytest.mark.parametrize("error", [ValueError("what nobody foresaw"), UnavailableError("store", "what nobody foresaw")])
async def test_what_it_cannot_mend_leaves_it_failed_and_resumed_it_goes_on(error, monkeypatch) -> None:
    monkeypatch.setattr("processors.replay.planner._PATIENCE_S", 0)
    world, windows = World(), windows_of(12)
    broken = planner(world, windows)

    async def sort(_):
        raise error

    broken._ports.sorter.sort = sort
    with pytest.raises(type(error), match="what nobody foresaw"):
        await broken.run()
    assert (world.steps[-1].state, world.steps[-1].detail) == ("failed", str(error))
    await planner(world, windows, who="b").run()
    exactly_once(world, windows)


async def test_an_error_does_not_speak_over_what_was_asked_for(monkeypatch) -> None:
    world, windows = World(), windows_of(12)
    broken = planner(world, windows)

    async def sort(_):
        world.say("cancelled", "because")
        raise ValueError("what nobody foresaw")

    broken._ports.sorter.sort = sort
    with pytest.raises(ValueError, match="foresaw"):
        await broken.run()
    assert world.steps[-1].state == "cancelled"


GONE = "http://127.0.0.1:1, the LLM of replay n, is away: connection refused"


async def test_what_failed_without_its_llm_is_judged_when_it_is_resumed_once_each_killed_wherever() -> None:
    windows = windows_of(9)
    lost = {window.context.batch_id for window in windows[2:7]}
    for die in range(1000):
        world = World()
        world.fails, world.says = lost.__contains__, GONE
        first = await planner(world, windows).run()
        assert (first.judged, first.failed) == (4, 5)
        letters = {letter.key: letter for letter in world.letters}
        world.fails = lambda _: False
        killed = False
        try:
            told = await planner(world, windows, who="b", die=die).run()
        except KilledError:
            killed = True
            told = await planner(world, windows, who="c").run()
        assert (told.judged, told.failed) == (9, 0)
        assert sorted(event.event.batch_id for event in world.events) == sorted(w.context.batch_id for w in windows)
        redriven = [record for record in world.of("replay_units") if record.redriven]
        assert sorted(record.key.decode() for record in redriven) == sorted(f"{REPLAY}:{batch}" for batch in lost)
        for record in redriven:
            assert (record.redriven, record.attempts) == (letters[record.key].origin, letters[record.key].attempt)
        if not killed:
            break
    assert die > 10, "each step of a life was the last one once"


def test_what_the_stage_says_of_an_llm_that_is_away_the_ledger_takes_for_it() -> None:
    named = replay(REPLAY, CHANGE)
    lost = unit(REPLAY, windows_of(1)[0].context)
    said = stage_of(judge_of([]), Known(named))._lost_text(lost, Llm(url="http://x"), UnavailableError("llm", "gone"))
    assert AWAY in said
    assert AWAY in GONE


async def test_what_fails_again_without_its_llm_waits_for_the_next_time() -> None:
    world, windows = World(), windows_of(3)
    world.fails, world.says = lambda _: True, GONE
    for tried in range(1, 4):
        told = await planner(world, windows, who=str(tried)).run()
        assert (told.judged, told.failed) == (0, 3)
        assert len(world.units) == 3 * tried


async def test_what_failed_by_itself_is_not_asked_again_by_a_resume() -> None:
    world, windows = World(), windows_of(3)
    world.fails = lambda _: True
    for who in "ab":
        told = await planner(world, windows, who=who).run()
        assert (told.judged, told.failed) == (0, 3)
    assert len(world.units) == 3


async def test_redriven_while_nobody_planned_a_unit_is_waited_for() -> None:
    world, windows = World(), windows_of(3)
    world.fails = lambda _: True
    await planner(world, windows).run()
    said = world.letters[0]
    place = ids.place(said.origin)
    record, _ = again(place, said.attempt, key=said.key, value=said.value, headers=(), by="cli", at=1)
    world.put([record])
    world.fails = lambda _: False
    told = await planner(world, windows, who="b").run()
    assert (told.judged, told.failed) == (1, 2)


@pytest.mark.parametrize("state", ["paused", "cancelled"])
async def test_it_obeys_a_step_that_somebody_else_wrote(state) -> None:
    world, windows = World(), windows_of(30)
    task = asyncio.create_task(planner(world, windows).run())
    while len(world.events) < 5:
        await asyncio.sleep(0)
    world.say(state, "because")
    with pytest.raises(EndedError, match="because") as ended:
        await task
    assert ended.value.state == state
    assert len(world.units) < 30
    assert world.steps[-1].state == state, "the last word is whose it was"
    if state == "paused":
        await planner(world, windows, who="b").run()
        exactly_once(world, windows)
    else:
        with pytest.raises(EndedError, match="because"):
            await planner(world, windows, who="b").run()
        assert world.steps[-1].state == "cancelled"


async def test_ctrl_c_pauses_in_order_and_resume_goes_on() -> None:
    world, windows, stop = World(), windows_of(30), asyncio.Event()
    task = asyncio.create_task(planner(world, windows, stop=stop).run())
    while len(world.events) < 5:
        await asyncio.sleep(0)
    stop.set()
    with pytest.raises(EndedError) as ended:
        await task
    assert ended.value.state == world.steps[-1].state == "paused"
    await planner(world, windows, who="b").run()
    exactly_once(world, windows)


async def test_tokens_spent_pause_it_and_a_higher_limit_goes_on() -> None:
    world, windows = World(), windows_of(30)
    plan = msgspec.structs.replace(CHANGE, max_tokens=1000)
    with pytest.raises(EndedError, match="1000 tokens are spent, 1000 are allowed") as ended:
        await planner(world, windows, plan).run()
    assert ended.value.state == "paused"
    assert len(world.events) == 10, "100 tokens each: not one more was asked for"
    await planner(world, windows, msgspec.structs.replace(plan, max_tokens=10_000), who="b").run()
    exactly_once(world, windows)


async def test_a_unit_that_cannot_be_judged_is_counted_and_named_and_nobody_waits_for_it() -> None:
    world, windows = World(), windows_of(6)
    bad = windows[2].context.batch_id
    world.fails = lambda batch: batch == bad
    one = planner(world, windows)
    told = await one.run()
    assert (told.judged, told.failed, told.total) == (5, 1, 6)
    assert one.ledger.failed == {bad: "nothing usable came back"}
    assert len(world.units) == 6
    # Redriven, it has its result after all; a planner that reads both knows only that.
    world.put([codec.emit("replay_events", replay_event(verdict(windows[2].context, REPLAY, OTHER)))])
    again = await planner(world, windows, who="b").run()
    assert (again.judged, again.failed) == (6, 0)


async def test_another_replays_records_are_none_of_its() -> None:
    world, windows = World(), windows_of(3)
    for window in windows:
        world.put([codec.emit("replay_events", replay_event(verdict(window.context, "r999999999999", OTHER)))])
        world.put([codec.emit("dead_letters", letter(f"{REPLAY}:{window.context.batch_id}", "yard", stage="analyze"))])
        world.put([codec.emit("dead_letters", letter(f"r999999999999:{window.context.batch_id}", "yard"))])
    told = await planner(world, windows).run()
    assert (told.judged, told.failed) == (3, 0)
    assert len(world.units) == 3


def recorded(windows: list[Window], prompt=OTHER) -> dict[str, Said]:
    return {w.context.batch_id: Said(verdict(w.context, "live", prompt), w.context) for w in windows}


async def test_a_verdict_that_is_there_already_is_repeated_and_costs_no_call() -> None:
    world, windows = World(), windows_of(9)
    told = await planner(world, windows, said=recorded(windows[:5])).run()
    assert (told.judged, told.reused, told.tokens) == (4, 5, 400)
    assert len(world.units) == 4
    events = {event.event.batch_id: event for event in world.events}
    assert len(events) == len(world.events) == 9
    for window in windows[:5]:
        one = events[window.context.batch_id]
        assert one.reused
        assert one.event.run == one.replay_id == REPLAY
        assert one.event_id == one.event.event_id == f"{window.context.batch_id}:{REPLAY}"
        assert one.event.judged_at == verdict(window.context, "live").judged_at, "when it was judged, not repeated"
    assert not any(events[window.context.batch_id].reused for window in windows[5:])


async def test_a_window_that_was_told_of_in_other_words_is_judged_anew() -> None:
    world, windows = World(), windows_of(3)
    said = recorded(windows)
    renamed = msgspec.structs.replace(windows[0].context, camera_name="Back door")
    said[renamed.batch_id] = Said(said[renamed.batch_id].event, renamed)
    told = await planner(world, windows, said=said).run()
    assert (told.judged, told.reused) == (1, 2)
    assert world.units == [f"{REPLAY}:{renamed.batch_id}"]


@pytest.mark.parametrize("plan", [BASELINE, STRICT], ids=["baseline", "strict"])
async def test_baseline_and_strict_never_reuse_a_verdict(plan) -> None:
    world, windows = World(), windows_of(6)
    told = await planner(world, windows, plan, said=recorded(windows, DEFAULT)).run()
    assert (told.judged, told.reused) == (6, 0)
    exactly_once(world, windows)
    assert {event.event.prompt_digest for event in world.events} == {DEFAULT.digest}, "each under its own prompt"


async def test_what_has_no_equal_is_left_out_with_its_reason() -> None:
    windows = windows_of(6)
    contexts = [window.context for window in windows]
    windows[1] = Window(contexts[1], None)
    windows[2] = Window(contexts[2], live_of(contexts[2], prompt_digest="gone"))
    windows[3] = Window(contexts[3], live_of(contexts[3], model_digest="f" * 64, model="old"))
    world = World()
    one = planner(world, windows, BASELINE)
    told = await one.run()
    assert (told.judged, told.skipped, told.total) == (3, 3, 3)
    named = one._ports.sorter.skipped.named
    assert named == {
        contexts[1].batch_id: "no live verdict to repeat",
        contexts[2].batch_id: "its prompt version gone is not in `prompts`",
        contexts[3].batch_id: "judged by other weights: old, SHA-256 ffffffffffff",
    }


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"conditions": {"slots": "2", "prompt_cache": "on"}}, "not recorded under strict conditions: slots 2, prompt"),
        ({"conditions": {}}, "not recorded under strict conditions: slots unknown, prompt_cache unknown"),
        ({"conditions": judging().conditions | {"threads": "4"}}, "under other conditions: threads 4, 1 now"),
        ({"parameters": '{"seed": 7}'}, 'other conditions: parameters {"seed": 7}, {"seed": 0} now'),
    ],
)
async def test_strict_leaves_out_what_was_not_recorded_so(changed, why) -> None:
    windows = windows_of(3)
    windows[0] = Window(windows[0].context, live_of(windows[0].context, **changed))
    world = World()
    one = planner(world, windows, STRICT)
    told = await one.run()
    assert (told.judged, told.skipped) == (2, 1)
    assert why in one._ports.sorter.skipped.named[windows[0].context.batch_id]


async def test_strict_fails_when_the_weights_are_others_and_names_both() -> None:
    windows, world = windows_of(3), World()
    with pytest.raises(EndedError, match=f"{'d' * 64} here, {'c' * 64} then") as ended:
        await planner(world, windows, STRICT, judging=judging(model_digest="d" * 64)).run()
    assert ended.value.state == world.steps[-1].state == "failed"
    assert not world.units


async def test_what_the_log_has_forgotten_clickhouse_tells() -> None:
    world, windows = World(), windows_of(6)
    batches = [window.context.batch_id for window in windows]
    world.forgotten = [(batches[0], False, 70), (batches[1], True, 30)]
    told = await planner(world, windows).run()
    assert (told.judged, told.reused, told.tokens) == (5, 1, 70 + 400)
    assert sorted(world.units) == [f"{REPLAY}:{batch}" for batch in sorted(batches[2:])]


async def test_how_far_it_is_counts_what_is_left_and_how_fast_it_goes() -> None:
    world, windows, shown = World(), windows_of(30), []
    await planner(world, windows, show=shown.append).run()
    middle = next(one for one in shown if one.judged >= 10)
    assert middle.total == 30
    assert middle.eta_s == pytest.approx((30 - middle.done) / middle.rate)
    unknown = []
    world = World()
    source = Source(windows, counted=False)
    await planner(world, windows, source=source, show=unknown.append).run()
    assert unknown[0].total is None
    assert unknown[0].eta_s is None
