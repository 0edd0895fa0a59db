"""`rewatch status` and `rewatch lag`: what runs, what is on the log and in ClickHouse, how far each stage has come."""

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import typer

from infra.cli.errors import run
from infra.cli.help import LOOK, examples
from infra.cli.output import AWAY, NO, JsonFlag, fail, print_json, print_table, printable, when

if TYPE_CHECKING:
    from infra.config import Settings
    from processors.store.queries import Model, Row
    from streams.health import Report, Stage
    from streams.survey import Position


def register(root: typer.Typer) -> None:
    """Add these commands to the root."""
    root.command(
        rich_help_panel=LOOK,
        epilog=examples(
            "rewatch status",
            "watch -n 5 rewatch status",
            "rewatch status --json | jq '.stages[] | {stage, lag}'",
        ),
    )(status)
    root.command(
        rich_help_panel=LOOK,
        epilog=examples(
            "rewatch lag",
            "until rewatch lag >/dev/null; do sleep 1; done     # wait for the end of the work",
            "rewatch lag --json",
        ),
    )(lag)


def status(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """Show what runs, what is on the log and in ClickHouse, and what each stage waits on.

    Records are counted by reading (offsets have holes); `~` marks an estimate of a topic too long for that.
    Exit code 3 when the broker or ClickHouse is away.
    """
    settings: Settings = ctx.obj
    state = run(settings, lambda: collect(settings), doing="counting ...")
    if as_json:
        print_json(state)
    else:
        _print_status(state, settings)
    if state["problems"]:
        raise typer.Exit(AWAY)


def lag(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """Show how many records each stage has before it, by partition.

    Exit code 0 when every stage is caught up, 1 when one is not. Frames of a window that is still open stand before
    `batch` until it closes.
    """
    from streams.health import stage_of, workers
    from streams.kafka import Kafka
    from streams.survey import READS, survey

    settings: Settings = ctx.obj
    look = run(settings, lambda: survey(Kafka(settings.kafka), count=False))
    if not look.metas:
        fail("there are no topics yet: `rewatch up` or `rewatch migrate` makes them")
    reports = workers(settings.data_dir)
    stages = [
        _stage(stage_of(name, look.positions[name], reports), name)
        | {"partitions": _partitions(name, look.positions[name], reports)}
        for name in READS
    ]
    caught_up = all(stage["caught_up"] for stage in stages)
    if as_json:
        print_json({"caught_up": caught_up, "stages": stages})
    else:
        print_table(
            ("stage", "partition", "committed", "end", "behind", "waiting on"),
            [
                (
                    stage["stage"],
                    f"{p['topic']}-{p['partition']}",
                    p["committed"],
                    p["end"],
                    _count_text(p["behind"], exact=p["exact"]),
                    p["waiting_on"] or "",
                )
                for stage in stages
                for p in stage["partitions"]
                if p["behind"] or p["waiting_on"]
            ]
            or [("every stage", "", "", "", 0, "")],
        )
        typer.echo("caught up" if caught_up else "not caught up")
    if not caught_up:
        raise typer.Exit(NO)


async def collect(settings: "Settings") -> dict[str, Any]:
    """What `rewatch status --json` says.

    Returns `topics` (`topic`, `records`, `exact`, `in_clickhouse`: None where it cannot be told), `stages` (`stage`,
    `lag`, `exact`, `caught_up`, `waiting_on`, `workers`: those of detect tell `detector`, its `model` and `runtime`),
    `models` (`role`, `name`, `sha256` and `toy` of those that made the newest records), `processes`, `metrics`
    (addresses of this machine's processes), `gpu` (see `infra.gpus.told`), `not_taken` (what lies in the inbox and is
    no camera's), `dead_letters` and `problems`: services that are away. It never raises for those.
    """
    from infra import gpus, topology
    from infra.local.supervisor import running
    from infra.models.library import demo_digests
    from processors.ingest.inbox import strays
    from processors.store.queries import Queries
    from streams.health import look
    from streams.kafka import Kafka
    from streams.survey import READS
    from streams.topics import STORED

    async with aclosing(Queries(settings.clickhouse)) as store:
        models: dict[str, Model] = {}

        async def stored() -> "tuple[dict[str, int], list[Row]]":
            models.update(await store.models())
            return await store.counts(), await store.dead_letter_counts()

        seen = await look(Kafka(settings.kafka), stored, settings.data_dir, fixes=topology.fixes(settings))
    processes = await asyncio.to_thread(running, settings.data_dir)
    toys = demo_digests()
    topics = []
    for topic in STORED:
        records, exact = seen.on_log(topic)
        in_clickhouse = None if seen.stored is None else seen.stored.get(topic, 0)
        topics.append({"topic": topic, "records": records, "exact": exact, "in_clickhouse": in_clickhouse})
    return {
        "at": int(time.time() * 1000),
        "system": settings.kafka.system,
        "data_dir": str(settings.data_dir),
        "topics": topics,
        "stages": [
            _stage(stage, name) | {"workers": [_worker(report) for report in stage.reports]}
            for name, stage in ((name, seen.stage(name)) for name in READS)
        ],
        "models": [
            {"role": role, "name": model.name, "sha256": model.digest, "toy": model.digest in toys}
            for role, model in sorted(models.items(), reverse=True)  # the detector first, as images meet them
        ],
        "processes": [
            {"name": name, **{key: process.get(key) for key in ("state", "pid", "port", "restarts", "started_at")}}
            for name, process in processes.items()
        ],
        "metrics": sorted({report["metrics"] for report in seen.reports if report.get("metrics")}),
        "gpu": await gpus.told(seen.reports),
        "not_taken": strays(settings.ingest.folder) if settings.ingest.folder.enabled else [],
        "dead_letters": seen.letters,
        "problems": [problem._asdict() for problem in seen.problems],
    }


def _stage(stage: "Stage", name: str) -> dict[str, Any]:
    return {
        "stage": name,
        "lag": stage.lag,
        "exact": stage.exact,
        "caught_up": stage.caught_up,
        "waiting_on": list(stage.waiting_on),
    }


def _partitions(stage: str, positions: "list[Position]", reports: "list[Report]") -> list[dict[str, Any]]:
    """What `rewatch lag --json` says of the partitions of one stage."""
    ours = [report["partitions"] for report in reports if report["stage"] == stage]
    lives = {name: life for partitions in ours for name, life in partitions.items()}
    return [
        {
            "topic": p.partition.topic,
            "partition": p.partition.partition,
            "committed": p.committed,
            "end": p.end,
            "behind": p.behind.records,
            "exact": p.behind.exact,
            "waiting_on": lives.get(f"{p.partition.topic}-{p.partition.partition}", {}).get("waiting_on"),
        }
        for p in positions
    ]


def _worker(report: "Report") -> dict[str, Any]:
    return {
        "pid": report["pid"],
        "partitions": len(report["partitions"]),
        "in_hand": sum(life["in_hand"] for life in report["partitions"].values()),
        "waiting_on": report["waiting_on"],
        "stall": report["stall"],
        **({"detector": report["detector"]} if "detector" in report else {}),
    }


def _print_status(state: dict[str, Any], settings: "Settings") -> None:
    from processors.telemetry.core import sentence

    if state["processes"]:
        print_table(
            ("process", "state", "pid", "port", "restarts", "since"),
            [
                (
                    process["name"],
                    process["state"],
                    process["pid"],
                    process["port"],
                    process["restarts"],
                    when(int(process["started_at"]) * 1000, settings.time_zone) if process["started_at"] else "-",
                )
                for process in state["processes"]
            ],
        )
    else:
        typer.echo(f"nothing is run here by `rewatch up` (data_dir {state['data_dir']})")
    # Nothing is known of what nobody tells: a table of dashes and zeros would look like an answer.
    if any(stage["workers"] or stage["lag"] is not None for stage in state["stages"]):
        _print_stages(state["stages"])
    if any(topic["records"] is not None or topic["in_clickhouse"] is not None for topic in state["topics"]):
        _print_topics(state["topics"])
    for model in state["models"]:
        toy = ", a toy that comes with the demo and guards nothing: `rewatch models ls`" if model["toy"] else ""
        typer.echo(f"{model['role']}: {printable(model['name'])}{toy}")
    detectors = [worker["detector"] for stage in state["stages"] for worker in stage["workers"] if "detector" in worker]
    for model, runtime in sorted({(detector["model"], detector["runtime"]) for detector in detectors}):
        typer.echo(f"detect runs {printable(model)} by {printable(runtime)}")
    typer.echo(f"gpu: {printable(sentence(state['gpu']))}")
    if state["metrics"]:
        first = state["metrics"][0]
        typer.echo(f"metrics: {first}; {first.removesuffix('metrics')}targets lists those of every process here")
    if state["not_taken"]:
        some = ", ".join(map(repr, state["not_taken"][:3])) + (", ..." if len(state["not_taken"]) > 3 else "")
        typer.echo(f"not taken from {settings.ingest.folder.root}: {some}: `rewatch doctor` says why")
    for letters in state["dead_letters"] or []:
        typer.echo(
            f"{letters['count']} dead letters of {letters['stage']} ({letters['kind']}): "
            f"`rewatch dlq ls --stage {letters['stage']}`"
        )
    for problem in state["problems"]:
        typer.echo(f"error: {problem['message']}", err=True)


def _print_stages(stages: list[dict[str, Any]]) -> None:
    print_table(
        ("stage", "workers", "behind", "in hand", "waiting on"),
        [
            (
                stage["stage"],
                len(stage["workers"]),
                _count_text(stage["lag"], exact=stage["exact"]),
                sum(worker["in_hand"] for worker in stage["workers"]),
                ", ".join([*stage["waiting_on"], *(w["stall"] for w in stage["workers"] if w["stall"])]),
            )
            for stage in stages
        ],
    )


def _print_topics(topics: list[dict[str, Any]]) -> None:
    print_table(
        ("topic", "records", "in ClickHouse"),
        [
            (topic["topic"], _count_text(topic["records"], exact=topic["exact"]), topic["in_clickhouse"])
            for topic in topics
            if topic["records"] or topic["in_clickhouse"]
        ]
        or [("none has any", "", "")],
    )


def _count_text(count: int | None, *, exact: bool) -> Any:
    return count if exact or count is None else f"~{count}"
