"""A labelling session on a terminal: events one after the other, a key for each answer, each on the log at once."""

import asyncio
import os
import sys
import termios
import tty
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple, Protocol

from rich.text import Text

from infra.cli.output import console, level_text, print_table, printable, when
from streams.errors import UnavailableError
from streams.labels import MAX_NOTE

if TYPE_CHECKING:
    from processors.replay.labelling import Sighting, Window
    from processors.replay.sampling import Chosen, Stratum
    from processors.store.queries import Row
    from schemas.records import Label

_ASK = "t true alarm   f false alarm   s skip   n note   u undo   q quit   ? help"
_HELP = """  t  true: somebody should have been told of it
  f  false: nobody should have been told of it
  s  skip: you cannot tell; it stays without a label
  n  a note, which goes with the label that you give next
  u  undo: back to the event before; what you then say of it replaces what you said
  q  quit; also Ctrl-C: what was given is on the log"""

# Ctrl-D, and what a terminal that went away is taken for.
_END = "\x04"

VERDICTS = {"true": "true_alarm", "false": "false_alarm"}
WORDS = {"true_alarm": "true alarm", "false_alarm": "false alarm", "missed": "missed"}


class Item(NamedTuple):
    """One event of a session."""

    chosen: "Chosen"
    window: "Window"
    links: Mapping[str, str]
    """Addresses by what is there: `page`, `image`."""


class Keyboard(Protocol):
    """Where answers come from."""

    def forget(self) -> None:
        """Drop what was pressed already: it was meant for what stood there before."""

    async def key(self) -> str:
        """Wait for one character."""

    async def line(self, ask: str) -> str:
        """Ask for a line of text."""


class Terminal:
    """The keyboard of the terminal on standard input: keys come without Enter, and without echo."""

    def __init__(self) -> None:
        self._file = sys.stdin.fileno()
        self._typed: list[str] = []
        self._before = termios.tcgetattr(self._file)

    @contextmanager
    def open(self) -> Iterator["Terminal"]:
        """Keys one by one until the end; then the terminal is as it was."""
        tty.setcbreak(self._file, termios.TCSANOW)
        try:
            yield self
        finally:
            self._restore()

    def forget(self) -> None:
        """Drop what was pressed already."""
        self._typed.clear()
        termios.tcflush(self._file, termios.TCIFLUSH)

    async def key(self) -> str:
        """Wait for one character; Ctrl-D at the terminal's end."""
        while not self._typed:
            text = await self._read()
            # Arrows and function keys come as an escape and letters that nobody pressed.
            self._typed = [] if text.startswith("\x1b") else list(text or _END)
        return self._typed.pop(0)

    async def line(self, ask: str) -> str:
        """Ask for a line; what the terminal offers to edit one works meanwhile."""
        self._restore()
        try:
            sys.stdout.write(ask)
            sys.stdout.flush()
            return (await self._read()).rstrip("\n")
        finally:
            tty.setcbreak(self._file, termios.TCSANOW)

    def _restore(self) -> None:
        termios.tcsetattr(self._file, termios.TCSADRAIN, self._before)

    async def _read(self) -> str:
        """What is typed next. Not a blocking read: Ctrl-C must be able to end the wait."""
        loop = asyncio.get_running_loop()
        there: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._file, _tell, there)
        try:
            await there
        finally:
            loop.remove_reader(self._file)
        return os.read(self._file, 4096).decode(errors="ignore")


def _tell(there: "asyncio.Future[None]") -> None:
    if not there.done():
        there.set_result(None)


class Session:
    """The events of a session, and what is said of them.

    Args:
        items: the events, in the order in which they are shown.
        give: puts a label on the log.
        keyboard: where answers come from.
        author: who labels.
    """

    def __init__(
        self, items: Sequence[Item], *, give: "Callable[[Label], Awaitable[Label]]", keyboard: Keyboard, author: str
    ) -> None:
        self._items = items
        self._give = give
        self._keyboard = keyboard
        self._author = author
        self._out = console()
        self._at = 0
        self._note = ""
        self._given: dict[str, Label] = {}
        self._skipped: set[str] = set()

    @property
    def given(self) -> "Mapping[str, Label]":
        """The newest label of each event that was labelled here; all of them are on the log."""
        return self._given

    async def run(self) -> None:
        """Until all are answered, or the person quits. Ctrl-C cancels it; a label in hand is put on the log first."""
        while self._at < len(self._items):
            self._keyboard.forget()
            self._show(self._items[self._at])
            if not await self._answered(self._items[self._at]):
                return

    async def _answered(self, item: Item) -> bool:
        """Take keys until the event is left, forward or back; False: the session is to end."""
        name = item.chosen.event_id
        while True:
            match (await self._keyboard.key()).lower():
                case "t" | "f" as key:
                    if await self._label(item, VERDICTS["true" if key == "t" else "false"]):
                        self._leave(by=1)
                        return True
                case "s":
                    if name not in self._given:
                        self._skipped.add(name)
                    self._say("skipped" if name in self._skipped else f"stays a {WORDS[self._given[name].verdict]}")
                    self._leave(by=1)
                    return True
                case "n":
                    self._note = (await self._keyboard.line("note: ")).strip()[:MAX_NOTE]
                    self._say("it goes with the label that you give now" if self._note else "no note")
                case "u" if self._at:
                    self._leave(by=-1)
                    return True
                case "u":
                    self._say("this is the first one")
                case "q" | "\x04":
                    return False
                case _:
                    self._out.print(_HELP, markup=False)

    async def _label(self, item: Item, verdict: str) -> bool:
        """Put a label on the log; whether it is there."""
        event = item.window.event
        label = label_of(
            event,
            verdict,
            note=self._note,
            author=self._author,
            selection=item.chosen.selection,
            chance=item.chosen.chance,
        )
        self._out.print(Text(f"a {WORDS[verdict]} ... ", style="dim"), end="")
        giving = asyncio.ensure_future(self._give(label))
        stopped = False
        while not giving.done():
            try:
                await asyncio.wait([giving])
            except asyncio.CancelledError:  # Ctrl-C: the key was pressed before it
                stopped = True
        try:
            self._given[item.chosen.event_id] = giving.result()
        except UnavailableError as error:
            self._out.print(Text(f"not labelled: {printable(str(error))}", style="red"), soft_wrap=True)
            self._say("press it again, or q to quit")
            return False
        finally:
            if stopped:
                raise asyncio.CancelledError
        self._skipped.discard(item.chosen.event_id)
        self._say("on the log")
        return True

    def _leave(self, *, by: int) -> None:
        self._at += by
        self._note = ""

    def _say(self, text: str) -> None:
        self._out.print(Text(text, style="dim"), soft_wrap=True)

    def _show(self, item: Item) -> None:
        event, chosen = item.window.event, item.chosen
        numbers = Counter(label.verdict for label in self._given.values())
        done = f"{numbers['true_alarm']} true, {numbers['false_alarm']} false, {len(self._skipped)} skipped"
        lines = [
            Text.assemble((f"{self._at + 1} of {len(self._items)}", "bold"), f"   {selection_text(chosen)}   {done}"),
            Text(f"{when(event['started_at'], event['time_zone'])}  {printable(named(event))}"),
            Text.assemble(
                level_text(event["risk_level"], event["risk_score"]), "  ", (printable(event["summary"]), "bold")
            ),
            _line("why", event["reasoning"]),
            _line("seen", seen_text(item.window.seen)),
            *(_line(name, address) for name, address in item.links.items()),
        ]
        if (before := self._given.get(chosen.event_id)) is not None:
            lines.append(_line("you said", f"a {WORDS[before.verdict]}; t or f replaces it, s leaves it"))
        self._out.rule(style="dim")
        for line in lines:
            self._out.print(line, soft_wrap=True)
        self._say(_ASK)

    def tell(self, strata: "Mapping[Stratum, frozenset[str]]") -> None:
        """What was labelled, and how many events of each stratum have no label yet.

        Args:
            strata: ids of the unlabelled events of each stratum when the session began.
        """
        shown = {item.chosen.event_id: item.chosen.selection for item in self._items}
        rows = []
        for stratum, members in strata.items():
            mine = [name for name, selection in shown.items() if selection == stratum]
            verdicts = Counter(self._given[name].verdict for name in mine if name in self._given)
            skipped = sum(name in self._skipped for name in mine)
            numbers = verdicts["true_alarm"], verdicts["false_alarm"], skipped
            left = len(members - self._given.keys())
            rows.append((stratum_text(stratum), *numbers, len(mine) - sum(numbers), left))
        self._out.print()
        print_table(("drawn as", "true", "false", "skipped", "not answered", "left without a label"), rows)
        total = len(self._given)
        self._out.print(f"{total} label{'' if total == 1 else 's'} given; `rewatch label ls` lists them")


def label_of(
    event: "Row", verdict: str, *, note: str = "", author: str = "", selection: str = "", chance: float = 0.0
) -> "Label":
    """A label on an event, still without its name and time.

    Args:
        event: its row in `risk_events` or `events`.
        verdict: true_alarm or false_alarm.
        note: free text.
        author: who says so.
        selection: the stratum of a session, where one chose it.
        chance: with which that session chose it.
    """
    from schemas.records import Label

    return Label(
        label_id="",
        camera_id=event["camera_id"],
        started_at=ms(event["started_at"]),
        ended_at=ms(event["ended_at"]),
        verdict=verdict,
        event_id=event["event_id"],
        author=author,
        note=note,
        labelled_at=0,
        selection=selection,
        chance=chance,
    )


def ms(at: datetime) -> int:
    """Milliseconds since the Unix epoch."""
    return round(at.timestamp() * 1000)


def named(event: "Row") -> str:
    """The event's camera for people."""
    name, camera = event["camera_name"], event["camera_id"]
    return camera if name in {"", camera} else f"{name} ({camera})"


def stratum_text(stratum: str) -> str:
    """A stratum for people."""
    return stratum.replace("_", " ")


def selection_text(chosen: "Chosen") -> str:
    """What an event was drawn as, and its chance."""
    return f"{stratum_text(chosen.selection)}, chance {chosen.chance:.2g}"


def seen_text(seen: "Sequence[Sighting]") -> str:
    """What was seen: each class with its surest box, and how many there were at once."""
    shown = (f"{s.label} {s.score:.2f}" + (f" ({s.most} at once)" if s.most > 1 else "") for s in seen)
    return ", ".join(shown) or "its window is not in ClickHouse (yet, or any more)"


def _line(name: str, text: str) -> Text:
    return Text.assemble((f"{name}: ", "dim"), printable(text))
