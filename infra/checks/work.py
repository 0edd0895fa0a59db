"""Checks of the work itself: processes that keep dying, stages that wait, silent cameras, stray files, dead letters."""

import asyncio
from contextlib import aclosing
from datetime import UTC, datetime, timedelta

from infra.checks.check import Check, Context
from processors.ingest.inbox import strays
from processors.store.queries import Queries, Row
from streams.errors import UnavailableError
from streams.health import workers

# A day holds a night and a morning: who saw nothing in all of it is more likely dead than bored.
SILENT = timedelta(days=1)
# A camera that has been silent for longer was taken down, or was a demo: it has been told often enough.
FORGOTTEN = timedelta(days=7)

# Names in the inbox that are shown.
_SHOWN = 5

_WAITS = {
    "broker": "start the broker (kafka.bootstrap_servers), or mend what it refuses; the `broker` check says more",
    "llm": "look at the LLM server (llm.url): it is away, loading, or fails its test window",
    "store": "start ClickHouse (clickhouse.url), or run `rewatch migrate`; the `clickhouse` check says more",
    "images": "look at the image store (images)",
    "disk": "make room on the disk of data_dir",
    "folder": "look at ingest.folder.root: it cannot be read or written",
    "settings": "look at its log below data_dir: a setting or prompt cannot be used",
    "backlog": "detect or the LLM is behind, so new frames are shed (ingest.shed): more processes, or a faster model",
    "camera": "look at the camera, and at its address in ingest.snapshots",
}


async def processes(context: Context) -> list[Check]:
    """Processes of `rewatch up` that died and were started again."""
    died = {name: p for name, p in context.running.items() if p.get("restarts")}
    return [
        Check(
            f"process {name}",
            "warning",
            f"was restarted {process['restarts']} times; last: {_first_line(process.get('reason'))}",
            f"`tail -n 50 {process['log']}`",
        )
        for name, process in died.items()
    ]


async def stages(context: Context) -> list[Check]:
    """What the workers on this machine wait on."""
    checks: list[Check] = []
    for report in await asyncio.to_thread(workers, context.settings.data_dir):
        stage = report["stage"]
        # Ingest waits on several things at once, and names cameras: the first word is what it is.
        for what in (what for said in report["waiting_on"] for what in said.split(", ")):
            fix = _WAITS.get(what.partition(" ")[0], "`rewatch status` says more")
            checks.append(Check(f"stage {stage}", "warning", f"waits on {what}", fix))
        if report["stall"]:
            checks.append(Check(f"stage {stage}", "warning", report["stall"], "`rewatch up` restarts it within 60 s"))
    return checks


async def cameras(context: Context) -> list[Check]:
    """Cameras that sent within the last week, and nothing for a day."""
    rows = await _asked(
        context,
        "SELECT camera_id, max(arrived_at) AS last FROM frames GROUP BY camera_id HAVING last > now() - INTERVAL 7 DAY",
    )
    if not rows:
        return []
    now = datetime.now(UTC)
    silent = [
        f"{row['camera_id']} for {_span(now - row['last'])}" for row in rows if SILENT < now - row["last"] < FORGOTTEN
    ]
    if silent:
        fix = "look at the camera and at what sends its images; `rewatch dlq ls --stage ingest` lists what was refused"
        return [Check("cameras", "warning", f"silent: {', '.join(sorted(silent))}", fix)]
    return [Check("cameras", "ok", f"{len(rows)} sent images within a day")]


async def not_taken(context: Context) -> list[Check]:
    """Folders and files in the inbox that belong to no camera."""
    folder = context.settings.ingest.folder
    left = await asyncio.to_thread(strays, folder) if folder.enabled else []
    if not left:
        return []
    found = f"{folder.root}: {', '.join(map(repr, left[:_SHOWN]))}{' and more' if len(left) > _SHOWN else ''}"
    fix = (
        "put images into a folder below it that is named by its camera's id (a-z, 0-9, - and _), "
        "or map folders with ingest.folder.cameras"
    )
    return [Check("not taken", "warning", found, fix)]


async def dead_letters(context: Context) -> list[Check]:
    """How many are open."""
    settings = context.settings
    if settings.local_clickhouse and "clickhouse" not in context.running:
        return []
    async with aclosing(Queries(settings.clickhouse)) as store:
        try:
            open_ = await store.dead_letter_counts()
        except UnavailableError:  # the check of ClickHouse tells it
            return []
    if not open_:
        return [Check("dead letters", "ok", "none")]
    found = ", ".join(f"{row['count']} of {row['stage']} ({row['kind']})" for row in open_)
    fix = "`rewatch dlq ls`, `rewatch dlq show ORIGIN`, then `rewatch dlq redrive ORIGIN`"
    return [Check("dead letters", "warning", found, fix)]


async def _asked(context: Context, query: str) -> list[Row]:
    settings = context.settings
    if settings.local_clickhouse and "clickhouse" not in context.running:
        return []
    async with aclosing(Queries(settings.clickhouse)) as store:
        try:
            return await store.rows(query)
        except UnavailableError:  # the check of ClickHouse tells it
            return []


def _span(age: timedelta) -> str:
    hours = age.total_seconds() / 3600
    return f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} days"


def _first_line(text: str | None) -> str:
    return next(iter((text or "unknown").splitlines()))
