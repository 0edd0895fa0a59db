"""What the demo ends with: its footage judged again under the product's second prompt, and what that would change."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from infra import replays
from infra.cli import output, replay_work
from infra.cli.lifecycle import Stop
from infra.cli.replay_report import gathered, written
from infra.config import Settings
from infra.models.stories import Footage
from infra.replaying import Place
from processors.replay.comparison import Comparison
from processors.replay.conclusion import conclude
from processors.replay.plan import Scope
from schemas import prompts

_NAME = "strict-nights"

_SHOWN = 5
"""Windows that change, on the terminal; the report has them all."""


async def judge_again(
    settings: Settings, config: Path | None, console: Console, stop: Stop, footages: Sequence[Footage]
) -> dict[str, Any]:
    """Re-watch the footage under the second prompt, say what changes and where the report lies.

    It is what `rewatch replay run` does, with every window in the baseline too. Returns what `demo.json` keeps of it.

    Raises:
        UnavailableError or KafkaError: a server that the demo started does not answer any more.
    """
    version = prompts.deliveries_strict_nights()
    times = [int(frame.captured_at.timestamp() * 1000) for footage in footages for frame in footage.frames]
    asked = replay_work.Asked(version.name, None, None, None, None, None)
    wish = replay_work.Wish(asked, Scope(since=min(times), until=max(times) + 1), "fast", 1.0)
    interrupt = replay_work.Interrupt(stop.asked)
    place = Place(settings, config, {})
    async with replays.office(settings) as office:
        name = office.name("", _NAME)
        await replay_work.carried_out(office, place, wish, interrupt, name, baseline=len(times), ask=False, quiet=False)
    report = await gathered(settings, "live", name)
    path, _ = written(settings, report)
    found = report.comparison
    _show(console, found, version.name)
    console.print(f"  the report: {path}", soft_wrap=True, highlight=False)
    console.print(f"  .venv/bin/rewatch replay diff live {name}\n", soft_wrap=True, highlight=False)
    return {
        "name": name,
        "prompt": version.digest,
        "compared": found.compared,
        "flips": len(found.flips),
        "noise_floor": found.noise.floor if found.noise is not None else None,
        "report": str(path),
    }


def _show(console: Console, found: Comparison, prompt: str) -> None:
    table = Table("when", "camera", "was", "would be", "what", title=f"under the prompt {prompt}", box=box.SIMPLE)
    for flip in found.flips[:_SHOWN]:
        was, now = flip.pair.a, flip.pair.b
        table.add_row(
            output.when(was.started_at)[:16],
            was.camera_id,
            output.level_text(was.risk_level, was.risk_score),
            output.level_text(now.risk_level, now.risk_score),
            Text(now.summary),
        )
    if table.row_count:
        console.print(table)
    said = conclude(found)
    console.print(f"[bold]Re-watched[/bold] under another prompt: {said.headline} {said.verdict}", soft_wrap=True)
