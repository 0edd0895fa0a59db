"""What the campaign's audit calls a violation, shown on a small log that is then spoiled in one place."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec
import pytest

from infra.config import load
from processors.batch.stage import build as build_batch
from processors.store.audit import Report, Violation
from schemas import ids
from schemas.records import Batch, DeadLetter, Record
from streams import codec
from streams.messages import Incoming
from streams.topics import STORED
from tests import examples
from tests.chaos import product
from tests.chaos.audit import CampaignAudit, Counts, counted
from tests.chaos.llm_proxy import question
from tests.processors.batch_kit import DEFAULT, box, on_log, seen

FRAMES = 8
MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "north-yard at noon"}]

Log = dict[str, list[Record]]


def a_log() -> Log:
    """Someone walks through a picture four times, each time for two frames, with more than a window between."""
    detections = [
        seen(n, examples.AT + 1_000 * n + 200_000 * (n // 2), box(x=110 * n), camera=examples.CAMERA)
        for n in range(FRAMES)
    ]
    fold = build_batch(DEFAULT, lambda _: None).open(0, "e1", [])
    emits = [emit for n, item in enumerate(detections) for emit in fold.feed(on_log(n, item, 0))]
    batches = [codec.decode_bytes(e.topic, e.value, dict(e.headers)["fp"], Batch) for e in emits]
    late = {item.frame_id for item in detections} - {f.frame_id for batch in batches for f in batch.frames}
    detections = [item for item in detections if item.frame_id not in late]  # those of the window still open
    frames = [
        msgspec.structs.replace(examples.frame, frame_id=d.frame_id, captured_at=d.captured_at) for d in detections
    ]
    contexts = [msgspec.structs.replace(examples.context, batch_id=b.batch_id, batch=b) for b in batches]
    events = [
        msgspec.structs.replace(
            examples.risk_event,
            event_id=ids.event_id(b.batch_id),
            batch_id=b.batch_id,
            camera_id=b.camera_id,
            frame_ids=tuple(frame.frame_id for frame in b.frames),
        )
        for b in batches
    ]
    return {
        "frames": list(frames),
        "detections": list(detections),
        "batches": list(batches),
        "contexts": list(contexts),
        "risk_events": list(events),
    }


def letter_for(place: int, **changes: object) -> DeadLetter:
    detail = json.dumps({"attempts": [{}, {}, {}], "rendered_prompt": json.dumps(MESSAGES)})
    letter = msgspec.structs.replace(
        examples.dead_letter, stage="analyze", origin=ids.origin("contexts", "e1", 0, place), detail=detail
    )
    return msgspec.structs.replace(letter, **changes)


def audit(log: Log, spoiled: int = 0, poisoned: Collection[str] = ()) -> list[str]:
    made = CampaignAudit(load())
    made.records = {topic: [incoming(topic, n, r) for n, r in enumerate(log.get(topic, []))] for topic in STORED}
    return made.check(
        {record.frame_id: record.camera_id for record in a_log()["frames"]}, {question(MESSAGES): spoiled}, poisoned
    )


def incoming(topic: str, offset: int, record: Record) -> Incoming:
    emit = codec.emit(topic, record)
    return Incoming(topic, "e1", 0, offset, emit.key, emit.value, emit.headers)


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_sound_log_has_no_violations():
    log = a_log()
    assert len(log["batches"]) == 3
    assert audit(log) == []


@pytest.mark.parametrize("topic", ["frames", "detections", "batches", "contexts", "risk_events"])
def test_a_record_that_is_lost_or_doubled_is_named(topic: str):
    log = a_log()
    name = getattr(log[topic][1], {"frames": "frame_id", "detections": "frame_id"}.get(topic, "batch_id"))
    whole = log[topic]
    log[topic] = [*whole[:1], *whole[2:]]
    assert any(name in line and line.endswith(" is lost") for line in audit(log)) or topic == "batches"
    assert audit(log) != []
    log[topic] = [*whole, whole[1]]
    assert any(name in line and line.endswith(" is there 2 times") for line in audit(log)) or topic == "batches"
    assert audit(log) != []


def test_a_detection_that_matters_and_is_in_no_batch_is_named():
    log = a_log()
    gone = log["batches"].pop(1)
    assert isinstance(gone, Batch)
    found = audit(log)
    assert all(f"detection {f.frame_id} matters and is lost" in found for f in gone.frames if f.matters)


def test_a_dead_letter_is_explained_by_as_many_bad_answers_as_it_counts():
    log = a_log()
    del log["risk_events"][1]
    log["dead_letters"] = [letter_for(1)]
    assert audit(log, spoiled=3) == []
    assert next(line.split(" contexts")[0] for line in audit(log, spoiled=2)) == "unexplained dead letter analyze"


def test_a_window_has_an_event_or_a_dead_letter_and_never_both():
    log = a_log()
    log["dead_letters"] = [letter_for(1)]
    assert any("came from nowhere" in line for line in audit(log, spoiled=3))
    del log["risk_events"][1]
    log["dead_letters"] = [letter_for(1), letter_for(1)]
    assert any(line.endswith("is there 2 times") for line in audit(log, spoiled=3))


def test_a_dead_letter_of_another_stage_is_never_explained():
    log = a_log()
    log["dead_letters"] = [letter_for(1, stage="detect", origin="frames:e1:0:1")]
    assert any(line.startswith("unexplained dead letter detect") for line in audit(log, spoiled=9))


@pytest.mark.parametrize("topic", ["frames", "detections", "contexts", "risk_events"])
def test_a_camera_out_of_order_is_named(topic: str):
    log = a_log()
    log[topic].reverse()
    assert any("out of order" in line for line in audit(log))


def test_a_window_that_was_never_answered_well_must_have_a_dead_letter():
    log = a_log()
    assert any("was never judged" in line for line in audit(log, poisoned=[question(MESSAGES)]))
    del log["risk_events"][1]
    log["dead_letters"] = [letter_for(1)]
    assert audit(log, spoiled=3, poisoned=[question(MESSAGES)]) == []


def test_a_batch_out_of_order_and_a_record_in_another_partition_are_named():
    log = a_log()
    for topic in ("batches", "contexts", "risk_events"):
        log[topic].reverse()
    assert sum(line.startswith("batches: ") for line in audit(log)) == 2
    made = CampaignAudit(load())
    made.records = {topic: [incoming(topic, n, r) for n, r in enumerate(a_log().get(topic, []))] for topic in STORED}
    made.records["contexts"][1] = made.records["contexts"][1]._replace(partition=3)
    accepted = {record.frame_id: record.camera_id for record in a_log()["frames"]}
    assert made.check(accepted, {}) == ["contexts: contexts:e1:3:1 is in another partition than its camera"]


def test_a_result_that_tells_of_something_else_than_its_batch_is_named():
    log = a_log()
    context, event = log["contexts"][0], log["risk_events"][1]
    log["contexts"][0] = msgspec.structs.replace(context, batch=log["batches"][1])
    log["risk_events"][1] = msgspec.structs.replace(event, frame_ids=event.frame_ids[:1])
    assert [line.split()[0] for line in audit(log)] == ["context", "event"]


def test_lines_are_counted_by_what_they_mean():
    lines = ["frame a is lost", "event b is there 2 times", "frame c is in 2 batches", "unexplained dead letter d e: f"]
    assert counted([*lines, "frame g came from nowhere"]) == Counts(1, 2, 1)


def report(**other: Any) -> Report:
    usual: dict[str, Any] = {"accepted": 7, "counts": {}, "violations": [], "in_flight": {"sink": 0}}
    return Report(**usual | other)


def test_the_products_own_audit_must_find_the_same():
    none = Counts(0, 0, 0)
    assert product.violations(report(), 7, none, 0) == []
    lost = report(counts={"lost": 3}, violations=[Violation("lost", "frames:e1:0:1", "gone")])
    assert [line.removeprefix(product.SAYS) for line in product.violations(lost, 7, none, 0)] == [
        "lost frames:e1:0:1: gone",
        "2 more",
        "lost: 1, and 0 from outside",
    ]
    for spoiled, said in (
        (product.violations(report(), 8, none, 0), "accepted: 7, and 8 from outside"),
        (product.violations(report(), 7, Counts(5, 0, 0), 0), "lost: 0, and 1 from outside"),
        (product.violations(report(), 7, Counts(0, 5, 0), 0), "duplicates: 0, and 1 from outside"),
        (product.violations(report(), 7, none, 1), "dead letters: 0, and 1 from outside"),
        (product.violations(report(in_flight={"sink": 2}), 7, none, 0), "2 in flight before sink after the drain"),
        (product.violations(report(repeated=1), 7, none, 0), "sent again: 1, and 0 from outside"),
    ):
        assert spoiled == [product.SAYS + said]


def test_a_name_that_is_not_of_its_content_is_named():
    log = a_log()
    batch, event = log["batches"][0], log["risk_events"][0]
    log["batches"][0] = msgspec.structs.replace(batch, batch_id="north-yard:made-up")
    log["risk_events"][0] = msgspec.structs.replace(event, event_id="north-yard:made-up")
    assert sum("is misnamed" in line for line in audit(log)) == 2
