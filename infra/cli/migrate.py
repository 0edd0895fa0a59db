"""`rewatch migrate`: topics and tables as this version has them."""

from typing import TYPE_CHECKING, Any

import typer

from infra.cli.output import USAGE, JsonFlag, fail, print_json, run
from processors.sink.store import ClickHouseStore
from schemas.migrations import MigrationError
from streams.admin import ensure_topics
from streams.kafka import Kafka

if TYPE_CHECKING:
    from infra.config import Settings


def register(root: typer.Typer) -> None:
    """Add this command to the root."""
    root.command()(migrate)


def migrate(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """Make topics and ClickHouse's tables, or bring them to this version; safe to repeat. `rewatch up` does it too."""
    settings: Settings = ctx.obj

    async def main() -> dict[str, Any]:
        kafka = Kafka(settings.kafka)
        # Not from `meta`: a topic that the broker lost is made again under a name that stands there.
        async with kafka.admin() as admin:
            before = set(await admin.list_topics())
        metas = await ensure_topics(kafka)
        store = ClickHouseStore(settings.clickhouse)
        try:
            applied = await store.migrate()
        finally:
            await store.close()
        return {
            "topics": sorted(metas),
            "topics_made": sorted(set(metas) - before),
            "migrations_applied": [f"{migration.version:03d}_{migration.name}" for migration in applied],
        }

    try:
        done = run(settings, main, doing="migrating ...")
    except MigrationError as error:
        fail(str(error), USAGE)
    if as_json:
        print_json(done)
        return
    made, applied = done["topics_made"], done["migrations_applied"]
    topics = f"made {', '.join(made)}" if made else f"all {len(done['topics'])} are there"
    typer.echo(f"topics: {topics}")
    typer.echo(f"tables: {'applied ' + ', '.join(applied) if applied else 'as this version has them'}")
