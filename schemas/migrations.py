"""The ClickHouse migrations of the tree: which there are, and the statements of each. Applying them is the store's."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

CLICKHOUSE = Path(__file__).parent / "clickhouse"

_FILE = re.compile(r"(?P<version>\d{3})_(?P<name>[a-z0-9_]+)\.sql")

# What a semicolon inside does not end a statement: comments, strings, quoted names.
_TOKEN = re.compile(r"--[^\n]*|/\*.*?\*/|'(?:[^'\\]|\\.|'')*'|`(?:[^`\\]|\\.)*`|;", re.DOTALL)


class MigrationError(Exception):
    """The migrations of the tree and those of the database do not fit together; the message says how."""


class Migration(NamedTuple):
    """One numbered file. Its statements can be repeated: a crash between two of them is mended by applying it again."""

    version: int
    name: str
    sql: str

    @property
    def sha256(self) -> str:
        """SHA-256 of the file, hex."""
        return hashlib.sha256(self.sql.encode()).hexdigest()

    @property
    def statements(self) -> tuple[str, ...]:
        """Its statements, without comments before and semicolons behind them."""
        return tuple(split(self.sql))


@cache
def migrations(directory: Path = CLICKHOUSE) -> tuple[Migration, ...]:
    """Every migration, in order.

    Raises:
        MigrationError: a file is not named NNN_name.sql, or a number is missing or there twice.
    """
    found: list[Migration] = []
    for path in sorted(directory.glob("*.sql")):
        named = _FILE.fullmatch(path.name)
        if named is None:
            raise MigrationError(f"{path}: migrations are named NNN_name.sql")
        if int(named["version"]) != len(found):
            raise MigrationError(f"{path}: the next migration has the number {len(found):03}")
        found.append(Migration(len(found), named["name"], path.read_text(encoding="utf-8")))
    return tuple(found)


def pending(all_: Iterable[Migration], applied: Mapping[int, str]) -> list[Migration]:
    """The migrations that a database still needs, given the SHA-256 of each version that it has.

    Raises:
        MigrationError: a file was changed after it was applied, or the database is newer than this version.
    """
    known = {migration.version: migration for migration in all_}
    for version, sha256 in sorted(applied.items()):
        if version not in known:
            raise MigrationError(
                f"the database has migration {version:03}, which this version does not know: upgrade rewatch, or go "
                "back as docs/upgrades.md says"
            )
        if known[version].sha256 != sha256:
            raise MigrationError(
                f"{version:03}_{known[version].name}.sql was changed after it was applied to this database: "
                "restore the file and put the change into a new one",
            )
    return [migration for version, migration in sorted(known.items()) if version not in applied]


def split(sql: str) -> Iterable[str]:
    """The statements of a script. Semicolons in comments, strings and quoted names end none."""
    start = 0
    for token in _TOKEN.finditer(f"{sql}\n;"):
        if token[0] == ";":
            statement = _stripped(sql[start : token.start()])
            if statement:
                yield statement
            start = token.end()


def _stripped(statement: str) -> str:
    """A statement without blank space and comments around it."""
    while (text := re.sub(r"\A\s*(?:--[^\n]*(?:\n|\Z)|/\*.*?\*/)?", "", statement, flags=re.DOTALL)) != statement:
        statement = text
    return statement.rstrip()
