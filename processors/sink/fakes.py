"""A store in memory that keeps the promises of the real one: for tests, and to see what a sink would insert."""

from collections import Counter
from typing import Any

from processors.sink.core import Block
from processors.store.connection import RefusedError
from streams.errors import UnavailableError


class MemoryStore:
    """A `Store` whose tables are lists of rows. It deduplicates by token, as ClickHouse does."""

    def __init__(self) -> None:
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.calls: Counter[str] = Counter()
        """Inserts by token, those without effect too."""
        self.away = False
        """Whether inserts fail before anything is kept."""
        self.silent = False
        """Whether inserts are kept and then fail, as when the answer is lost."""
        self.poison: set[Any] = set()
        """Values that no table takes."""
        self._tokens: set[tuple[str, str]] = set()

    async def insert(self, block: Block, token: str) -> None:
        """As `Store.insert`."""
        self.calls[token] += 1
        if self.away:
            raise UnavailableError("store", "away")
        rows = [dict(zip(block.columns, values, strict=True)) for values in zip(*block.columns.values(), strict=True)]
        for row in rows:
            if bad := [name for name, value in row.items() if _hashable(value) and value in self.poison]:
                raise RefusedError(f"{block.table}.{bad[0]}")
        if rows and (block.table, token) not in self._tokens:
            self._tokens.add((block.table, token))
            self.tables.setdefault(block.table, []).extend(rows)
        if self.silent:
            raise UnavailableError("store", "the answer was lost")

    async def close(self) -> None:
        """Nothing to let go of."""


def _hashable(value: Any) -> bool:
    return not isinstance(value, list | dict)
