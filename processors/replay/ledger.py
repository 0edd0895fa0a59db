"""What the log says of one replay: which of its units there are, and what became of them. Pure."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

import structlog

from schemas import ids
from schemas.records import DeadLetter, ReplayEvent
from streams import codec
from streams.codec import DecodeError
from streams.messages import Incoming

log = structlog.get_logger(__name__)

STAGE = "replay"
"""The stage that judges units, as its dead letters name it."""

AWAY = ", the LLM of replay "
"""What a unit's dead letter says where nothing is wrong with the unit: with its LLM back it can be judged."""

_FAILURES = 100
"""Failed units whose message is kept."""


class Letter(NamedTuple):
    """The dead letter of a unit."""

    place: ids.Place
    """Where the unit lies."""
    attempt: int
    """How often it was tried until then."""


class Ledger:
    """Which units and results of one replay there are, as records tell. A record that is read twice counts once."""

    def __init__(self, replay_id: str) -> None:
        self._id = replay_id
        self._mark = replay_id.encode()
        self._prefix = f"{replay_id}:"
        self.waiting: set[str] = set()
        """Batch ids of units without a result."""
        self.judged: set[str] = set()
        self.reused: set[str] = set()
        self.failed: dict[str, str] = {}
        """Batch ids of units that could not be judged, and why; later ones have no message."""
        self.away: dict[str, Letter] = {}
        """Those of them whose LLM was away: they can be made again."""
        self.tokens = 0
        self._tried: dict[str, int] = {}
        """Batch ids of units that failed, and how often they had been tried then."""
        self._redriven: dict[str, int] = {}
        """Batch ids of units that are on the log again, and how often they had been tried before."""

    def __len__(self) -> int:
        """How many results there are."""
        return len(self.judged) + len(self.reused) + len(self.failed)

    def known(self, batch_id: str) -> bool:
        """Whether nothing needs to be appended for this window."""
        return batch_id in self.waiting or self.finished(batch_id)

    def finished(self, batch_id: str) -> bool:
        """Whether the window has a result."""
        return batch_id in self.judged or batch_id in self.reused or batch_id in self.failed

    def expect(self, batch_ids: Collection[str]) -> None:
        """Units of these windows were appended."""
        self.waiting.update(batch_id for batch_id in batch_ids if not self.finished(batch_id))

    def forget(self, batch_id: str) -> None:
        """A unit that failed is to be made again."""
        self.failed.pop(batch_id, None)
        self.away.pop(batch_id, None)

    def remember(self, results: Iterable[tuple[str, bool, int]]) -> None:
        """Results that the log has forgotten: batch id, whether it was reused, and tokens.

        A unit without a result that the log has forgotten too nobody will judge: it is not known, and made again.
        """
        for batch_id, reused, tokens in results:
            if not self.finished(batch_id):
                self.waiting.discard(batch_id)
                (self.reused if reused else self.judged).add(batch_id)
                self.tokens += 0 if reused else tokens

    def take(self, record: Incoming) -> bool:
        """Learn from a record of any of `TOPICS`; whether it is a result that was not known."""
        if record.value is None or (self._mark not in record.value and self._mark not in (record.key or b"")):
            return False  # another replay's: not worth decoding
        try:
            if record.topic == "replay_units":
                self._unit(self._of((record.key or b"").decode()), record.attempts)
                return False
            if record.topic == "replay_events":
                return self._result(codec.decode(record, ReplayEvent))
            return self._letter(codec.decode(record, DeadLetter))
        except (DecodeError, UnicodeDecodeError) as error:
            log.warning("record skipped", origin=record.origin, error=str(error))
            return False

    def _of(self, unit_id: str) -> list[str]:
        """The batch id of a unit of this replay that is to be judged, in a list."""
        return [unit_id.removeprefix(self._prefix)] if unit_id.startswith(self._prefix) else []

    def _unit(self, batch_ids: Collection[str], tried: int) -> None:
        """A unit; one that was `tried` before is there again, and a letter of then says nothing any more."""
        for batch_id in batch_ids if tried else ():
            self._redriven[batch_id] = max(tried, self._redriven.get(batch_id, 0))
            if self._tried.get(batch_id, tried + 1) <= tried:
                self.forget(batch_id)
        self.expect(batch_ids)

    def _result(self, event: ReplayEvent) -> bool:
        if event.replay_id != self._id:
            return False
        batch_id = event.event.batch_id
        if batch_id in self.judged or batch_id in self.reused:
            return False
        self.waiting.discard(batch_id)
        self.forget(batch_id)  # it was redriven
        if event.reused:
            self.reused.add(batch_id)
        else:
            self.judged.add(batch_id)
            self.tokens += event.event.prompt_tokens + event.event.completion_tokens
        return True

    def _letter(self, letter: DeadLetter) -> bool:
        if letter.stage != STAGE or letter.key is None:
            return False
        new = False
        for batch_id in self._of(letter.key.decode()):
            self._tried[batch_id] = max(letter.attempt, self._tried.get(batch_id, 0))
            before = letter.attempt <= self._redriven.get(batch_id, 0)  # it is on the log again since
            if before or batch_id in self.judged or batch_id in self.reused:
                continue
            new = new or batch_id not in self.failed
            self.waiting.discard(batch_id)
            self.forget(batch_id)
            self.failed[batch_id] = letter.message if len(self.failed) < _FAILURES else ""
            place = ids.place(letter.origin)
            if AWAY in letter.message and place is not None:
                self.away[batch_id] = Letter(place, letter.attempt)
        return new
