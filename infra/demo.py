"""`rewatch demo`: rendered footage of three cameras through everything, on real parts, shown as it happens.

Nothing here knows what will be found: it copies JPEGs into the inbox as cameras would, then asks ClickHouse.
"""

import asyncio
import json
import shlex
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

from infra.cli import output
from infra.cli.lifecycle import Stop, bring_up, duration, narrate
from infra.cli.show import collect
from infra.config import Settings
from infra.demo_replay import judge_again
from infra.installation import Installation, strictly
from infra.models.bands import Said, Told, summary, told
from infra.models.recordings import write_recordings
from infra.models.stories import CAMERAS, DEFAULT_SEED, Footage, write_footage
from processors.store.queries import Queries
from streams.kafka import Kafka
from streams.messages import Tick
from streams.topics import partition_of

# Everything is on this machine, so a drain takes seconds; this bounds a demo whose machine is overwhelmed.
_DRAIN_S = 300.0
# Enough of an id to be unique here, and short enough to type: `rewatch explain` takes a prefix.
_ID_PREFIX = 8

TRY = (
    "SELECT camera_id, risk_level, count() AS events FROM events GROUP BY ALL ORDER BY events DESC",
    "SELECT hour, camera_id, frames, windows FROM camera_activity ORDER BY hour, camera_id",
    "SELECT topic, records, last_at FROM pipeline_lag ORDER BY topic",
)


# A demo makes some 15 events; this is a month of demos.
_MANY = 1000
_MONTH = timedelta(days=30)

# Cameras write the date into their pictures, and a toy detector sees a speck of some nights as something: the first day
# is the same for everybody, so that what the demo shows is what was measured.
_FIRST_DAY = date(2026, 10, 22)
# A story stays at its time of the day, by light and by meaning: half of the shortest way to dusk or dawn.
_DRIFT_S = 15 * 60


class DemoError(RuntimeError):
    """The demo did not end as it must; the message says what is missing."""


async def run_demo(settings: Settings, config: Path | None, console: Console, stop: Stop, *, days: int = 1) -> bool:
    """Play the footage of so many days, show the events, write `<data_dir>/demo.json`.

    It is judged under strict conditions where the settings do not say otherwise, so that `replay run --mode strict` can
    show that the same question has the same answer.

    The file has what `rewatch status --json` says at the end, `seconds`, `stories` (see `infra.models.bands`), and
    `replay`: what a second prompt would have changed.

    Returns False where it was asked to stop before the end.

    Raises:
        DemoError: not every frame came out at the other end.
    """
    folder = settings.ingest.folder
    if not folder.enabled or folder.after == "leave":
        raise DemoError("the demo plays through the inbox: set ingest.folder.enabled on, ingest.folder.after to move")
    began = time.monotonic()
    seconds: dict[str, float] = {"install": _install_seconds()}
    lasting = "one day" if days == 1 else f"{days} days"
    console.print(f"[bold]rewatch demo[/bold]: three cameras, {lasting}, everything on this machine", soft_wrap=True)
    settings, environment = strictly(settings)
    installation = Installation(settings, config)
    installation.environment.update(environment)
    if not await bring_up(installation, console, stop):
        console.print("stopped before anything was played", soft_wrap=True)
        return False
    progress = _Progress(began)
    telling = asyncio.create_task(narrate(installation, console))
    try:
        seconds["start"] = time.monotonic() - began
        showing = asyncio.create_task(_show(settings, console, progress, seconds, days))
        stopping = asyncio.create_task(stop.asked.wait())
        try:
            await asyncio.wait({showing, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if stop.asked.is_set():
                return False
            state, footages = await showing
        finally:
            for task in (showing, stopping):
                task.cancel()
            await asyncio.gather(showing, stopping, return_exceptions=True)
        stories = [story for footage in footages for story in await _told(settings, footage)]
        riskiest = await _show_found(settings, console, stories, state)
        state["replay"] = await judge_again(settings, config, console, stop, footages)
        if stop.asked.is_set():
            return False
        _suggest(settings, console, riskiest)
    finally:
        telling.cancel()
        with console.status("stopping ..."):
            await installation.__aexit__(None, None, None)
        if stop.asked.is_set():
            console.print(progress.summary(settings), soft_wrap=True)
    seconds["total"] = time.monotonic() - began
    state["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    state["stories"] = summary(stories)
    (settings.data_dir / "demo.json").write_text(json.dumps(state, indent=2))
    console.print(f"{seconds['total']:.0f} s in all; the data stay in {settings.data_dir}", soft_wrap=True)
    return True


class _Progress:
    """How far a demo is, for whoever stops it."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.frames = 0
        self.taken = 0
        self.events = 0

    def summary(self, settings: Settings) -> str:
        """A line for people."""
        lasted = duration(time.monotonic() - self.began)
        return (
            f"stopped after {lasted}: {self.taken} of {self.frames} frames taken, {self.events} events; "
            f"data stay in {settings.data_dir}, and `rewatch up` goes on with what is left"
        )


async def _show(
    settings: Settings, console: Console, progress: _Progress, seconds: dict[str, float], days: int
) -> tuple[dict[str, Any], list[Footage]]:
    """Play, print events as they come, wait for the end; return what `rewatch status --json` says then."""
    footages = []
    watch = _Watch(settings, console, progress, seconds)
    await watch.look()
    watching: asyncio.Task[None] | None = None
    try:
        for number in range(days):  # while one day is drawn, the stages work on those before
            with console.status(f"drawing {_nth_day(number, days)}: 11 small stories at three cameras ..."):
                footage = await asyncio.to_thread(_render, settings, number, days)
            footages.append(footage)
            progress.frames += len(footage.frames)
            what = (
                f"playing {len(footage.frames)} frames of {_nth_day(number, days)} into {settings.ingest.folder.root}/"
            )
            console.print(f"{what}; what is found, as it is found:" if watching is None else what, soft_wrap=True)
            watching = watching or asyncio.create_task(watch.run())
            await _play(settings, footage, progress, console)
        state = await _drained(settings, console, progress.frames)
    finally:
        if watching is not None:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
    await watch.look()
    return state, footages


def _nth_day(number: int, days: int) -> str:
    return "the day" if days == 1 else f"day {number + 1} of {days}"


def write_demo_footage(directory: Path, console: Console, *, mp4: bool) -> None:
    """`rewatch demo --footage`: write the day's footage and say how to take it in; nothing is started."""
    with console.status("drawing the day: 11 small stories at three cameras ..."):
        if mp4:
            with tempfile.TemporaryDirectory() as scratch:
                footage = write_footage(Path(scratch))
                made = write_recordings(footage, directory)
        else:
            footage = write_footage(directory)
            made = [directory / camera for camera in CAMERAS]
    what = "recordings, a frame at each capture time" if mp4 else "JPEGs in folders, as cameras upload them"
    console.print(f"{len(footage.frames)} frames of one day at three cameras, as {what}; take them in by:")
    for path in made:
        command = "video" if mp4 else "dir"
        console.print(f"  rewatch ingest {command} {shlex.quote(str(path))} --camera {path.stem}", soft_wrap=True)


def _render(settings: Settings, number: int, days: int) -> Footage:
    """A day of footage that this data directory has not seen: a day twice would only be repeats.

    Of several days the first is as it always is; the others have other people, cars and minutes.
    """
    directory = settings.data_dir / "demo"
    drawn = {date.fromisoformat(path.name) for path in directory.glob("????-??-??")}
    day = next_day(drawn, datetime.now(UTC).date(), days)
    drift_s = _DRIFT_S if number else 0
    return write_footage(directory / day.isoformat(), seed=DEFAULT_SEED + number, day=day, drift_s=drift_s)


def next_day(drawn: set[date], today: date, days: int = 1) -> date:
    """The day to draw: the first is always the same, each next one a day later, and from today on they go backwards.

    Many drawn at once begin a month back, or as many days as they are: a camera's time does not go backwards.
    """
    if not drawn:
        return _FIRST_DAY if days == 1 else today - max(_MONTH, timedelta(days=days))
    later = max(drawn) + timedelta(days=1)
    return later if later < today else min(drawn) - timedelta(days=1)


async def _play(settings: Settings, footage: Footage, progress: _Progress, console: Console) -> None:
    """Drop the files into the inbox as cameras do, in order; then say that no more will come."""
    inbox = settings.ingest.folder.root
    with Bar(transient=True, console=console) as bar:
        task = bar.add_task("frames", total=len(footage.frames))
        waiting: list[Path] = []
        for frame in footage.frames:
            target = inbox / frame.camera / frame.path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_suffix(".part")
            shutil.copyfile(frame.path, part)
            part.rename(target)
            waiting.append(target)
        while waiting:
            await asyncio.sleep(0.1)
            waiting = [path for path in waiting if path.exists()]
            progress.taken = progress.frames - len(waiting)
            bar.update(task, completed=len(footage.frames) - len(waiting))
    kafka = Kafka(settings.kafka)
    producer = kafka.producer()
    try:
        await producer.start()
        for camera in CAMERAS:
            tick = Tick(int(time.time() * 1000), camera).emit("frames")
            await producer.send_and_wait(
                tick.topic,
                key=tick.key,
                value=None,
                headers=list(tick.headers),
                partition=partition_of(camera, settings.kafka.partitions),
            )
    finally:
        await producer.stop()


class _Watch:
    """Prints each event once, as it arrives in ClickHouse."""

    def __init__(self, settings: Settings, console: Console, progress: _Progress, seconds: dict[str, float]) -> None:
        self._settings = settings
        self._console = console
        self._progress = progress
        self._seconds = seconds
        self._seen: set[str] | None = None

    async def run(self) -> None:
        """Look twice a second, until it is cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(0.5)

    async def look(self) -> None:
        """Print what came since the last look; what was there at the first is not news."""
        async with aclosing(Queries(self._settings.clickhouse)) as queries:
            events = await queries.events(limit=_MANY)
        if self._seen is None:
            self._seen = {event["event_id"] for event in events}
        for event in reversed(events):
            if event["event_id"] not in self._seen:
                self._seen.add(event["event_id"])
                self._progress.events += 1
                self._seconds.setdefault("first_event", time.monotonic() - self._progress.began)
                level = output.level_text(event["risk_level"], event["risk_score"])
                level.pad_right(12 - len(level))
                line = Text(f"{event['started_at']:%H:%M:%S}  {event['camera_id']:<12}")
                self._console.print(line.append_text(level).append(f"  {event['summary']}"), soft_wrap=True)


async def _drained(settings: Settings, console: Console, frames: int) -> dict[str, Any]:
    """Wait until every frame is at the other end; return what `rewatch status --json` says then."""
    deadline = time.monotonic() + _DRAIN_S
    with console.status("waiting for the last windows ..."):
        while True:
            state = await collect(settings)
            missing = _missing(state)
            if not missing:
                return state
            if time.monotonic() > deadline:
                raise DemoError(f"after {_DRAIN_S:.0f} s of waiting for {frames} frames: {'; '.join(missing)}")
            await asyncio.sleep(1)


def _missing(state: dict[str, Any]) -> list[str]:
    """What is not at the other end yet, a line each. ClickHouse may know more than the log: it keeps it longer."""
    if state["problems"]:
        return [problem["message"] for problem in state["problems"]]
    topics = {topic["topic"]: topic for topic in state["topics"]}
    records = {name: topic["records"] for name, topic in topics.items()}
    failed = Counter[str]()  # open ones only: what was resolved has its results
    for row in state["dead_letters"] or ():
        failed[row["stage"]] += row["count"]
    return [
        *(f"{s['stage']} lags by {s['lag']}" for s in state["stages"] if s.get("lag")),
        *(
            f"{name}: {topic['in_clickhouse']} of {topic['records']} in ClickHouse"
            for name, topic in topics.items()
            if topic["in_clickhouse"] < topic["records"]
        ),
        *([] if records["detections"] + failed["detect"] >= records["frames"] else ["frames without detections"]),
        *([] if records["contexts"] + failed["enrich"] >= records["batches"] else ["batches without contexts"]),
        *([] if records["risk_events"] + failed["analyze"] >= records["contexts"] else ["contexts without events"]),
    ]


async def _told(settings: Settings, footage: Footage) -> list[Told]:
    """The day's stories with the events that ClickHouse has of them."""
    times = [frame.captured_at for frame in footage.frames]
    async with aclosing(Queries(settings.clickhouse)) as queries:
        rows = await queries.rows(
            "SELECT event_id, camera_id, started_at, risk_level, risk_score FROM events "
            "WHERE started_at >= fromUnixTimestamp64Milli({first:Int64}) "
            "AND started_at <= fromUnixTimestamp64Milli({last:Int64})",
            first=int(min(times).timestamp() * 1000),
            last=int(max(times).timestamp() * 1000),
        )
    events = [
        Said(row["event_id"], row["camera_id"], row["started_at"], row["risk_level"], row["risk_score"]) for row in rows
    ]
    return told(footage, events)


async def _show_found(
    settings: Settings, console: Console, stories: list[Told], state: dict[str, Any]
) -> Sequence[Mapping[str, Any]]:
    """The stories, the riskiest events and the topics, as tables; those events."""
    _show_stories(console, stories, state)
    async with aclosing(Queries(settings.clickhouse)) as queries:
        riskiest = await queries.events(limit=5, order="risk")
        table = Table("when", "camera", "risk", "what", "event", title="the riskiest events", box=box.SIMPLE)
        for event in riskiest:
            table.add_row(
                f"{event['started_at']:%Y-%m-%d %H:%M}",
                event["camera_id"],
                output.level_text(event["risk_level"], event["risk_score"]),
                Text(event["summary"]),
                Text(_short(event["event_id"])),
            )
        console.print(table)
    state = await collect(settings)
    counts = Table(
        "topic",
        Column("records", justify="right"),
        Column("in ClickHouse", justify="right"),
        title="every topic",
        box=box.SIMPLE,
    )
    for topic in state["topics"]:
        if topic["records"]:
            counts.add_row(topic["topic"], str(topic["records"]), str(topic["in_clickhouse"]))
    console.print(counts)
    return riskiest


def _suggest(settings: Settings, console: Console, riskiest: Sequence[Mapping[str, Any]]) -> None:
    """What to try next."""
    console.print("[bold]look further[/bold], with `.venv/bin/rewatch up` running on the same data:", soft_wrap=True)
    if settings.gateway.enabled:
        console.print(f"  {settings.gateway.url} in a browser", soft_wrap=True, highlight=False)
    if riskiest:
        console.print(f"  .venv/bin/rewatch explain {_short(riskiest[0]['event_id'])}", soft_wrap=True, highlight=False)
    for query in TRY:
        console.print(f'  .venv/bin/rewatch sql "{query}"', soft_wrap=True, highlight=False)
    console.print("  .venv/bin/rewatch --help", soft_wrap=True)


def _show_stories(console: Console, stories: list[Told], state: dict[str, Any]) -> None:
    """What happened beside what was said, and by whom."""
    table = Table(
        "when",
        "camera",
        "what happened",
        "should be",
        "was said",
        "",
        title="the day's stories: what happened, what was said",
        box=box.SIMPLE,
    )
    alone = len({one.began.date() for one in stories}) == 1
    for one in stories:
        if one.right and not alone:
            continue  # of many days what went wrong is what is worth reading
        riskiest = one.said[0] if one.said else None
        table.add_row(
            f"{one.began:%H:%M}" if alone else f"{one.began:%Y-%m-%d %H:%M}",
            one.story.camera,
            one.story.name,
            " or ".join(one.story.levels) or "no event",
            output.level_text(riskiest.level, riskiest.score) if riskiest is not None else Text("no event"),
            Text("right", style="green") if one.right else Text("wrong", style="red"),
        )
    if not alone:
        table.title = "stories that were judged wrong: what happened, what was said"
    if table.row_count:
        console.print(table)
    counts = summary(stories)
    console.print(
        f"{counts['right']} of {counts['told']} stories judged right by their riskiest event; "
        f"{counts['in_intended_band']} of {counts['events']} events have the level meant for their story",
        soft_wrap=True,
    )
    if any(model["toy"] for model in state["models"]):
        console.print(
            "Drawn scenes, judged by toys that know nothing else and guard nothing. Real models in their places: "
            "[bold]rewatch models pull NAME && rewatch models use NAME[/bold], with a NAME of `rewatch models ls`",
            soft_wrap=True,
        )


def _short(event_id: str) -> str:
    camera, name, *_ = event_id.split(":")
    return f"{camera}:{name[:_ID_PREFIX]}"


def _install_seconds() -> float:
    """How long `make` took to install, which it wrote beside the environment; 0 where it was there already."""
    ready = Path(".venv/.ready")
    try:
        return float(ready.read_text().strip() or 0)
    except (OSError, ValueError):
        return 0.0
