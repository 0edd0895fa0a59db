"""How `rewatch replay` speaks: plans, outcomes and lists of replays, for people and for programs."""

import shlex
from typing import TYPE_CHECKING, Any

import msgspec
import typer

from infra.cli.lifecycle import duration
from infra.cli.output import print_table, printable, when

if TYPE_CHECKING:
    from infra.cli.replay_work import Outcome
    from infra.replays import Weighed
    from processors.replay.estimate import Estimate
    from processors.replay.plan import Plan, Scope
    from processors.store.queries import Row

NAMED = 10
"""Windows left out or failed that are named on a terminal; `--json` names more."""


_GONE = ", but its planner ended: resume it"


def print_rows(rows: "list[Row]", time_zone: str) -> None:
    """Replays, a line each."""
    print_table(
        ("replay", "id", "what", "state", "windows", "judged", "reused", "failed", "tokens", "began"),
        [
            (
                row["name"],
                row["replay_id"],
                _what(row["plan"]),
                row["state"] + (_GONE if row["gone"] else ""),
                row["plan"].windows,
                row["judged"],
                row["reused"],
                row["failed"],
                row["tokens"],
                when(row["began"], time_zone),
            )
            for row in rows
        ],
    )


def print_row(row: "Row", failed: "list[Row]", time_zone: str) -> None:
    """One replay, whole."""
    plan = row["plan"]
    _print_pairs(
        ("replay", f"{row['name']}  {row['replay_id']}"),
        ("what", _what(plan)),
        ("windows of", _which(plan.scope, time_zone)),
        ("mode", f"{plan.kind}, {plan.mode}, share {plan.share:g}"),
        ("state", f"{row['state']}{': ' + row['detail'] if row['detail'] else ''}{_GONE if row['gone'] else ''}"),
        ("began", when(row["began"], time_zone)),
        ("windows", f"{plan.windows}: {row['judged']} judged, {row['reused']} reused, {row['failed']} failed"),
        ("tokens", f"{row['tokens']} in {row['llm_ms'] / 1000:.0f} s of the LLM"),
        *((("baseline", plan.baseline),) if plan.baseline else ()),
    )
    for one in failed[:NAMED]:
        typer.echo(f"  failed  {printable(one['key'] or '')}: {printable(one['message'])}")
    for line in following(row["name"], row["state"], plan.kind):
        typer.echo(line)


def print_outcome(one: "Outcome") -> None:
    """How a run ended, its counts, and what was left out or failed."""
    told = one.progress
    what = {"done": "is done", "paused": "is paused", "cancelled": "was cancelled", "failed": "failed"}
    why = f": {one.why}" if one.why and one.state != "done" else ""
    typer.echo(f"{one.made.name} {what.get(one.state, 'goes on elsewhere')}{why}", err=one.state == "failed")
    counts = f"{told.judged} judged, {told.reused} reused, {told.failed} failed, {told.skipped} left out"
    pace = f", {told.judged / one.seconds:.1f} windows/s" if one.seconds > 1 and told.judged else ""
    typer.echo(f"  {counts}; {told.tokens} tokens; {duration(one.seconds)}{pace}")
    if one.strict is not None:
        compared, identical = one.strict
        typer.echo(f"  strict: {identical} of {compared} verdicts are the same byte for byte, by {told.judged} calls")
    if one.unproven:
        typer.echo(f"  strict: it does not show that the answers are the same: {one.unproven}", err=True)
    for kind, named in (("left out", one.left_out), ("failed", one.failures)):
        for name, why in list(named.items())[:NAMED]:
            typer.echo(f"  {kind}  {printable(name)}: {printable(why)}")
    if one.failures:
        typer.echo("  `rewatch dlq ls --stage replay` has what failed; `dlq redrive` tries it again")
    if not one.settled:
        typer.echo("  ClickHouse does not have all of it yet: `rewatch doctor` looks closer", err=True)


def following(name: str, state: str, kind: str = "change") -> list[str]:
    """The commands that come next."""
    called = shlex.quote(name)
    if state == "done":
        lines = [f"  rewatch replay diff live {called}"]
        return ["next:", *lines, *([f"  rewatch replay report {called}"] if kind == "change" else [])]
    if state in {"paused", "failed", "planned", "running"}:
        return [f"go on: rewatch replay resume {called}"]
    return []


def outcome_plain(one: "Outcome") -> dict[str, Any]:
    """The same, for programs."""
    told = one.progress
    plan = one.made.plan
    return {
        "replay_id": one.made.replay_id,
        "name": one.made.name,
        "kind": plan.kind,
        "mode": plan.mode,
        "state": one.state,
        "detail": one.why,
        "windows": told.total,
        "judged": told.judged,
        "reused": told.reused,
        "failed": told.failed,
        "left_out": told.skipped,
        "tokens": told.tokens,
        "seconds": round(one.seconds, 1),
        "in_clickhouse": one.settled,
        "why_left_out": one.left_out,
        "failures": one.failures,
        **({"compared": one.strict[0], "identical": one.strict[1]} if one.strict is not None else {}),
        **({"unproven": one.unproven} if plan.mode == "strict" else {}),
    }


def plan_plain(plan: "Plan", weighed: "Weighed", took: "Estimate") -> dict[str, Any]:
    """A plan and what it would take, for programs."""
    return {
        "kind": plan.kind,
        "mode": plan.mode,
        "entry": plan.change.entry,
        "change": msgspec.to_builtins(plan.change),
        "scope": msgspec.to_builtins(plan.scope),
        "windows": weighed.windows,
        "frames": plan.frames,
        "reused": weighed.reused,
        "left_out": weighed.left_out,
        "why_left_out": weighed.why,
        "prompt_tokens": took.prompt_tokens,
        "completion_tokens": took.completion_tokens,
        "llm_seconds": took.llm_s,
        "detector_seconds": took.detector_s,
        "seconds": took.seconds,
        "measured_on": took.by,
    }


def print_plan(plan: "Plan", weighed: "Weighed", took: "Estimate", time_zone: str) -> None:
    """A plan and what it would take, for people."""

    def seconds(value: float | None) -> str:
        return "not known" if value is None else duration(value)

    tokens = (
        "not known"
        if took.prompt_tokens is None or took.completion_tokens is None
        else f"{took.prompt_tokens + took.completion_tokens}: {took.prompt_tokens} of prompts, "
        f"{took.completion_tokens} of answers"
    )
    reused = f", {weighed.reused} of them judged so already" if weighed.reused else ""
    _print_pairs(
        ("what", _what(plan)),
        ("windows of", _which(plan.scope, time_zone)),
        ("enters at", plan.change.entry + (f", {plan.frames} frames" if plan.change.entry != "contexts" else "")),
        ("windows", f"{weighed.windows}{reused}"),
        ("left out", str(weighed.left_out)),
        ("tokens", tokens),
        ("LLM", f"{seconds(took.llm_s)} of one slot"),
        *((("detector", seconds(took.detector_s)),) if plan.change.detector else ()),
        ("lasts", f"{seconds(took.seconds)} with nothing else going on"),
        ("measured on", took.by),
    )
    for name, why in list(weighed.why.items())[:NAMED]:
        typer.echo(f"  left out  {printable(name)}: {printable(why)}")


def _print_pairs(*pairs: tuple[str, str]) -> None:
    width = max(len(name) for name, _ in pairs)
    for name, text in pairs:
        typer.echo(f"{name:<{width}}  {printable(text)}")


def row_plain(row: "Row") -> dict[str, Any]:
    """A replay, for programs."""
    plan = row["plan"]
    return {name: value for name, value in row.items() if name != "plan"} | {
        "kind": plan.kind,
        "mode": plan.mode,
        "change": msgspec.to_builtins(plan.change),
        "scope": msgspec.to_builtins(plan.scope),
        "windows": plan.windows,
        "share": plan.share,
        "max_tokens": plan.max_tokens,
        "baseline": plan.baseline,
    }


def _what(plan: "Plan") -> str:
    """The change in words."""
    change = plan.change
    parts = [
        *([f"prompt {change.prompt[:12]}"] if change.prompt else []),
        *([f"model {change.llm.model_path.rpartition('/')[2] or change.llm.url}"] if change.llm is not None else []),
        *([f"threshold {change.threshold:g}"] if change.threshold is not None else []),
        *([f"idle {change.idle_ms / 1000:g} s"] if change.idle_ms is not None else []),
        *([f"max {change.max_ms / 1000:g} s"] if change.max_ms is not None else []),
        *([f"detector {change.detector}"] if change.detector else []),
    ]
    return ", ".join(parts) or ("the same again, strictly" if plan.mode == "strict" else "the same again")


def _which(scope: "Scope", time_zone: str) -> str:
    """The scope in words."""
    parts = [
        ", ".join(scope.cameras) or "all cameras",
        *([f"from {when(scope.since, time_zone)}"] if scope.since is not None else []),
        *([f"until {when(scope.until, time_zone)}"] if scope.until is not None else []),
        *([f"where {scope.where}"] if scope.where else []),
        *([f"a sample of {scope.sample}"] if scope.sample is not None else []),
    ]
    return ", ".join(parts)
