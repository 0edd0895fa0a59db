"""`rewatch migrate`: topics and tables as this version has them."""

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.cli.errors import run
from infra.cli.help import MAINTENANCE, examples
from infra.cli.output import JsonFlag, print_json, printable

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
            "rewatch --config site.yaml migrate --json",
        ),
    )(migrate)


def migrate(
    ctx: typer.Context,
    wait: Annotated[
        bool, typer.Option("--wait", help="First wait, without limit, until the broker and ClickHouse answer.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Bring topics and ClickHouse's tables to this version.

    It makes what is missing, and is safe to repeat. `rewatch up` does it too.
    """
    settings: Settings = ctx.obj

    async def main() -> dict[str, Any]:
        from aiokafka.errors import KafkaError

        from streams.errors import UnavailableError

        said = ""
        while True:
            try:
                return await once()
            except (KafkaError, UnavailableError, OSError) as error:
                if not wait:
                    raise
                if str(error) != said:  # once is enough
                    said = str(error)
                    typer.echo(f"waiting: {printable(said)}", err=True)
                await asyncio.sleep(_PAUSE_S)

    async def once() -> dict[str, Any]:
        from processors.sink.store import ClickHouseStore
        from schemas import prompts
        from streams.admin import ensure_topics
        from streams.kafka import Kafka
        from streams.prompts import Prompts

        kafka = Kafka(settings.kafka)
        # Not from `meta`: a topic that the broker lost is made again under a name that stands there.
        async with kafka.admin() as admin:
            before = set(await admin.list_topics())
        metas = await ensure_topics(kafka)
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
        }

    done = run(settings, main, doing="migrating ...")
    if as_json:
        print_json(done)
        return
    made, applied = done["topics_made"], done["migrations_applied"]
    topics = f"made {', '.join(made)}" if made else f"all {len(done['topics'])} are there"
    typer.echo(f"topics: {topics}")
    typer.echo(f"tables: {'applied ' + ', '.join(applied) if applied else 'as this version has them'}")
