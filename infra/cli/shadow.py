"""`rewatch shadow start|stop|ls`: live windows judged by a second prompt version too, as they come."""

import asyncio
import shlex
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.cli import complete
from infra.cli.errors import run
from infra.cli.help import PROMPTS, examples
from infra.cli.output import NO, USAGE, JsonFlag, fail, print_json, print_table, printable, when
from infra.cli.prompts import check_camera, check_name, find_version, load_prompts, short

if TYPE_CHECKING:
    from infra.config import Settings
    from processors.replay.plan import Bound
    from processors.replay.shadows import Shadow
    from processors.store.queries import Row
    from schemas.prompts import PromptVersion
    from schemas.records import Replay
    from streams.control import ControlTable
    from streams.prompts import Prompts

app = typer.Typer(no_args_is_help=True)


def register(root: typer.Typer) -> None:
    """Add these commands to the root."""
    root.add_typer(
        app,
        name="shadow",
        rich_help_panel=PROMPTS,
        help="Have a second prompt version judge live windows too; nobody is alerted.",
        epilog=examples(
            "rewatch shadow start --prompt 3fa9c1 --share 0.2",
            "rewatch shadow ls",
            "rewatch shadow stop shadow-calmer",
        ),
    )


@app.command(
    "start",
    epilog=examples(
        "rewatch shadow start --prompt 3fa9c1              # a fifth of all live windows",
        "rewatch shadow start --prompt calmer --share 1 --camera front-door",
        "rewatch shadow start --prompt calmer --name try --json",
    ),
)
def start(  # noqa: PLR0917 (typer makes options of parameters)
    ctx: typer.Context,
    prompt: Annotated[
        str,
        typer.Option(help="The version: a name, a digest or its beginning.", autocompletion=complete.prompts),
    ],
    share: Annotated[
        float, typer.Option(min=0.0001, max=1, help="Share of live windows, drawn by hash: the same for every shadow.")
    ] = 0.2,
    camera: Annotated[
        list[str] | None,
        typer.Option(help="This camera only; can be given more than once.", autocompletion=complete.cameras),
    ] = None,
    name: Annotated[str, typer.Option(help="What to call it; without one a name is made.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Have a version judge live windows too, from now on, beside the one in force.

    What it says goes to `replay_events` and alerts nobody. Its calls wait for those of live windows; each takes what a
    live one takes of the LLM, so a share of 0.2 is a fifth more work.
    """
    settings: Settings = ctx.obj
    if name:
        check_name(name)

    async def main() -> "tuple[PromptVersion, Replay]":
        from processors.replay.plan import Change, Plan, Scope, replay_id
        from schemas.records import Replay

        known, table = await _load(settings)
        found = find_version(known, prompt)
        for one in camera or ():
            await check_camera(settings, one)
        called = _name(table, name, found)
        await _check_prompt(settings, found)
        await known.add(found, f"for shadow {called}")
        scope, change = Scope(cameras=tuple(dict.fromkeys(camera or ()))), Change(prompt=found.digest)
        plan = Plan(kind="shadow", scope=scope, change=change, share=share, since=await _since(settings))
        now = int(time.time() * 1000)
        made = Replay(
            replay_id=replay_id(called, now),
            name=called,
            state="running",
            plan=plan.encode(),
            updated_at=now,
            detail="started",
        )
        await table.append(made)
        return found, made

    found, made = run(settings, main, doing="checking ...")
    if as_json:
        print_json({"replay_id": made.replay_id, "name": made.name, "prompt": found.digest, "share": share})
        return
    whose = f"camera {', '.join(camera)}" if camera else "all cameras"
    part = f"{100 * share:.4g} %"
    typer.echo(
        f"{made.name} ({made.replay_id}): {short(found)} judges {part} of the live windows of {whose} too, "
        f"from now on; `rewatch shadow ls` tells what it says, `rewatch shadow stop {shlex.quote(made.name)}` ends it"
    )
    if not _at_work(settings):
        typer.echo("nothing judges on this machine now: `rewatch up`", err=True)


@app.command("stop", epilog=examples("rewatch shadow stop shadow-calmer", "rewatch shadow stop r3fa9c17 --json"))
def stop(
    ctx: typer.Context,
    shadow: Annotated[
        str,
        typer.Argument(metavar="NAME", help="A name, an id or its beginning.", autocompletion=complete.shadows),
    ],
    as_json: JsonFlag = False,
) -> None:
    """End a shadow; what it said stays, to be compared and to be evidence."""
    from infra.replays import UnknownReplayError, choose

    settings: Settings = ctx.obj

    async def main() -> "Shadow":
        from msgspec.structs import replace

        _, table = await _load(settings)
        found = _shadows(table)
        try:
            chosen = choose(shadow, [(one.replay_id, one.name, one.at) for one in found])
        except UnknownReplayError:
            running = ", ".join(one.name for one in found if one.running) or "none runs"
            fail(f"there is no shadow {shadow!r}, or several begin so; running: {running}; `rewatch shadow ls`", NO)
        one = next(one for one in found if one.replay_id == chosen)
        if not one.running:
            fail(f"shadow {one.name} was stopped at {when(one.at, settings.time_zone)}", NO)
        step = replace(one.record, state="done", detail="stopped", updated_at=int(time.time() * 1000))
        await table.append(step)
        return one

    ended = run(settings, main)
    if as_json:
        print_json({"replay_id": ended.replay_id, "name": ended.name, "state": "done"})
    else:
        typer.echo(f"{ended.name} is stopped; what it said: `rewatch replay diff live {shlex.quote(ended.name)}`")


@app.command("ls", epilog=examples("rewatch shadow ls", "rewatch shadow ls --json"))
def ls(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """List shadows with what they said: verdicts, and where the live one has another level.

    An alarm is a level of high or critical. `new` and `lost` are alarms that the shadow raises and live does not, and
    the reverse. Failed: windows that it could not judge (`rewatch dlq ls --stage replay`).
    """
    settings: Settings = ctx.obj

    async def main() -> "tuple[Prompts, list[Shadow], dict[str, Row]]":
        from processors.replay.shadows import said
        from processors.store.queries import Queries

        known, table = await _load(settings)
        found = _shadows(table)
        async with aclosing(Queries(settings.clickhouse)) as store:
            return known, found, await said(store, [one.replay_id for one in found])

    known, found, counts = run(settings, main)
    names = {digest: one.version.name for digest, one in known.versions().items()}
    told = [_told(one, names.get(one.prompt, ""), counts[one.replay_id]) for one in found]
    if as_json:
        print_json(told)
        return
    print_table(
        (
            "shadow",
            "state",
            "version",
            "share",
            "cameras",
            "since or until",
            "verdicts",
            "flips",
            "new",
            "lost",
            "failed",
        ),
        [
            (
                one["name"],
                one["state"],
                one["prompt"]["name"] or one["prompt"]["digest"][:12],
                one["share"],
                ", ".join(one["cameras"]) or "all",
                when(one["at"], settings.time_zone),
                one["verdicts"],
                _of(one["flips"], one["compared"]),
                one["alarms_new"],
                one["alarms_lost"],
                one["failed"],
            )
            for one in told
        ],
    )


def _told(one: "Shadow", version: str, counts: "Row") -> dict[str, Any]:
    return {
        "replay_id": one.replay_id,
        "name": one.name,
        "state": one.record.state,
        "prompt": {"digest": one.prompt, "name": version},
        "share": one.plan.share,
        "cameras": list(one.plan.scope.cameras),
        "at": one.at,
        **counts,
    }


def _of(flips: int, compared: int) -> str:
    return f"{flips} of {compared}" + (f" ({flips / compared:.1%})" if compared else "")


async def _load(settings: "Settings") -> "tuple[Prompts, ControlTable[Replay]]":
    """Prompt versions and replays, as they are on the log."""
    from schemas.records import Replay
    from streams.control import ControlTable
    from streams.kafka import Kafka

    table = ControlTable(Kafka(settings.kafka), "replays", Replay)
    known, _ = await asyncio.gather(load_prompts(settings), table.load())
    return known, table


def _shadows(table: "ControlTable[Replay]") -> "list[Shadow]":
    from processors.replay.shadows import shadows

    return shadows(table.all().values())


def _name(table: "ControlTable[Replay]", wanted: str, version: "PromptVersion") -> str:
    """A name that no other replay or shadow has."""
    taken = {"live", *table.all()} | {record.name for record in table.all().values()}
    if wanted in taken:
        fail(f"--name {printable(wanted)}: another replay or shadow has it; choose another", USAGE)
    base = f"shadow-{version.name or version.digest[:8]}"
    return wanted or next(
        name
        for number in range(1, len(taken) + 2)
        if (name := base if number == 1 else f"{base}-{number}") not in taken
    )


async def _check_prompt(settings: "Settings", version: "PromptVersion") -> None:
    """That it can be rendered, and leaves room: a shadow that fails at every window shows nothing."""
    from infra import prompts
    from schemas.prompts import PromptError

    try:
        async with prompts.servers(settings) as llms:
            await prompts.check(settings, llms, version)
    except PromptError as error:
        fail(f"not started: {error}", NO)


async def _since(settings: "Settings") -> "tuple[Bound, ...]":
    """Where live windows end now."""
    from aiokafka import TopicPartition

    from processors.replay.plan import Bound
    from streams.admin import ensure_topics
    from streams.kafka import Kafka

    kafka = Kafka(settings.kafka)
    epoch = (await ensure_topics(kafka))["contexts"].epoch
    bounds = await kafka.bounds([TopicPartition("contexts", number) for number in range(settings.kafka.partitions)])
    return tuple(
        Bound(topic=tp.topic, epoch=epoch, partition=tp.partition, offset=end) for tp, (_, end) in bounds.items()
    )


def _at_work(settings: "Settings") -> bool:
    """Whether a process on this machine judges what shadows judge."""
    from streams.health import workers

    return any(report["stage"] == "replay" for report in workers(settings.data_dir))
