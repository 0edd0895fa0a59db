"""Making ClickHouse's users as the product has them: see schemas/users.py."""

import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from processors.store.connection import Connection
from processors.store.settings import ClickHouseSettings
from schemas.users import USERS, statements

_RIGHTS = "set clickhouse.user and its password to those of a user that may make others (access_management)"


async def make_users(settings: ClickHouseSettings, passwords: Mapping[str, str]) -> list[str]:
    """Make each user, or bring it to what this version gives it; by role its password. Safe to repeat.

    Returns:
        The users' names.

    Raises:
        UnavailableError: ClickHouse is away, or the user of the settings may not make users.
    """
    connection = Connection(settings)
    try:
        with connection.naming(_RIGHTS):
            # Not the settings' own: users can be made before it is there.
            client = await connection.open("")
            try:
                for user in USERS:
                    digest = hashlib.sha256(passwords[user.role].encode()).hexdigest()
                    for statement in statements(user, settings.database, digest):
                        await client.command(statement)
            finally:
                await client.close()
    finally:
        await connection.close()
    return [user.name(settings.database) for user in USERS]


def passwords_in(folder: Path) -> dict[str, str]:
    """The password of each role, from `clickhouse_<role>_password` in the folder; one that is missing is made.

    The names are those of the containers' secrets. What is made here only its owner can read.

    Raises:
        OSError: the folder or a file in it cannot be read or written.
        ValueError: a file is empty.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found: dict[str, str] = {}
    for user in USERS:
        path = folder / f"clickhouse_{user.role}_password"
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
        except FileExistsError:
            pass
        found[user.role] = path.read_text().rstrip("\r\n")
        if not found[user.role]:
            raise ValueError(f"{path} is empty: put a password in, or delete it to have one made")
    return found
