"""What becomes of redriven records: looked up behind the fence, settled in the transaction that has their results.

A redriven record is an ordinary one of its stage's input, with the bytes of a dead letter and a header naming the
letter's origin. It may be there more than once: people ask twice, and at the same time. So whether it is done is
read from `dead_letter_status`, where only the owner of the origin's partition says `resolved`, in the transaction
that has the results. Behind the fence no predecessor says anything any more: what was read then, with what this owner
says itself, is all there is.
"""

import asyncio
from collections.abc import Sequence

import structlog
from aiokafka import TopicPartition

from schemas import ids
from schemas.records import DeadLetterStatus
from streams import codec
from streams.delivery import Ownership
from streams.messages import ATTEMPTS, REDRIVE, Emit, Headers, Incoming

log = structlog.get_logger(__name__)

STATUS = "dead_letter_status"
OPEN = "open"
"""It was redriven and failed again."""
RESOLVED = "resolved"
REDRIVEN = "redriven"
"""Its bytes were appended again; the stage has not met them yet."""


def again(
    place: ids.Place, attempts: int, *, key: bytes | None, value: bytes | None, headers: Headers, by: str, at: int
) -> tuple[Emit, Emit]:
    """What redrives the dead letter of a place on the log: the record there as it first was, and the status.

    `attempts` is how often it was tried, `by` who redrives it, `at` ms since the Unix epoch.
    """
    marks = ((REDRIVE, str(place).encode()), (ATTEMPTS, str(attempts).encode()))
    record = Emit(place.topic, key, value, (*headers, *marks), place.partition)
    return record, redriven(str(place), by, at)


def redriven(origin: str, by: str, at: int) -> Emit:
    """The status of a dead letter whose bytes are on their way again."""
    return codec.emit(STATUS, DeadLetterStatus(origin=origin, status=REDRIVEN, by=by, at=at), 0)


class Redrives:
    """What one owner of one input partition knows of that partition's redriven records.

    A stage that folds is fed again what stands behind its position. So a record that was settled before is not
    always a repetition: the status names the record that it is due to, and that one is processed again, alone.
    """

    def __init__(self, ownership: Ownership, *, theirs: bool = False) -> None:
        """Know nothing yet; `theirs`: the topic is another stage's, and so is whatever is redriven there."""
        self._ownership = ownership
        self._theirs = theirs
        self._known: dict[str, DeadLetterStatus] | None = None
        self._reading = asyncio.Lock()

    def forget(self) -> None:
        """Acquired anew: what a commit of unknown outcome said is read when it is needed."""
        self._known = None

    async def is_done(self, record: Incoming) -> bool:
        """Whether nothing is to be made of a redriven record any more. Reads the topic at the first one.

        Raises:
            KafkaError, TimeoutError or OSError: it cannot be read now.
            UnknownSchemaError: a newer version wrote there, and may have resolved it.
        """
        if self._theirs:
            return True
        async with self._reading:
            if self._known is None:
                known: dict[str, DeadLetterStatus] = {}
                for one in await self._ownership.kafka.read([TopicPartition(STATUS, 0)]):
                    status = codec.decode_state(one, DeadLetterStatus)
                    if status is not None and self._is_ours(status):
                        held = known.get(status.origin)
                        known[status.origin] = held if held is not None and held.status == RESOLVED else status
                self._known = known
        return self._is_done(record)

    def settled(self, record: Incoming, results: Sequence[Emit]) -> Sequence[Emit]:
        """What to append for a record, given what was made of it; in the order of the records.

        For a redriven one nothing where it is done, else its results and the status that they mean.
        """
        origin = record.redriven
        if origin is None:
            return results
        if self._theirs:
            return []
        assert self._known is not None, "`is_done` was asked before"
        if self._is_done(record):  # by one before it, since it was begun
            log.info("redrive", origin=origin, record=record.origin, status="done before")
            return []
        known = self._known.get(origin)
        if known is not None and known.status == RESOLVED:
            return results  # fed again; the status is there
        failed = any(emit.topic == "dead_letters" for emit in results)
        status = DeadLetterStatus(
            origin=origin,
            status=OPEN if failed else RESOLVED,
            by=self._ownership.stage,
            at=self._ownership.now_ms(),
            record=record.origin,
        )
        self._known[origin] = status
        log.info("redrive", origin=origin, record=record.origin, status=status.status)
        return [*results, codec.emit(STATUS, status, 0)]

    def _is_done(self, record: Incoming) -> bool:
        known = self._known.get(record.redriven or "") if self._known is not None else None
        if known is None or known.record is None:
            return False
        if known.status == RESOLVED:
            return known.record != record.origin
        # It failed, and so did this record, unless it came later: each is settled in turn.
        last = ids.place(known.record)
        return (
            last is not None
            and last[:3] == (record.topic, record.epoch, record.partition)
            and record.offset <= last.offset
        )

    def _is_ours(self, status: DeadLetterStatus) -> bool:
        """Whether this stage says it, of an origin of this partition."""
        tp, origin = self._ownership.tp, ids.place(status.origin)
        ours = status.by == self._ownership.stage and status.record is not None
        return ours and origin is not None and origin[::2] == (tp.topic, tp.partition)
