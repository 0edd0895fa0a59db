"""`rewatch status` and `rewatch lag`: what runs, what is on the log and in ClickHouse, how far each stage has come."""

import asyncio
import json
import time
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from infra.cli.errors import broker_away, explain, run, start_hint
from infra.cli.help import LOOK, examples
from infra.cli.output import AWAY, NO, JsonFlag, fail, print_json, print_table, when

if TYPE_CHECKING:
    from infra.config import Settings
    from streams.survey import Position, Survey

# A worker writes its report every second; one that is older than this by far is not at work.
FRESH_S = 10.0


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
    from streams.kafka import Kafka
    from streams.survey import READS, survey

    settings: Settings = ctx.obj
    look = run(settings, lambda: survey(Kafka(settings.kafka), count=False))
    if not look.metas:
        fail("there are no topics yet: `rewatch up` or `rewatch migrate` makes them")
    reports = _reports(settings.data_dir)
    stages = [_stage(name, look.positions[name], reports, partitions=True) for name in READS]
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
    `lag`, `exact`, `caught_up`, `waiting_on`, `workers`), `processes`, `dead_letters` and `problems`: services that
    are away. It never raises for those.
    """
    from streams.survey import READS
    from streams.topics import STORED

    problems: list[dict[str, str]] = []
    look, stored = await asyncio.gather(_look(settings, problems), _stored(settings, problems))
    counts, letters = stored
    processes = await asyncio.to_thread(supervised, settings.data_dir)
    reports = await asyncio.to_thread(_reports, settings.data_dir)
    topics = []
    for topic in STORED:
        count = look.records.get(topic) if look is not None else None
        topics.append(
            {
                "topic": topic,
                "records": count.records if count is not None else None if look is None else 0,
                "exact": count is None or count.exact,
                "in_clickhouse": None if counts is None else counts.get(topic, 0),
            }
        )
    return {
        "at": int(time.time() * 1000),
        "system": settings.kafka.system,
        "data_dir": str(settings.data_dir),
        "topics": topics,
        "stages": [
            _stage(name, look.positions[name] if look is not None else None, reports)
            | {"workers": [_worker(report) for report in reports if report["stage"] == name]}
            for name in READS
        ],
        "processes": [
            {"name": name, **{key: process.get(key) for key in ("state", "pid", "port", "restarts", "started_at")}}
            for name, process in processes.items()
        ],
        "dead_letters": letters,
        "problems": problems,
    }


async def _look(settings: "Settings", problems: list[dict[str, str]]) -> "Survey | None":
    from aiokafka.errors import KafkaError

    from streams.kafka import Kafka
    from streams.survey import survey

    try:
        return await survey(Kafka(settings.kafka))
    except (KafkaError, TimeoutError, OSError) as error:
        problems.append({"service": "broker", "message": f"{broker_away(settings)}: {explain(error)}"})
        return None


async def _stored(
    settings: "Settings", problems: list[dict[str, str]]
) -> tuple[dict[str, int] | None, list[dict[str, Any]] | None]:
    from processors.store.queries import Queries
    from streams.errors import UnavailableError

    try:
        async with aclosing(Queries(settings.clickhouse)) as store:
            return await store.counts(), await store.dead_letter_counts()
    except UnavailableError as error:
        problems.append({"service": "clickhouse", "message": f"{error}{start_hint(settings)}"})
    return None, None


def _stage(
    name: str,
    positions: "list[Position] | None",
    reports: list[dict[str, Any]],
    *,
    partitions: bool = False,
) -> dict[str, Any]:
    ours = [report for report in reports if report["stage"] == name]
    stage: dict[str, Any] = {
        "stage": name,
        "lag": None if positions is None else sum(p.behind.records for p in positions),
        "exact": positions is None or all(p.behind.exact for p in positions),
        "caught_up": None if positions is None else all(p.behind == (0, True) for p in positions),
        "waiting_on": sorted({what for report in ours for what in report["waiting_on"]}),
    }
    if partitions and positions is not None:
        lives = {name: life for report in ours for name, life in report["partitions"].items()}
        stage["partitions"] = [
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
    return stage


def supervised(data_dir: Path) -> dict[str, Any]:
    """What the supervisor on this data directory says it runs, by process name; empty where there is none."""
    from infra.local.supervisor import read_state

    try:
        state = read_state(data_dir)
    except OSError:  # a directory that cannot be read is doctor's to name
        return {}
    return dict((state or {}).get("processes", {}))


def _reports(data_dir: Path) -> list[dict[str, Any]]:
    """What the live workers on this data directory say of themselves."""
    import psutil

    reports: list[dict[str, Any]] = []
    for path in sorted((data_dir / "status").glob("*.json")):
        try:
            report = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError):  # it ended just now
            continue
        if psutil.pid_exists(report["pid"]) and time.time() - report["written_at"] < FRESH_S:
            reports.append(report)
    return reports


def _worker(report: dict[str, Any]) -> dict[str, Any]:
    return {
        "pid": report["pid"],
        "partitions": len(report["partitions"]),
        "in_hand": sum(life["in_hand"] for life in report["partitions"].values()),
        "waiting_on": report["waiting_on"],
        "stall": report["stall"],
    }


def _print_status(state: dict[str, Any], settings: "Settings") -> None:
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
            for stage in state["stages"]
        ],
    )
    print_table(
        ("topic", "records", "in ClickHouse"),
        [
            (topic["topic"], _count_text(topic["records"], exact=topic["exact"]), topic["in_clickhouse"])
            for topic in state["topics"]
            if topic["records"] != 0 or topic["in_clickhouse"]
        ]
        or [("none has any", "", "")],
    )
    for letters in state["dead_letters"] or []:
        typer.echo(
            f"{letters['count']} dead letters of {letters['stage']} ({letters['kind']}): "
            f"`rewatch dlq ls --stage {letters['stage']}`"
        )
    for problem in state["problems"]:
        typer.echo(f"error: {problem['message']}", err=True)


def _count_text(count: int | None, *, exact: bool) -> Any:
    return count if exact or count is None else f"~{count}"
