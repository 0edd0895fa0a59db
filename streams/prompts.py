"""Prompt versions and pointers on the log: which version judges a camera, and all that was ever said about it."""

import difflib
import shlex
import time
from collections.abc import Callable
from typing import NamedTuple

from schemas import prompts
from schemas.prompts import PromptError, PromptVersion
from schemas.records import PromptRecord
from streams.control import ControlTable
from streams.errors import UnavailableError
from streams.kafka import Kafka

DEFAULT = "default"
"""The scope of the pointer for every camera that has none of its own."""

_SHORTEST = 4
"""Characters of a digest that name a version, if they are those of one alone."""


class UnknownVersionError(LookupError):
    """No version, or several, go by this name; the message says which are near."""


class Known(NamedTuple):
    """A version, and since when the log has it."""

    version: PromptVersion
    created_at: int | None
    """Milliseconds since the Unix epoch; None: it comes with the product, and was never put on the log."""
    comment: str


class Prompts:
    """The folded `prompts` topic: immutable versions, and which of them judges a camera.

    A record that cannot be used is skipped, counted and said, and what held before holds on: a version that is no
    prompt or not what its digest says, and a pointer that names none. A pointer to a version that is not there is
    another matter, see `of`.
    """

    def __init__(self, kafka: Kafka, clock: Callable[[], float] = time.time) -> None:
        self.table = ControlTable(kafka, "prompts", PromptRecord, self._refuse)
        self._clock = clock
        self._made: dict[str, Known] = {}
        self._pointers: dict[str, list[PromptRecord]] = {}
        self._refused: dict[str, str] = {}

    def of(self, camera_id: str) -> PromptVersion:
        """The version that is active for the camera: its own, else everyone's, else the one in the tree.

        Raises:
            UnavailableError: a pointer names a version that is not there or cannot be used (waiting on `settings`):
                judging by another prompt than the one that was asked for would be a verdict nobody ordered.
        """
        pointer = self.pointer(camera_id) or self.pointer(DEFAULT)
        if pointer is None:
            return prompts.default()
        known = self._made.get(pointer.digest)
        if known is None:
            why = self._refused.get(pointer.digest, "it is active but not in `prompts`")
            scope = pointer.scope
            raise UnavailableError(
                "settings",
                f"prompt version {pointer.digest}, {_scope(scope)}: {why}; `{rollback(scope)}` undoes it",
            )
        return known.version

    def pointer(self, scope: str) -> PromptRecord | None:
        """The pointer in force for a camera, or for `default`; None where there is none, or where it was taken back."""
        record = self.table.get(f"active/{scope}")
        return record if record is not None and record.digest else None

    def active(self) -> dict[str, PromptRecord]:
        """The pointers in force, by scope: the default's first."""
        found = {scope: self.pointer(scope) for scope in sorted(self._pointers, key=lambda s: (s != DEFAULT, s))}
        return {scope: record for scope, record in found.items() if record is not None}

    def scopes(self) -> tuple[str, ...]:
        """Every scope that ever had a pointer."""
        return tuple(self._pointers)

    def history(self, scope: str) -> tuple[PromptRecord, ...]:
        """Every pointer that the scope has had, oldest first; an empty digest took one back."""
        return tuple(self._pointers.get(scope, ()))

    def before(self, scope: str) -> str | None:
        """The digest that was in force before the one that is; empty where none was, None where none is to undo."""
        history = self._pointers.get(scope, [])
        if not history:
            return None
        other = [record.digest for record in history if record.digest != history[-1].digest]
        if other:
            return other[-1]
        return None if scope == DEFAULT or not history[-1].digest else ""

    def versions(self) -> dict[str, Known]:
        """Every version by digest, newest first; then those that come with the product and are not on the log."""
        on_log = sorted(self._made.values(), key=lambda known: -(known.created_at or 0))
        shipped = (Known(version, None, "comes with the product") for version in prompts.shipped().values())
        others = (known for known in shipped if known.version.digest not in self._made)
        return {known.version.digest: known for known in (*on_log, *others)}

    def find(self, text: str) -> PromptVersion:
        """The version of that name (the newest, if several have it), digest, or beginning of a digest.

        `active` is everyone's version, `active/CAMERA` the one that judges the camera.

        Raises:
            UnknownVersionError: there is none, or a beginning is that of several.
            UnavailableError: as `of`.
        """
        if text == "active" or text.startswith("active/"):
            return self.of(text.removeprefix("active").removeprefix("/"))
        known = self.versions()
        named = [found.version for found in known.values() if found.version.name == text]
        begins = [found.version for digest, found in known.items() if digest.startswith(text.lower())]
        if named:
            return named[0]
        if len(begins) == 1 and len(text) >= _SHORTEST:
            return begins[0]
        if len(begins) > 1 and text:
            several = ", ".join(version.digest for version in begins[:5])
            raise UnknownVersionError(f"{text} is the beginning of several versions; say more of it: {several}")
        names = dict.fromkeys(found.version.name for found in known.values() if found.version.name)
        near = difflib.get_close_matches(text, [*names, *known], n=3, cutoff=0.4) or list(names)[:5]
        raise UnknownVersionError(f"there is no prompt version {text!r}; there are, among others: {', '.join(near)}")

    async def add(self, version: PromptVersion, comment: str) -> bool:
        """Put a version on the log; whether it was not there.

        Raises:
            FencedError, UncertainError: as `ControlTable.append`.
        """
        await self.table.load()
        if version.digest in self._made:
            return False
        await self.table.append(version.to_record(int(self._clock() * 1000), comment), only_new=True)
        return True

    async def point(self, scope: str, digest: str, comment: str, *, evidence: str = "") -> bool:
        """Move a scope's pointer; an empty digest takes a camera's own back. Whether it pointed elsewhere.

        `evidence`: the id of the replay or shadow that it is moved on the strength of.

        Raises:
            FencedError, UncertainError: as `ControlTable.append`.
        """
        await self.table.load()
        now = self.table.get(f"active/{scope}")
        if (now.digest if now is not None else "") == digest:
            return False
        await self.table.append(
            PromptRecord(
                kind="active",
                digest=digest,
                scope=scope,
                name="",
                template="",
                output_schema="",
                parameters="",
                comment=comment,
                created_at=int(self._clock() * 1000),
                evidence=evidence,
            )
        )
        return True

    async def register(self, version: PromptVersion, comment: str) -> None:
        """Put a version on the log where it is not there; make it everyone's where nobody has chosen yet."""
        await self.add(version, comment)
        if self.table.get(f"active/{DEFAULT}") is None:
            await self.point(DEFAULT, version.digest, comment)

    def _refuse(self, record: PromptRecord) -> str | None:
        """Take note of the record; why it cannot be used, or None."""
        if record.kind == "active":
            if not record.scope or (record.scope == DEFAULT and not record.digest):
                return (
                    f"a pointer of scope {record.scope[:80]!r} to version {record.digest[:80]!r}: one of them is none"
                )
            self._pointers.setdefault(record.scope, []).append(record)
            return None
        try:
            version = PromptVersion.from_record(record)
        except PromptError as error:
            self._refused.setdefault(record.digest, str(error))
            return str(error)
        self._made.setdefault(version.digest, Known(version, record.created_at, record.comment))
        return None


def rollback(scope: str) -> str:
    """The command that undoes the scope's last move: without its camera it would move everyone's pointer."""
    return "rewatch prompt rollback" + ("" if scope == DEFAULT else f" --camera {shlex.quote(scope)}")


def _scope(scope: str) -> str:
    return "for every camera without its own" if scope == DEFAULT else f"for camera {scope[:80]}"
