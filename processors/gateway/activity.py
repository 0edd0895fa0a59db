"""What a camera did: its card, its hours, its gaps. Pure: rows in, models out."""

from collections.abc import Mapping
from datetime import datetime, timedelta

from processors.gateway.detail import image_address
from processors.gateway.models import CameraCard, CameraName, Gap, Hour
from processors.gateway.reads import Pauses
from processors.store.queries import Row

# A camera is silent, and a pause is a gap, from this on: shorter ones are a person's errand or a camera's restart.
LEAST_GAP = timedelta(minutes=5)
_TIMES_USUAL = 10


def name(known: Row) -> CameraName:
    """A camera's name, from what is set for it: its id where nothing is."""
    camera_id = known["camera_id"]
    return CameraName(camera_id=camera_id, name=known["name"] or camera_id, time_zone=known["time_zone"])


def card(known: CameraName, *, last: Row | None, frames: int, events: Row, now: datetime) -> CameraCard:
    """A camera's card, from its name, its newest frame, and its last 24 hours' frames and events."""
    usual = timedelta(milliseconds=float(last["pause_ms"])) if last else timedelta(0)
    return CameraCard(
        **known.model_dump(),
        last_frame_at=last["last_at"] if last else None,
        last_taken_at=last["taken_at"] if last else None,
        last_image=image_address(known.camera_id, last["sha256"]) if last else None,
        frames_24h=frames,
        events_24h=events.get("events", 0),
        top_level_24h=events.get("top_level"),
        silent=last is None or now - last["last_at"] > max(LEAST_GAP, _TIMES_USUAL * usual),
    )


def hours(since: datetime, until: datetime, found: Mapping[datetime, Row]) -> list[Hour]:
    """Every hour that the span touches, in order."""
    hour = since.replace(minute=0, second=0, microsecond=0)
    made = []
    while hour < until:
        row = found.get(hour, {})
        made.append(
            Hour(
                hour=hour,
                frames=row.get("frames", 0),
                detections=row.get("detections", {}),
                windows=row.get("windows", 0),
                events=row.get("events", 0),
                top_level=row.get("top_level"),
            )
        )
        hour += timedelta(hours=1)
    return made


def gaps(pauses: Pauses, since: datetime, until: datetime, now: datetime) -> list[Gap]:
    """The gaps of a span, cut to it; before a camera's first frame there is none."""
    limit = max(LEAST_GAP, _TIMES_USUAL * pauses.median)
    found = []
    if pauses.first is not None and pauses.before is not None and pauses.first - pauses.before > limit:
        found.append(Gap(started_at=max(pauses.before, since), ended_at=pauses.first))
    found += [Gap(started_at=started_at, ended_at=ended_at) for started_at, ended_at in pauses.long]
    last = pauses.last or pauses.before
    if last is not None and (pauses.after or now) - last > limit:
        goes_on = pauses.after is None and until >= now
        found.append(Gap(started_at=max(last, since), ended_at=None if goes_on else min(pauses.after or until, until)))
    return found
