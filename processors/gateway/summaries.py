"""What lists show of events. A verdict never changes, so what was once read of one is remembered; labels are not."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

from processors.gateway.detail import image_address, label_of
from processors.gateway.labels import Labels, newest
from processors.gateway.models import EventSummary
from processors.gateway.reads import Reads
from processors.store.queries import Row

# About 1 KB each. ClickHouse reads thousands of rows for each one that is looked up by id: the first page costs
# what is measured in tens of milliseconds there, and nothing when it is asked for again.
_REMEMBERED = 10_000

_COPIED = (
    *("event_id", "camera_id", "started_at", "ended_at", "judged_at", "risk_score", "risk_level", "summary"),
    *("recommended_action", "frames", "model"),
)


class Summaries:
    """Summaries by event id."""

    def __init__(self, reads: Reads, labels: Labels) -> None:
        self._reads = reads
        self._labels = labels
        self._known: OrderedDict[str, EventSummary] = OrderedDict()

    async def of(self, event_ids: Sequence[str]) -> list[EventSummary]:
        """The summaries of these events, in order; one that is not there is left out."""
        if not event_ids:
            return []
        known = {event_id: self._known[event_id] for event_id in event_ids if event_id in self._known}
        fresh, stored = await asyncio.gather(
            self._read([event_id for event_id in event_ids if event_id not in known]),
            self._reads.labels_on(event_ids),
        )
        known |= fresh
        labels = newest(self._labels.with_given(map(label_of, stored), lambda label: label.event_id in known))
        return [
            known[event_id].model_copy(update={"label": labels[event_id].verdict if event_id in labels else None})
            for event_id in event_ids
            if event_id in known
        ]

    async def _read(self, event_ids: Sequence[str]) -> dict[str, EventSummary]:
        batch_ids = [event_id.rsplit(":", 1)[0] for event_id in event_ids]  # see schemas.ids.event_id
        rows, names, covers = await asyncio.gather(
            self._reads.summaries(event_ids), self._reads.names(batch_ids), self._reads.covers(batch_ids)
        )
        made = {event_id: _summary(row, names.get(row["batch_id"]), covers) for event_id, row in rows.items()}
        for event_id, row in rows.items():
            # The sink brings topics side by side: what is not there yet may come.
            if row["batch_id"] in names and row["batch_id"] in covers:
                self._known[event_id] = made[event_id]
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return made


def _summary(row: Row, names: Row | None, covers: dict[str, str]) -> EventSummary:
    cover = covers.get(row["batch_id"])
    return EventSummary(
        **{name: row[name] for name in _COPIED},
        camera_name=(names["camera_name"] if names else "") or row["camera_id"],
        time_zone=names["time_zone"] if names else "UTC",
        cover=image_address(row["camera_id"], cover) if cover is not None else None,
    )
