"""`rewatch migrate`: topics and tables as this version has them; ClickHouse's users and a registry's schemas."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.cli.errors import run
from infra.cli.help import MAINTENANCE, examples
from infra.cli.output import USAGE, JsonFlag, fail, print_json, printable

if TYPE_CHECKING:
    from infra.config import Settings

# A broker takes seconds to start, and a minute after a power cut.
_PAUSE_S = 2.0


def register(root: typer.Typer) -> None:
    """Add this command to the root."""
    root.command(
        rich_help_panel=MAINTENANCE,
        epilog=examples(
            "rewatch migrate",
            "rewatch migrate --wait  # as a job beside services that still start",
            "rewatch migrate --users secrets/  # on a server of your own, once, as a user that may make others",
            "rewatch --config site.yaml migrate --json",
        ),
    )(migrate)


def migrate(
    ctx: typer.Context,
    wait: Annotated[
        bool, typer.Option("--wait", help="First wait, without limit, until the broker and ClickHouse answer.")
    ] = False,
    users: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Also make ClickHouse's users: one that makes tables, one that adds rows, one that reads. Their "
            "passwords are files in this folder; those that are missing are made.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Bring topics and ClickHouse's tables to this version.

    It makes what is missing, and is safe to repeat. `rewatch up` does it too; this command alone tells a schema
    registry (kafka.schema_registry_url) every schema, so that other programs can read our topics.
    """
    settings: Settings = ctx.obj
    passwords = _passwords(settings, users) if users is not None else None

    async def once() -> dict[str, Any]:
        from processors.sink.store import ClickHouseStore
        from schemas import prompts
        from streams.admin import ensure_topics
        from streams.kafka import Kafka
        from streams.prompts import Prompts
        from streams.retention import retain

        kafka = Kafka(settings.kafka)
        # Not from `meta`: a topic that the broker lost is made again under a name that stands there.
        async with kafka.admin() as admin:
            before = set(await admin.list_topics())
        metas = await ensure_topics(kafka)
        retained = await retain(kafka, settings.retention.topics_ms)
        await Prompts(kafka).register(prompts.default(), "the version that comes with the product")
        store = ClickHouseStore(settings.clickhouse)
        try:
            applied = await store.migrate()
        finally:
            await store.close()
        return {
            "topics": sorted(metas),
            "topics_made": sorted(set(metas) - before),
            "migrations_applied": [f"{migration.version:03d}_{migration.name}" for migration in applied],
            "retention_set": [change._asdict() for change in retained],
            **await _beside(settings, passwords),
        }

    done = run(settings, partial(_patiently, once) if wait else once, doing="migrating ...")
    if as_json:
        print_json(done)
        return
    made, applied = done["topics_made"], done["migrations_applied"]
    topics = f"made {', '.join(made)}" if made else f"all {len(done['topics'])} are there"
    typer.echo(f"topics: {topics}")
    for change in done["retention_set"]:
        typer.echo(f"topic {change['topic']}: the broker keeps it {change['now_ms'] / 3_600_000:g} h now")
    typer.echo(f"tables: {'applied ' + ', '.join(applied) if applied else 'as this version has them'}")
    if "users" in done:
        typer.echo(f"users: {', '.join(done['users'])}; their passwords are in {users}")
    if "schemas" in done:
        typer.echo(f"schema registry: {_schemas(done['schemas'])}")


async def _patiently(work: Callable[[], Coroutine[Any, Any, dict[str, Any]]]) -> dict[str, Any]:
    """Do it as soon as everything that it needs answers."""
    from aiokafka.errors import KafkaError

    from streams.errors import UnavailableError

    said = ""
    while True:
        try:
            return await work()
        except (KafkaError, UnavailableError, OSError) as error:
            if str(error) != said:  # once is enough
                said = str(error)
                typer.echo(f"waiting: {printable(said)}", err=True)
            await asyncio.sleep(_PAUSE_S)


async def _beside(settings: "Settings", passwords: dict[str, str] | None) -> dict[str, Any]:
    """ClickHouse's users and the registry's schemas, where they are asked for."""
    done: dict[str, Any] = {}
    if passwords is not None:
        from processors.store.users import make_users

        done["users"] = await make_users(settings.clickhouse, passwords)
    if settings.kafka.schema_registry_url:
        from streams.registry import SchemaRegistry

        async with SchemaRegistry(settings.kafka) as registry:
            done["schemas"] = [told._asdict() for told in await registry.register()]
    return done


def _passwords(settings: "Settings", folder: Path) -> dict[str, str]:
    """The users' passwords, before anything is waited for: what is wrong with the folder is said at once."""
    from processors.store.users import passwords_in

    if settings.local_clickhouse:
        fail(
            "--users: the embedded ClickHouse has no users, it listens on this machine alone; this is for a server "
            "of your own (clickhouse.url)",
            USAGE,
        )
    try:
        return passwords_in(folder)
    except OSError as error:
        fail(f"--users {folder}: {error.filename}: {error.strerror}", USAGE)
    except ValueError as error:
        fail(f"--users: {error}", USAGE)


def _schemas(told: list[dict[str, Any]]) -> str:
    """What the registry was told, in a line."""
    new = sum(len(one["registered"]) for one in told)
    said = f"told {new} of {new + sum(one['there'] for one in told)} schemas" if new else "has every schema"
    others = [f"{one['subject']} {', '.join(map(str, one['others']))}" for one in told if one["others"]]
    return f"{said}; versions that are not ours: {'; '.join(others)}" if others else said
