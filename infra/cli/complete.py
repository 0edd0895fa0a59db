"""What TAB completes: cameras, events, dead letters, topics and stages, from the running system or from nothing.

A person who pressed TAB waits half a second at most and reads no errors. Checking the settings alone would take
that long, so the few that are needed are taken as they are written; what is wrong in them the command will say.
"""

import contextlib
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

# Together with a start of about 0.3 s this stays below what a hand on the keyboard notices.
_PATIENCE_S = 0.25
_EVENTS = 50

STAGES = ("ingest", "gateway", "detect", "batch", "enrich", "analyze", "sink", "telemetry", "replay")
"""`infra.topology.PROCESSES`, whose import takes longer than a completion may; a test holds them together."""
TABLES = (
    *("frames", "detections", "batches", "contexts", "risk_events", "labels", "alerts", "prompts", "cameras"),
    *("replays", "replay_units", "replay_events", "gpu_metrics", "dead_letters", "dead_letter_status", "holds"),
)
"""`streams.topics.STORED`, for the same reason."""
PROMPTS = ("default", "deliveries-strict-nights")
"""Names of `schemas.prompts.shipped()`, for the same reason."""
KINDS = ("error", "gap", "rejected", "shed")

Completions = Iterator[tuple[str, str]]
"""Values and what shells that can show help show beside them."""


def cameras(ctx: typer.Context, incomplete: str) -> Completions:
    """Ids of cameras that begin so."""
    query = "SELECT camera_id, argMax(name, updated_at) AS name FROM cameras GROUP BY camera_id ORDER BY camera_id"
    for row in _ask(ctx, query):
        if row["camera_id"].startswith(incomplete):
            yield row["camera_id"], row["name"]


def events(ctx: typer.Context, incomplete: str) -> Completions:
    """The newest events, by the part of their id behind the camera: bash takes a colon for the end of a word."""
    query = f"SELECT camera_id, event_id, risk_score, risk_level, summary FROM events ORDER BY started_at DESC LIMIT {_EVENTS}"  # noqa: E501, S608 (a number of ours)
    for row in _ask(ctx, query):
        whole, name = row["event_id"], row["event_id"].split(":")[1]
        shown = whole if ":" in incomplete else name
        if shown.startswith(incomplete):
            yield shown, f"{row['camera_id']}, {row['risk_score']} {row['risk_level']}: {row['summary']}"


def letters(ctx: typer.Context, incomplete: str) -> Completions:
    """Origins of the newest dead letters that begin so."""
    query = f"SELECT origin, stage, message FROM dead_letters ORDER BY failed_at DESC LIMIT 1 BY origin LIMIT {_EVENTS}"  # noqa: S608
    for row in _ask(ctx, query):
        if row["origin"].startswith(incomplete):
            yield row["origin"], f"{row['stage']}: {row['message']}"


def prompts(ctx: typer.Context, incomplete: str) -> Completions:
    """Names of prompt versions, or digests where a beginning of one stands there already."""
    query = (
        "SELECT digest, name, comment FROM prompts WHERE kind = 'version' ORDER BY created_at DESC LIMIT 1 BY digest"
    )
    known = {"active": "in force"} | dict.fromkeys(PROMPTS, "comes with the product")
    rows = _ask(ctx, query)
    known |= {row["name"]: row["comment"] for row in reversed(rows) if row["name"]}
    if incomplete:
        known |= {row["digest"][:12]: row["name"] for row in rows}
    yield from ((name, what) for name, what in known.items() if name.startswith(incomplete))


def replays(ctx: typer.Context, incomplete: str) -> Completions:
    """Names of replays that begin so."""
    query = "SELECT name, argMax(state, (updated_at, offset)) AS state FROM replays GROUP BY name ORDER BY name"
    for row in _ask(ctx, query):
        if row["name"].startswith(incomplete):
            yield row["name"], row["state"]


def shadows(ctx: typer.Context, incomplete: str) -> Completions:
    """Names of shadows that run and begin so."""
    query = (
        "SELECT name, argMax(state, (updated_at, offset)) AS state FROM replays "
        "WHERE JSONExtractString(plan, 'kind') = 'shadow' GROUP BY name HAVING state = 'running' ORDER BY name"
    )
    for row in _ask(ctx, query):
        if row["name"].startswith(incomplete):
            yield row["name"], row["state"]


def stages(incomplete: str) -> list[str]:
    """Names of stages that begin so."""
    return [stage for stage in STAGES if stage.startswith(incomplete)]


def tables(incomplete: str) -> list[str]:
    """Names of ClickHouse's typed tables that begin so."""
    return [table for table in TABLES if table.startswith(incomplete)]


def kinds(incomplete: str) -> list[str]:
    """Kinds of dead letters that begin so."""
    return [kind for kind in KINDS if kind.startswith(incomplete)]


def _ask(ctx: typer.Context, query: str) -> list[dict[str, Any]]:
    """The rows, or none where ClickHouse is away, slow or cannot answer."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        url, database, user, password = address(ctx.find_root().params.get("config"))
        request = urllib.request.Request(  # noqa: S310 (the address that the settings name)
            f"{url.rstrip('/')}/?{urllib.parse.urlencode({'database': database, 'default_format': 'JSON'})}",
            data=query.encode(),
            headers={"X-ClickHouse-User": user} | ({"X-ClickHouse-Key": password} if password else {}),
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=_PATIENCE_S) as answer:
            rows: list[dict[str, Any]] = json.load(answer)["data"]
            return rows
    return []


def address(config: Path | None = None) -> tuple[str, str, str, str]:
    """ClickHouse's URL, database, user and password as they are written: environment, file, defaults."""
    file = config or Path("rewatch.yaml")
    tree: Any = None
    if file.exists():
        import yaml

        with contextlib.suppress(yaml.YAMLError):
            tree = yaml.safe_load(file.read_text())

    def setting(section: str, name: str, default: str) -> str:
        environment = {variable.upper(): value for variable, value in os.environ.items()}
        written = environment.get(f"REWATCH_{section}__{name}".upper())
        if written is None and isinstance(tree, dict) and isinstance(tree.get(section), dict):
            written = tree[section].get(name)
        return default if written is None else str(written)

    here = f"http://127.0.0.1:{setting('local', 'clickhouse_port', '8123')}"
    return (
        setting("clickhouse", "url", here),
        setting("clickhouse", "database", "rewatch"),
        setting("clickhouse", "user", "default"),
        setting("clickhouse", "password", ""),
    )
