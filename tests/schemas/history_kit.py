"""A small history in ClickHouse: two windows judged live and again in replays, prompts and cameras that changed.

It goes by minutes from 2026-11-02 10:00 UTC on.
"""

import asyncio
import secrets
from datetime import UTC, datetime

import msgspec

from processors.replay.plan import Change, Llm, Plan, Scope
from processors.sink.stage import SinkStage
from processors.sink.store import ClickHouseStore
from processors.store.settings import ClickHouseSettings
from schemas import ids
from schemas.records import DeadLetter, PromptRecord, Replay, ReplayEvent, ReplayUnit, RiskEvent
from streams import codec
from streams.messages import Incoming
from streams.stages import Range
from tests import examples

AT = 1_793_613_600_000
"""2026-11-02 10:00 UTC: minute 0 of the story."""

PLAIN, STRICT, OLD_STRICT = "a1" * 16, "b2" * 16, "b9" * 16
FIRST, SECOND, MADE = (f"front:{digit * 32}" for digit in "123")
"""Two windows of the live road, and one that only a cut has made."""


def minute(n):
    """Milliseconds since the Unix epoch."""
    return AT + int(n * 60_000)


def clock(n):
    """The same as people write it."""
    return datetime.fromtimestamp(minute(n) / 1000, UTC).isoformat()


def verdict(batch, at, score, *, run=ids.LIVE, prompt=PLAIN) -> RiskEvent:
    levels = ((85, "critical"), (60, "high"), (30, "medium"), (0, "low"))
    return msgspec.structs.replace(
        examples.risk_event,
        event_id=ids.event_id(batch, run),
        batch_id=batch,
        camera_id="front",
        run=run,
        started_at=AT,
        ended_at=AT + 5000,
        risk_score=score,
        risk_level=next(level for least, level in levels if score >= least),
        summary=f"{score} in {run}",
        prompt_digest=prompt,
        prompt_tokens=300,
        completion_tokens=50,
        inference_ms=1500.0,
        judged_at=minute(at),
    )


def again(run, batch, at, score, *, prompt, reused=False) -> ReplayEvent:
    event = verdict(batch, at, score, run=run, prompt=prompt)
    return ReplayEvent(
        replay_id=run,
        unit_id=f"{run}:{batch}",
        event_id=event.event_id,
        camera_id="front",
        reused=reused,
        event=event,
    )


def version(digest, name, at) -> PromptRecord:
    return msgspec.structs.replace(examples.prompt, digest=digest, name=name, created_at=minute(at), evidence="")


def pointer(scope, digest, at, comment="", evidence="") -> PromptRecord:
    return PromptRecord(
        kind="active",
        digest=digest,
        scope=scope,
        name="",
        template="",
        output_schema="",
        parameters="",
        comment=comment,
        created_at=minute(at),
        evidence=evidence,
    )


def setting(camera, name, at):
    return msgspec.structs.replace(examples.camera, camera_id=camera, name=name, updated_at=minute(at))


def window(batch, name):
    inner = msgspec.structs.replace(examples.batch, batch_id=batch, camera_id="front", started_at=AT)
    return msgspec.structs.replace(
        examples.context, batch_id=batch, camera_id="front", camera_name=name, batch=inner, time_zone="Europe/Berlin"
    )


def label(event_id, says, at, author="kim"):
    return msgspec.structs.replace(
        examples.label,
        label_id=f"{event_id}{at}",
        camera_id="front",
        verdict=says,
        event_id=event_id,
        author=author,
        labelled_at=minute(at),
    )


PLANS = {
    "r1": Plan(
        kind="change",
        scope=Scope(since=minute(-60), cameras=("front",), where="risk_score > 50", sample=500),
        change=Change(prompt=STRICT, llm=Llm(url="http://gpu:8091", model="nano")),
        share=0.5,
        max_tokens=9000,
        baseline="r2",
        windows=3,
    ),
    "r2": Plan(kind="baseline", mode="strict"),
    "r3": Plan(kind="change", change=Change(prompt=STRICT)),
    "r4": Plan(kind="change", change=Change(threshold=0.7, max_ms=60_000), frames=40),
    "s1": Plan(kind="shadow", change=Change(prompt=STRICT), share=0.2),
}


def step(replay, state, at, detail=""):
    return Replay(
        replay_id=replay,
        name=f"name of {replay}",
        state=state,
        plan=PLANS[replay].encode(),
        updated_at=minute(at),
        detail=detail,
    )


def unit(replay, batch):
    return ReplayUnit(
        unit_id=f"{replay}:{batch}", replay_id=replay, camera_id="front", kind="judge", payload=b"", created_at=AT
    )


def letter(origin, key):
    return DeadLetter(
        origin=origin,
        camera_id="front",
        stage="replay",
        kind="error",
        error="UnusableError",
        message="no JSON",
        attempt=1,
        key=key,
        headers={},
        detail="",
        failed_at=minute(8),
    )


STORY = (
    (
        "prompts",
        "e1",
        [
            version(PLAIN, "plain", 0),
            version(OLD_STRICT, "strict", 0.5),
            pointer("default", PLAIN, 1, "to begin with"),
            version(STRICT, "strict", 1.5),
            pointer("front", STRICT, 2, "too many alarms", "r1"),
            # By a machine whose clock is behind.
            pointer("shed", STRICT, 3),
            pointer("shed", PLAIN, 2.5),
            pointer("front", "", 4),
            pointer("default", STRICT, 5),
        ],
    ),
    ("cameras", "e1", [setting("front", "Front", 1), setting("yard", "Yard", 2), setting("front", "Main gate", 3)]),
    ("contexts", "e1", [window(FIRST, "Front"), window(SECOND, "Main gate")]),
    ("risk_events", "e1", [verdict(FIRST, 2.5, 72), verdict(SECOND, 6, 20, prompt=STRICT)]),
    (
        "labels",
        "e1",
        [
            label(ids.event_id(FIRST), "false_alarm", 3),
            label(ids.event_id(FIRST), "true_alarm", 9, author="jo"),
            label(ids.event_id(SECOND, "r1"), "false_alarm", 7.6),
        ],
    ),
    (
        "replays",
        "e1",
        [
            *(step(replay, "planned", 6.5) for replay in PLANS),
            step("r1", "running", 6.6, "here"),
            step("r1", "done", 8.5, "1 judged"),
            step("s1", "running", 6.6),
        ],
    ),
    ("replay_units", "e1", [unit("r1", FIRST), unit("r1", SECOND), unit("r1", MADE), unit("r2", FIRST)]),
    (
        "replay_events",
        "e1",
        [
            again("r1", FIRST, 7, 40, prompt=STRICT),
            again("r1", SECOND, 7.4, 25, prompt=STRICT),
            again("r2", FIRST, 7.5, 70, prompt=PLAIN),
            again("r3", FIRST, 7, 40, prompt=STRICT, reused=True),
            again("r4", MADE, 7.8, 90, prompt=PLAIN),
            again("s1", SECOND, 7.9, 61, prompt=PLAIN),
        ],
    ),
    (
        "dead_letters",
        "e1",
        [
            # One failed for good, one had its verdict when it was redriven, one is a shadow's.
            letter("replay_units:e1:0:2", f"r1:{MADE}".encode()),
            letter("replay_units:e1:0:1", f"r1:{SECOND}".encode()),
            letter(f"s1:{FIRST}", None),
        ],
    ),
    # The topics were made anew: what had been in force is forgotten.
    ("prompts", "e2", [version(PLAIN, "plain", 11), pointer("default", PLAIN, 11)]),
    ("cameras", "e2", [setting("yard", "Court", 11)]),
)


async def sunk(settings, topic, life, records, first=0):
    """Through the real sink."""
    made = [codec.emit(topic, record) for record in records]
    found = [Incoming(topic, life, 0, first + n, one.key, one.value, one.headers) for n, one in enumerate(made)]
    store = ClickHouseStore(settings)
    await SinkStage(store).insert(Range(topic, life, 0, first, first + len(found) - 1), found)
    await store.close()


def told(clickhouse_url) -> ClickHouseSettings:
    """A new database that was told the story, some of it twice."""
    made = ClickHouseSettings(url=clickhouse_url, database=f"t_{secrets.token_hex(6)}")

    async def main():
        store = ClickHouseStore(made)
        await store.migrate()
        await store.close()
        for topic, life, records in STORY:
            await sunk(made, topic, life, records)
            if topic in {"risk_events", "replay_events", "labels"}:
                await sunk(made, topic, life, records, first=100)

    asyncio.run(main())
    return made
