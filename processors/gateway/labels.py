"""Labels as the page shows them: what ClickHouse has, and what this process gave, seen at once by whoever gave it."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime

from processors.gateway.models import Label
from schemas import records
from streams.labels import LabelLog

# How many labels this process gave are remembered: more than people give while a sink is away for a day.
_REMEMBERED = 10_000

_TIMES = ("started_at", "ended_at", "labelled_at")


class Labels:
    """The page's way to the log of labels, and what this process put there."""

    def __init__(self, labels: LabelLog) -> None:
        self._log = labels
        self._given: OrderedDict[str, Label] = OrderedDict()

    async def append(self, label: Label) -> Label:
        """Put a label on the log, named by its content; what is returned is there. See `LabelLog.append`.

        Raises:
            UnavailableError: the broker is away; then it is not there, or not known to be.
        """
        given = _shown(await self._log.append(_record(label)))
        self._given[given.label_id] = given
        while len(self._given) > _REMEMBERED:
            self._given.popitem(last=False)
        return given

    def with_given(self, stored: Iterable[Label], wanted: Callable[[Label], bool]) -> list[Label]:
        """What ClickHouse has and what this process gave, where wanted; newest first, each once.

        The sink stores a label a moment after it was given, or much later, where it is away.
        """
        found: dict[str, Label] = {label.label_id: label for label in self._given.values() if wanted(label)}
        found |= {label.label_id: label for label in stored}
        return sorted(found.values(), key=lambda label: (label.labelled_at, label.label_id), reverse=True)


def newest(labels: Iterable[Label]) -> Mapping[str, Label]:
    """The newest label of each event."""
    found: dict[str, Label] = {}
    for label in labels:
        event_id = label.event_id or ""
        if event_id not in found or label.labelled_at > found[event_id].labelled_at:
            found[event_id] = label
    return found


def _record(label: Label) -> records.Label:
    return records.Label(**label.model_dump() | {name: _ms(getattr(label, name)) for name in _TIMES})


def _shown(label: records.Label) -> Label:
    plain = {name: getattr(label, name) for name in Label.model_fields}
    return Label(**plain | {name: datetime.fromtimestamp(plain[name] / 1000, UTC) for name in _TIMES})


def _ms(at: datetime) -> int:
    return round(at.timestamp() * 1000)
