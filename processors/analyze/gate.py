"""The gate that every call to an LLM server passes: who works where, in which order, and who gives way.

Live work comes before shadow, shadow before replay, and within a class whoever came first. Each call gets a slot of
one place (a server): the least busy of those that it may use. When a live call finds no slot, the youngest replay
call is cancelled, which frees its slot, and stands in the queue again where it stood.
"""

import asyncio
from bisect import insort
from collections.abc import Callable, Collection, Coroutine, Hashable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Priority(IntEnum):
    """Whose work it is; the lowest comes first."""

    LIVE = 0
    SHADOW = 1
    REPLAY = 2


class ClosedError(Exception):
    """Every place that the call could use has closed."""


class BusyError(Exception):
    """No slot came in the time that the call had for it."""


class Urgency:
    """Whose work a call is, where a more urgent one may come to wait for it (`Gate.hasten`)."""

    def __init__(self, priority: Priority) -> None:
        self.priority = priority


class Held(NamedTuple):
    """What a call got."""

    place: str
    queued_ms: float
    """From asking until it had this slot; what it did in a slot that it lost again is part of it."""


@dataclass(eq=False, slots=True)
class _Place:
    """A server's slots."""

    slots: int
    open: bool = False
    busy: int = 0
    prefixes: list[Hashable] = field(default_factory=list)
    """What its slots worked on last, the newest at the end: a server keeps each slot's prompt until the next one."""


@dataclass(eq=False, slots=True)
class _Call:
    """One call, waiting or at work."""

    urgency: Urgency
    ticket: int
    among: frozenset[str]
    alone: bool
    prefix: Hashable
    turn: "asyncio.Future[None]"
    place: str = ""
    """Where it works; of one that waits to be alone, where it will."""
    need: int = 1
    task: "asyncio.Task[Any] | None" = None
    gives_way: bool = False

    @property
    def priority(self) -> Priority:
        return self.urgency.priority

    @property
    def order(self) -> tuple[Priority, int]:
        return self.priority, self.ticket


class Gate:
    """Slots of several places.

    Args:
        clock: seconds, monotonic.
        live_alone: no replay call works where a live one does: each that is in hand gives way as one comes, also where
            there is a slot. A server that shares its CPU among its slots would make both slower.
    """

    def __init__(self, clock: Callable[[], float], *, live_alone: bool = False) -> None:
        self._clock = clock
        self._live_alone = live_alone
        self._places: dict[str, _Place] = {}
        self._waiting: list[_Call] = []
        self._working: list[_Call] = []
        self._tickets = 0

    def expect(self, place: str, slots: int) -> None:
        """There will be a place of about so many slots; it is closed yet."""
        self._places[place] = _Place(slots)

    def open(self, place: str, slots: int) -> None:
        """The place is there, with so many slots. Where more are held, none is given until enough are back."""
        there = self._places[place]
        if not there.open or there.slots != slots:
            there.slots, there.open = slots, True
            self._serve()

    def close(self, place: str) -> None:
        """Give no more slots of the place. Who works there goes on; who waits and could use no other is told so."""
        self._places[place].open = False
        for call in [call for call in self._waiting if not self._usable(call)]:
            self._waiting.remove(call)
            if not call.turn.done():
                call.turn.set_exception(_closed(call))
        self._serve()

    @property
    def slots(self) -> int:
        """Slots of all places, as far as known."""
        return sum([place.slots for place in self._places.values()])

    @property
    def busy(self) -> int:
        """Slots that are held."""
        return sum([place.busy for place in self._places.values()])

    async def run(
        self,
        work: Callable[[Held], Coroutine[Any, Any, T]],
        *,
        among: Collection[str],
        priority: Priority | Urgency = Priority.LIVE,
        alone: bool = False,
        prefix: Hashable = None,
        patience_s: float | None = None,
    ) -> T:
        """Do the work with a slot in hand, in a task of its own, and give what it gives.

        A replay call that gives way has that task cancelled; in its next slot the work is called anew, from the
        beginning. Whoever cancels the caller ends both.

        Args:
            work: What to do.
            among: The places that will do.
            priority: Whose work it is; an `Urgency` where that may change.
            alone: Hold every slot of the place.
            prefix: Names what its prompt begins with. Of equally busy places one that worked on it last is taken.
            patience_s: How long to wait for a slot, each time it needs one; None: without limit.

        Raises:
            ClosedError: every one of the places is closed, or closed while it waited. Nothing was done.
            BusyError: it waited for so long. Nothing is left of what was done before it gave way.
        """
        began = self._clock()
        self._tickets += 1
        ticket = self._tickets
        urgency = priority if isinstance(priority, Urgency) else Urgency(priority)
        while True:
            turn = asyncio.get_running_loop().create_future()
            call = _Call(urgency, ticket, frozenset(among), alone, prefix, turn)
            try:
                async with asyncio.timeout(patience_s):
                    await self._enter(call)
            except TimeoutError as error:
                raise BusyError(f"no slot for {patience_s:g} s") from error
            try:
                if not call.gives_way:  # else between its turn and now a live call came
                    held = Held(call.place, (self._clock() - began) * 1000)
                    call.task = asyncio.create_task(work(held))
                    return await call.task  # type: ignore[no-any-return]
            except asyncio.CancelledError:
                caller = asyncio.current_task()
                if not call.gives_way or (caller is not None and caller.cancelling()):
                    raise
            finally:
                self._leave(call)

    def hasten(self, urgency: Urgency, priority: Priority) -> None:
        """From now on the call of this urgency is work of that priority, if that comes before its own."""
        if priority < urgency.priority:
            urgency.priority = priority
            self._waiting.sort(key=lambda one: one.order)
            self._serve()

    async def _enter(self, call: _Call) -> None:
        if not self._usable(call):
            raise _closed(call)
        insort(self._waiting, call, key=lambda one: one.order)
        self._serve()
        try:
            await call.turn
        except asyncio.CancelledError:
            if call in self._waiting:
                self._waiting.remove(call)
                self._serve()  # who waited behind it may fit now
            elif call in self._working:  # it was its turn already
                self._leave(call)
            raise

    def _leave(self, call: _Call) -> None:
        self._working.remove(call)
        self._places[call.place].busy -= call.need
        self._serve()

    def _serve(self) -> None:
        """Give each free slot to the first in order that can use it.

        One that waits to be alone keeps those behind it out of its place.
        """
        kept: set[str] = set()
        for call in [call for call in self._waiting if not call.turn.done()]:  # others were cancelled just now
            call.place = ""
            names = [name for name in self._usable(call) if name not in kept and not self._is_lives(name, call)]
            names.sort(key=lambda name: self._load(name, call))
            if names and self._fits(call, names[0]):  # where the least busy has no room, none has
                self._begin(call, names[0])
            elif names and call.alone:
                call.place = names[0]
                kept.add(names[0])
        self._make_room()

    def _begin(self, call: _Call, name: str) -> None:
        place = self._places[name]
        call.place, call.need = name, place.slots if call.alone else 1
        place.busy += call.need
        place.prefixes = [*place.prefixes, call.prefix][-place.slots :]
        self._waiting.remove(call)
        self._working.append(call)
        call.turn.set_result(None)

    def _is_lives(self, name: str, call: _Call) -> bool:
        """Whether the place is no place for a replay call now, as live ones are at work there."""
        return (
            self._live_alone
            and call.priority is Priority.REPLAY
            and any(one.place == name and one.priority is Priority.LIVE for one in self._working)
        )

    def _make_room(self) -> None:
        """For each live call that got no slot cancel the youngest replay call where it could work.

        For one that must be alone cancel all where it will be.
        """
        for call in self._working:
            if call.priority is Priority.REPLAY and not call.gives_way and self._is_lives(call.place, call):
                _give_way(call)
        going = sum([call.gives_way for call in self._working])
        for call in [one for one in self._waiting if one.priority is Priority.LIVE and not one.turn.done()]:
            places = [call.place] if call.place else self._usable(call)
            replays = [
                one
                for one in self._working
                if one.priority is Priority.REPLAY and one.place in places and not one.gives_way
            ]
            if not call.alone:
                going -= 1
                replays = [max(replays, key=lambda one: one.ticket)] if replays and going < 0 else []
            for one in replays:
                _give_way(one)

    def _usable(self, call: _Call) -> Sequence[str]:
        return [name for name, place in self._places.items() if place.open and name in call.among]

    def _fits(self, call: _Call, name: str) -> bool:
        place = self._places[name]
        return place.busy == 0 if call.alone else place.busy < place.slots

    def _load(self, name: str, call: _Call) -> tuple[float, bool]:
        place = self._places[name]
        return place.busy / place.slots, call.prefix not in place.prefixes


def _give_way(call: _Call) -> None:
    call.gives_way = True
    if call.task is not None:
        call.task.cancel()


def _closed(call: _Call) -> ClosedError:
    return ClosedError(f"no slots: {', '.join(sorted(call.among))}")
