"""`prompts` in memory, for the tests of `rewatch prompt`."""

from collections.abc import Iterable, Mapping

from msgspec import structs

from infra.config import load
from schemas import prompts
from schemas.prompts import PromptVersion
from schemas.records import PromptRecord
from streams.kafka import Kafka
from streams.prompts import Prompts
from streams.topics import TOPICS

AT = 1_793_613_600.0
"""2026-11-02 10:00 UTC, seconds."""


class MemoryTable:
    """A `ControlTable` whose topic is a list."""

    def __init__(self, known: Prompts) -> None:
        self.records: list[PromptRecord] = []
        self._known = known
        self._latest: dict[str, PromptRecord] = {}

    def get(self, key: str) -> PromptRecord | None:
        return self._latest.get(key)

    async def load(self) -> None: ...

    async def append(self, record: PromptRecord, *, only_new: bool = False) -> None:
        key = TOPICS["prompts"].key(record)
        if not (only_new and key in self._latest):
            self.put(record)

    def put(self, record: PromptRecord) -> None:
        self.records.append(record)
        if self._known._refuse(record) is None:
            self._latest[TOPICS["prompts"].key(record)] = record


def in_memory(records: Iterable[PromptRecord] = ()) -> tuple[Prompts, MemoryTable]:
    """The folded topic with these records on it; its clock goes on by a minute at each look."""
    ticks = iter(range(10_000))
    known = Prompts(Kafka(load().kafka), clock=lambda: AT + 60 * next(ticks))
    table = MemoryTable(known)
    known.table = table  # type: ignore[assignment]
    for record in records:
        table.put(record)
    return known, table


def changed(name: str = "changed", **texts: str) -> PromptVersion:
    """The default with other texts: `user="..."` is user.txt."""
    return version(prompts.default().to_files() | {f"{part}.txt": text for part, text in texts.items()}, name)


def version(texts: Mapping[str, str], name: str = "mine") -> PromptVersion:
    return PromptVersion.from_texts(texts, name)


def pointer(digest: str, scope: str = "default", at: int = 1, comment: str = "") -> PromptRecord:
    return structs.replace(
        prompts.default().to_record(at, comment),
        kind="active",
        digest=digest,
        scope=scope,
        name="",
        template="",
        output_schema="",
        parameters="",
    )
