"""Where a camera's detections lie that have no typed row any more, and which times they name. Pure.

The table `detections` keeps one row for a frame: of the record that came last. Where another life of the log took a
frame in again, what the earlier life has of it is its record in `log` alone, once the engine has merged the rows.
"""

from array import array
from collections.abc import Sequence

from schemas.records import Detections


class Replaced:
    """One camera's records without a row, in one partition. Add them in the order of their offsets; 24 bytes each."""

    def __init__(self) -> None:
        self._offsets = array("q")
        self._event_times = array("q")
        self._detected = array("q")

    def add(self, offset: int, seen: Detections) -> None:
        """Note one."""
        self._offsets.append(offset)
        self._event_times.append(own_time(seen))
        self._detected.append(seen.detected_at)

    def last(self) -> int:
        """The greatest offset."""
        return self._offsets[-1]

    def first(self, at: int) -> int | None:
        """The first offset of event time `at` (ms since the Unix epoch) or later."""
        times = zip(self._offsets, self._event_times, strict=True)
        return next((offset for offset, time in times if time >= at), None)

    def before(self, at: int, most: int) -> list[int]:
        """The last offsets of event times before `at`, so many at most."""
        times = zip(self._offsets, self._event_times, strict=True)
        return [offset for offset, time in times if time < at][-most:]

    def event_time(self, below: int) -> int | None:
        """The latest event time below an offset."""
        times = zip(self._offsets, self._event_times, strict=True)
        return max((time for offset, time in times if offset < below), default=None)

    def detected(self) -> int:
        """When the first was detected."""
        return min(self._detected)

    def reached(self, times: Sequence[int], hi: int) -> list[int]:
        """For each time the first offset that was detected then or later; else `hi`."""
        return [
            next((o for o, detected in zip(self._offsets, self._detected, strict=True) if detected >= at), hi)
            for at in times
        ]


def own_time(seen: Detections) -> int:
    """When a frame happened by its own account: what a camera's event time is the running maximum of."""
    return seen.arrived_at if seen.captured_at is None else min(seen.captured_at, seen.arrived_at)
