"""One event with all that it was made from: three frames, one in the image store, in ClickHouse as the sink has it."""

import asyncio
import hashlib
import io
import secrets
from contextlib import aclosing
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
from PIL import Image

from infra.export.evidence import Evidence, gather
from processors.batch.core import settings_digest
from processors.store.queries import Queries
from processors.store.settings import ClickHouseSettings
from schemas import ids, prompts
from schemas.records import Frame, Record, RiskEvent
from streams.claims import ClaimStore
from streams.messages import Incoming
from tests import examples
from tests.processors.planner_kit import verdict
from tests.processors.recorded_kit import on_log, put

CAMERA = "gate"
HOSTILE = "<script>alert(1)</script>\x1b[2J"
"""What a camera's name and a model's summary may hold."""


class Site(NamedTuple):
    """Where the event is kept."""

    settings: ClickHouseSettings
    images: Path
    event: RiskEvent


def picture(n: int) -> bytes:
    """A JPEG, each of another colour."""
    out = io.BytesIO()
    Image.new("RGB", (640, 360), (40 * n, 90, 160)).save(out, "JPEG")
    return out.getvalue()


def story() -> dict[str, list[Record]]:
    """The event's records by topic."""
    shots = [picture(n) for n in range(3)]
    frames = [_frame(n, shot) for n, shot in enumerate(shots)]
    [seen] = examples.batch.frames
    window = msgspec.structs.replace(
        examples.batch,
        batch_id=ids.batch_id(CAMERA, [frame.frame_id for frame in frames]),
        camera_id=CAMERA,
        ended_at=examples.AT + 2000,
        frames=tuple(
            msgspec.structs.replace(seen, frame_id=frame.frame_id, offset=n, event_at=examples.AT + n * 1000)
            for n, frame in enumerate(frames)
        ),
        settings_digest=settings_digest(examples.window),
    )
    context = msgspec.structs.replace(
        examples.context, batch_id=window.batch_id, camera_id=CAMERA, batch=window, camera_name=HOSTILE
    )
    event = verdict(context, "live", summary=HOSTILE, rendered_prompt='[{"role":"user","content":"A window: é"}]')
    return {
        "frames": list(frames),
        "detections": [
            msgspec.structs.replace(examples.detections, frame_id=frame.frame_id, camera_id=CAMERA) for frame in frames
        ],
        "batches": [window],
        "contexts": [context],
        "risk_events": [event],
        "prompts": [prompts.default().to_record(examples.AT - 1)],
        "cameras": [msgspec.structs.replace(examples.RECORDS["cameras"], camera_id=CAMERA, window=examples.window)],
    }


def _frame(n: int, shot: bytes) -> Frame:
    sha256 = hashlib.sha256(shot).hexdigest()
    at = examples.AT + n * 1000 if n else None  # the first has no time of capture
    return msgspec.structs.replace(
        examples.frame,
        frame_id=ids.frame_id(CAMERA, sha256, at),
        camera_id=CAMERA,
        sha256=sha256,
        size=len(shot),
        captured_at=at,
        image=shot if n < 2 else None,
        claim=None if n < 2 else f"sha256:{sha256}",
    )


async def keep(settings: ClickHouseSettings, images: Path, without: tuple[str, ...] = ()) -> RiskEvent:
    """Put the story into ClickHouse and the image store; topics in `without` have their typed rows alone."""
    records = story()
    put_in: list[list[Incoming]] = [on_log(topic, found) for topic, found in records.items()]
    await put(settings, *put_in)
    await ClaimStore(str(images)).put(picture(2))
    async with httpx.AsyncClient(timeout=60) as client:
        for topic in without:
            query = f"DELETE FROM {settings.database}.log WHERE topic = '{topic}'"
            (await client.post(settings.url, params={"query": query})).raise_for_status()
    [event] = records["risk_events"]
    assert isinstance(event, RiskEvent)
    return event


def site(url: str, directory: Path, without: tuple[str, ...] = ()) -> Site:
    """The story in a database of its own."""
    settings = ClickHouseSettings(url=url, database=f"t_{secrets.token_hex(6)}")
    return Site(settings, directory, asyncio.run(keep(settings, directory, without)))


def evidence(site: Site) -> Evidence:
    """What is kept of the event there."""

    async def main() -> Evidence:
        async with aclosing(Queries(site.settings)) as store:
            [row] = await store.events_like(site.event.event_id, limit=2)
            return await gather(store, ClaimStore(str(site.images)), await store.made_from(row))

    return asyncio.run(main())
