"""What analyze tells the LLM, and what it takes for a verdict."""

import json
import random

import msgspec
import pytest

from infra.models import analyst_data
from processors.analyze import answers, core
from processors.analyze.core import Answered
from schemas import prompts
from schemas.prompts import PromptError, PromptVersion
from tests.processors.analyze_samples import answer, context, section, seen

DEFAULT = prompts.default()


def user(found) -> str:
    return next(core.renderings(found, DEFAULT)).messages[1].content


def line(found, name: str) -> str | None:
    return dict(row.split(": ", 1) for row in user(found).splitlines()).get(name)


def test_the_default_prompt_is_what_the_demo_analyst_was_trained_on():
    frames = [(seen("person", 0.91, x=100), seen("dog", 0.72))] + [(seen("person", 0.8, x=104),)] * 20
    messages = next(core.renderings(context(*frames), DEFAULT)).messages
    assert messages[0].role == "system"
    assert messages[0].content == analyst_data.DEFAULT_INSTRUCTION
    assert messages[1].role == "user"
    assert messages[1].content == (
        "camera: front-door\n"
        "time: 23:14 night\n"
        "duration: 34 s\n"
        "frames: 21\n"
        "seen: 1 person 0.91, 1 dog 0.72\n"
        "moves: person stays"
    )


def test_prompts_equal_those_of_the_training_data():
    for seed in range(200):
        window = analyst_data.window(random.Random(seed))
        if not window.seen:
            continue
        first = min(window.seen, key=analyst_data.importance)
        boxes = {
            "stays": [(100.0, 50.0), (102.0, 50.0)],
            "passes": [(100.0, 50.0), (300.0, 50.0)],
            "approaches": [(100.0, 50.0), (300.0, 90.0)],
        }[window.moves]
        frames = [()] * window.frames
        for index in {0, window.frames - 1}:
            (x, height) = boxes[0 if index == 0 else 1]
            frames[index] = tuple(
                seen(label, score, x=x, height=height if label == first else 50.0)
                for label, (count, score) in window.seen.items()
                for _ in range(count)
            )
        if window.frames == 1 and window.moves != "stays":
            continue
        minute = (window.hour * 60 + window.minute) * 60_000
        found = context(
            *frames,
            camera=window.camera,
            started_at=1_790_294_400_000 + minute,
            seconds=window.duration_s,
            zone="UTC",
        )
        assert user(found) == analyst_data.render(window)


@pytest.mark.parametrize(
    ("utc", "zone", "told"),
    [
        ("2026-09-25T21:59:59", "UTC", "21:59 day"),
        ("2026-09-25T22:00:00", "UTC", "22:00 night"),
        ("2026-09-25T05:59:59", "UTC", "05:59 night"),
        ("2026-09-25T06:00:00", "UTC", "06:00 day"),
        ("2026-10-25T00:30:00", "Europe/Berlin", "02:30 night"),  # the first of two, on the night clocks go back
        ("2026-10-25T01:30:00", "Europe/Berlin", "02:30 night"),
        ("2026-07-01T18:45:00", "Asia/Kathmandu", "00:30 night"),
        ("1969-12-31T23:00:00", "UTC", "23:00 night"),
    ],
)
def test_time_is_the_cameras_own(utc, zone, told):
    from datetime import datetime

    at = round(datetime.fromisoformat(f"{utc}+00:00").timestamp() * 1000)
    assert line(context(started_at=at, zone=zone), "time") == told


def test_a_zone_or_a_time_that_is_none_is_a_value_error():
    with pytest.raises(ValueError, match="Atlantis"):
        core.variables(context(zone="Atlantis/Capital"))
    with pytest.raises(ValueError, match="no local time"):
        core.variables(context(started_at=10**17))


@pytest.mark.parametrize(("seconds", "told"), [(0, "0 s"), (0.4, "0 s"), (0.5, "1 s"), (1.5, "2 s"), (2.5, "3 s")])
def test_duration_is_rounded_half_up(seconds, told):
    assert line(context(seconds=seconds), "duration") == told


@pytest.mark.parametrize(
    ("shown", "count"), [([1, 2, 3, 3], 3), ([2, 3, 1, 1], 2), ([1, 1, 0, 2, 1], 1), ([2, 0, 0, 2], 2), ([3], 3)]
)
def test_counts_are_what_two_successive_frames_show_and_scores_the_best_of_all(shown, count):
    found = context(*(tuple(seen("person", 0.95 if n == 1 else 0.7) for _ in range(n)) for n in shown))
    assert line(found, "seen") == f"{count} person {0.95 if 1 in shown else 0.7:.2f}"


def test_people_come_first_then_vehicles_then_animals_then_others_each_by_name():
    labels = ["umbrella", "dog", "truck", "bird", "bicycle", "person", "backpack", "bus", "cat", "car", "motorcycle"]
    told = line(context(tuple(seen(label) for label in labels)), "seen")
    assert [part.split()[1] for part in told.split(", ")] == [
        *("person", "bicycle", "bus", "car", "motorcycle", "truck"),
        *("bird", "cat", "dog"),
        *("backpack", "umbrella"),
    ]


def test_what_stands_still_is_left_out_unless_nothing_else_was_seen():
    parked = seen("car", stationary=True)
    assert line(context((parked, seen("dog"))), "seen") == "1 dog 0.90"
    assert line(context((parked,), (parked, seen("dog"))), "seen") == "1 dog 0.90"
    assert line(context((parked,)), "seen") == "1 car 0.90"


def test_nothing_seen_says_so_and_has_no_moves():
    found = context(())
    assert line(found, "seen") == "nothing"
    assert line(found, "moves") is None


@pytest.mark.parametrize(
    ("first", "last", "how"),
    [
        ({}, {}, "stays"),
        # 640x360: the diagonal is 734.3 px, 8 % of it 58.7 px.
        ({"x": 100}, {"x": 158}, "stays"),
        ({"x": 100}, {"x": 159}, "passes"),
        ({"y": 0}, {"y": 59}, "passes"),
        ({"x": 100}, {"x": 300, "width": 60 * 1.5}, "passes"),
        ({"x": 100}, {"x": 300, "width": 60 * 1.51}, "approaches"),
        ({"x": 300, "width": 60 * 1.51}, {"x": 100}, "passes"),
        # It grew where it stood: the bottom's centre did not move.
        ({"x": 100, "y": 100}, {"x": 70, "y": 20, "width": 120, "height": 240}, "stays"),
    ],
)
def test_moves(first, last, how):
    found = context((seen("person", **first),), (seen("dog"),), (seen("person", **last),), (seen("dog"),))
    assert line(found, "moves") == f"person {how}"


def test_moves_follow_the_best_box_of_each_end():
    found = context(
        (seen("person", 0.9, x=100), seen("person", 0.5, x=500)),
        (seen("person", 0.5, x=500), seen("person", 0.9, x=110)),
    )
    assert line(found, "moves") == "person stays"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Front Door", "front-door"),
        ("back_yard-2", "back_yard-2"),
        ("a\nseen: nothing", "a-seen:-nothing"),
        (" ", "c1"),
    ],
)
def test_a_cameras_name_is_one_word_and_begins_no_line(name, told):
    found = msgspec.structs.replace(context(camera="c1"), camera_name=name)
    assert user(found).splitlines()[0] == f"camera: {told}"


def test_sections_follow_and_are_dropped_by_the_prompts_priority_then_their_own():
    found = context(
        sections=(
            section("memory", "m", 99),  # the prompt says 10
            section("weather", "w1", 15),
            section("weather", "w2", 15),
            section("zones", "z", 0),  # the prompt says 50
        )
    )
    steps = list(core.renderings(found, DEFAULT))
    assert steps[0].messages[1].content.splitlines()[-4:] == [
        *('memory: "m"', 'weather: "w1"', 'weather: "w2"', 'zones: "z"')
    ]
    assert [step.dropped for step in steps] == [
        (),
        ("memory",),
        ("memory", "weather"),
        ("memory", "weather", "weather"),
        ("memory", "weather", "weather", "zones"),
    ]
    assert steps[2].messages[1].content.endswith('weather: "w1"\nzones: "z"')


def test_token_bound_counts_bytes_not_characters():
    messages = (prompts.Message("user", "Tür"),)
    assert core.token_bound(messages) == 4 + core.CHAT_OVERHEAD


@pytest.mark.parametrize(
    ("score", "level"),
    [
        *((0, "low"), (29, "low"), (30, "medium"), (59, "medium")),
        *((60, "high"), (84, "high"), (85, "critical"), (100, "critical")),
    ],
)
def test_levels(score, level):
    assert core.risk_level(score) == level


def test_the_event_names_what_judged_it():
    found = context((seen("person"),), (seen("person"),))
    rendered = next(core.renderings(found, DEFAULT))
    answered = Answered(
        rendered=rendered,
        raw=answer(),
        repaired=False,
        model="m",
        model_digest="d" * 64,
        parameters={"temperature": 0},
        conditions={"slots": "1"},
        prompt_tokens=1,
        completion_tokens=2,
        cached_tokens=3,
        queued_ms=4.0,
        inference_ms=5.0,
    )

    def event(**changes):
        return core.risk_event(
            found, DEFAULT, answers.parse(answer(), DEFAULT).verdict, answered._replace(**changes), judged_at=7
        )

    first = event()
    assert first.event_id == f"{found.batch_id}:live"
    assert first.frame_ids == ("front-door:0", "front-door:1")
    assert first.risk_level == "high"
    assert json.loads(first.rendered_prompt)[0]["role"] == "system"
    assert event(queued_ms=9.0).verdict_digest == first.verdict_digest
    other = {event(model_digest="e" * 64).verdict_digest, event(parameters={"temperature": 1}).verdict_digest}
    unknown = {event(model_digest="").verdict_digest, event(model_digest="", model="n").verdict_digest}
    assert len({first.verdict_digest} | other | unknown) == 5


def test_a_prompt_survives_its_record():
    record = DEFAULT.to_record(5, "why")
    again = PromptVersion.from_record(record)
    assert again == DEFAULT
    assert again.digest == record.digest
    with pytest.raises(PromptError, match="its content has digest"):
        PromptVersion.from_record(msgspec.structs.replace(record, parameters='{"temperature":1}'))
    with pytest.raises(PromptError, match="kind active"):
        PromptVersion.from_record(msgspec.structs.replace(record, kind="active"))


def version(user_template="x", schema=None, parameters="{}") -> PromptVersion:
    template = json.dumps({"system": "s", "user": user_template, "repair": "{{ error }}"})
    return PromptVersion(
        template=template,
        output_schema=DEFAULT.output_schema if schema is None else schema,
        parameters=parameters,
        name="mine",
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: version("{{ broken"),
        lambda: version(schema="{"),
        lambda: version(schema='{"type": "nonsense"}'),
        lambda: version(schema='{"type": "object", "required": ["summary"]}'),
        lambda: version(schema="true"),
        lambda: version(parameters="[]"),
        lambda: PromptVersion(template='{"system": ""}', output_schema=DEFAULT.output_schema, parameters="{}"),
    ],
)
def test_a_prompt_that_cannot_work_is_refused_when_it_is_made(make):
    with pytest.raises(PromptError):
        make()


@pytest.mark.parametrize(
    "text",
    ["{{ nowhere }}", "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}", "{% for i in range(10 ** 9) %}{% endfor %}"],
)
def test_a_template_cannot_leave_its_sandbox(text):
    with pytest.raises(PromptError, match="mine"):
        next(core.renderings(context(), version(text)))
