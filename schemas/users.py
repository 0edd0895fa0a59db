"""ClickHouse's users and what each may do: the one place where this is written.

`rewatch migrate --users` makes them on a server from here; the users file of the containers
(infra/compose/clickhouse/users.xml.in) says the same in ClickHouse's own format, and a test holds it to this.

Grants keep a reader from writing. Its profile makes that sure a second time (`readonly`) and bounds what a question
may take, so that no question, whoever asks it, leaves the sink without memory.
"""

from typing import NamedTuple


class Limit(NamedTuple):
    """A setting that a user's questions begin with, and the bounds within which a question may change it."""

    setting: str
    value: int
    least: int | None = None
    most: int | None = None


class User(NamedTuple):
    """One user of the store."""

    role: str
    purpose: str
    grants: tuple[str, ...]
    """Privileges, each `WHAT ON WHERE`; `{database}` is `clickhouse.database`."""
    limits: tuple[Limit, ...] = ()

    def name(self, database: str) -> str:
        """What it is called: two installations on one server have users of their own."""
        return f"{database}_{self.role}"


GIB = 1024**3

WRITTEN = (
    "log",
    "sink_progress",
    "frames",
    "detections",
    "batches",
    "contexts",
    "risk_events",
    "labels",
    "alerts",
    "prompts",
    "cameras",
    "replays",
    "replay_units",
    "replay_events",
    "gpu_metrics",
    "dead_letters",
    "dead_letter_status",
    "holds",
)
"""Tables that the sink fills. Those of `gc` are not among them: what is marked there, `gc` deletes."""

USERS: tuple[User, ...] = (
    User(
        "admin",
        "`rewatch migrate`, `rebuild`, `gc`, `restore`: makes and changes tables, and may take rows away",
        (
            # No DROP DATABASE, and nothing of users, files or other hosts.
            (
                "SELECT, INSERT, ALTER, CREATE DATABASE, CREATE TABLE, CREATE VIEW, DROP TABLE, DROP VIEW, TRUNCATE, "
                "OPTIMIZE ON {database}.*"
            ),
            # A server can be set to ask for this, too (table_engines_require_grant).
            "TABLE ENGINE ON ReplacingMergeTree",
            # `gc` looks there for what is deleted and still on disk.
            "SELECT ON system.parts",
        ),
    ),
    User(
        "writer",
        "the sink: adds rows. Where it has come to stands on the log, so it reads none",
        tuple(f"INSERT ON {{database}}.{table}" for table in WRITTEN),
    ),
    User(
        "reader",
        "the page, the command line, replays, Grafana: asks, and changes nothing",
        ("SELECT ON {database}.*",),
        (
            # 2, and not 1: questions may bring limits of their own (the audit's are lower), within the bounds below.
            Limit("readonly", 2),
            # The longest that a command waits (infra/cli/audit.py). Bounds begin at 1, as 0 would be no limit.
            Limit("max_execution_time", 600, 1, 600),
            # Half of what the container of ClickHouse has (infra/compose/.env.example), for all readers together,
            # as for one: the other half is the sink's, and the merges'.
            Limit("max_memory_usage", 2 * GIB, 1, 2 * GIB),
            Limit("max_memory_usage_for_user", 2 * GIB, 1, 2 * GIB),
            # As of the embedded engine (infra/local/clickhouse.py): no answer of ours comes near it.
            Limit("max_result_bytes", GIB, 1, GIB),
            # A dashboard sends 20 at once, the page a few a viewer; the server's own limit is 1,000.
            Limit("max_concurrent_queries_for_user", 100, 1, 100),
        ),
    ),
)
"""In the order of their rights, the greatest first."""


def statements(user: User, database: str, password_sha256: str) -> tuple[str, ...]:
    """The statements that make the user, or bring it to this; each can be repeated.

    What a user has before and after, it has in between. `password_sha256` is the digest, hex: so no password stands in
    the server's log of queries.
    """
    name = user.name(database)
    limits = ", ".join(_bounded(limit) for limit in user.limits) or "NONE"
    grants = ", ".join(grant.format(database=database) for grant in user.grants)
    return (
        f"CREATE SETTINGS PROFILE IF NOT EXISTS {name}",
        f"ALTER SETTINGS PROFILE {name} SETTINGS {limits}",
        f"CREATE USER IF NOT EXISTS {name} IDENTIFIED WITH sha256_hash BY '{password_sha256}'",
        f"ALTER USER {name} IDENTIFIED WITH sha256_hash BY '{password_sha256}' SETTINGS PROFILE '{name}'",
        # Replaces what it had, at once.
        f"GRANT {grants} TO {name} WITH REPLACE OPTION",
    )


def _bounded(limit: Limit) -> str:
    bounds = [f"{word} {bound}" for word, bound in (("MIN", limit.least), ("MAX", limit.most)) if bound is not None]
    return " ".join([f"{limit.setting} = {limit.value}", *bounds])
