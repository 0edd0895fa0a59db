"""`rewatch prompt ls|show|new|edit|diff|test|promote|rollback`: prompt versions, and which judges a camera."""

import difflib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from infra.cli import complete, prompt
from infra.cli.errors import run
from infra.cli.help import examples
from infra.cli.output import NO, USAGE, JsonFlag, console, fail, level_text, print_json, print_table, printable, when

if TYPE_CHECKING:
    from infra.config import Settings
    from infra.prompts import Shown, Tried
    from infra.recorded import Recorded
    from schemas.prompts import PromptVersion
    from schemas.records import PromptRecord, Replay
    from streams.prompts import Prompts

app = prompt.app
register = prompt.register

_DIGEST = 12
"""Characters of a digest that people are shown: two versions in a lifetime do not share them."""

_NAME = re.compile(r"[\w][\w.-]{0,63}")

_Version = Annotated[
    str,
    typer.Argument(
        metavar="VERSION",
        help="A name, a digest or its beginning; `active`, or `active/CAMERA`, is the one in force.",
        autocompletion=complete.prompts,
    ),
]
_Camera = Annotated[str | None, typer.Option(help="A camera of `rewatch camera ls`.", autocompletion=complete.cameras)]
_Comment = Annotated[str, typer.Option(help="Why, for those who ask later.")]


@app.command(
    "ls",
    epilog=examples(
        "rewatch prompt ls", "rewatch prompt ls --history    # every promotion", "rewatch prompt ls --json"
    ),
)
def ls(
    ctx: typer.Context,
    history: Annotated[bool, typer.Option("--history", help="Every move of a pointer instead, newest first.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """List the versions, which are in force for which cameras, since when and why."""
    from streams.prompts import rollback as undo

    settings: Settings = ctx.obj

    async def main() -> "tuple[Prompts, dict[str, Replay]]":
        return await load_prompts(settings), await load_replays(settings)

    found, replays = run(settings, main)
    names = {digest: known.version.name for digest, known in found.versions().items()}
    if history:
        moves = [move for scope in found.scopes() for move in found.history(scope)]
        moves.sort(key=lambda move: -move.created_at)
        if as_json:
            print_json(
                [
                    {
                        "scope": m.scope,
                        "digest": m.digest,
                        "at": m.created_at,
                        "comment": m.comment,
                        "evidence": m.evidence or None,
                    }
                    for m in moves
                ]
            )
        else:
            print_table(
                ("for", "version", "digest", "at", "comment", "evidence"),
                [
                    (
                        _cameras_of(m.scope),
                        names.get(m.digest, "not there") if m.digest else "as all cameras",
                        m.digest[:_DIGEST],
                        when(m.created_at, settings.time_zone),
                        m.comment,
                        _evidence(m, replays),
                    )
                    for m in moves
                ],
            )
        return
    active: dict[str, list[Any]] = {}
    for pointer in found.active().values():
        active.setdefault(pointer.digest, []).append(pointer)
    if as_json:
        print_json(
            [
                {
                    "digest": digest,
                    "name": known.version.name,
                    "created_at": known.created_at,
                    "on_log": known.created_at is not None,
                    "comment": known.comment,
                    "active": [
                        {
                            "scope": p.scope,
                            "since": p.created_at,
                            "comment": p.comment,
                            "evidence": p.evidence or None,
                        }
                        for p in active.get(digest, [])
                    ],
                }
                for digest, known in found.versions().items()
            ]
        )
        return
    rows = [
        (
            known.version.name or "-",
            digest[:_DIGEST],
            _cameras_of(pointer.scope) if pointer else None,
            when(pointer.created_at, settings.time_zone) if pointer else None,
            pointer.comment if pointer else None,
            _evidence(pointer, replays) if pointer else None,
            "not on the log" if known.created_at is None else when(known.created_at, settings.time_zone),
            known.comment,
        )
        for digest, known in found.versions().items()
        for pointer in active.get(digest) or [None]
    ]
    print_table(("version", "digest", "in force for", "since", "why", "evidence", "made at", "comment"), rows)
    for digest in active.keys() - found.versions().keys():
        scopes = ", ".join(_cameras_of(pointer.scope) for pointer in active[digest])
        fixes = ", ".join(f"`{undo(pointer.scope)}`" for pointer in active[digest])
        typer.echo(f"{digest} is in force for {scopes}, and is not there: its windows wait; {fixes}")


@app.command(
    "show",
    epilog=examples(
        "rewatch prompt show active",
        "rewatch prompt show default --rendered        # for the stored window",
        "rewatch prompt show active --camera yard      # for its newest window",
        "rewatch prompt show 3fa9c1 --event front-door:7c1b --json",
    ),
)
def show(  # noqa: PLR0917 (typer makes options of parameters)
    ctx: typer.Context,
    version: _Version,
    rendered: Annotated[bool, typer.Option("--rendered", help="The chat that the LLM server would get.")] = False,
    camera: _Camera = None,
    event: Annotated[
        str | None, typer.Option(help="Of this event's window, by id or its beginning.", autocompletion=complete.events)
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Of this window, by batch id or its beginning.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show a version's parts, or the chat that it makes of a window.

    With --camera, --event or --batch it is the chat of that window, with its tokens and what was dropped to fit.
    """
    from schemas.prompts import PromptError

    settings: Settings = ctx.obj
    if sum(option is not None for option in (camera, event, batch)) > 1:
        fail("--camera, --event and --batch choose one window: name one of them", USAGE)
    chat = rendered or camera is not None or event is not None or batch is not None

    async def main() -> "tuple[PromptVersion, Shown | None, list[PromptRecord], dict[str, Replay]]":
        from infra import prompts

        known = await load_prompts(settings)
        found = find_version(known, version)
        if not chat:
            pointers = [pointer for pointer in known.active().values() if pointer.digest == found.digest]
            return found, None, pointers, await load_replays(settings)
        if rendered and camera is None and event is None and batch is None:
            window = prompts.canary()
        else:
            window = await _window(settings, camera=camera, event=event, batch=batch)
        try:
            async with prompts.servers(settings) as llms:
                return found, await prompts.shown(settings, llms, window.context, found), [], {}
        except (PromptError, ValueError) as error:
            fail(str(error), NO)

    found, shown, pointers, replays = run(settings, main)
    if shown is None:
        _print_version(found, pointers, replays, as_json=as_json)
    else:
        _print_chat(found, shown, as_json=as_json)


@app.command(
    "new",
    epilog=examples(
        "rewatch prompt new shop --from active  # writes the files to begin with",
        "rewatch prompt new shop                # a version of what they say now",
        'rewatch prompt new prompts/shop --name shop --comment "after the break-in"',
    ),
)
def new(  # noqa: PLR0917
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="system.txt, user.txt, output_schema.json ...")],
    base: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="VERSION",
            help="What is not in the folder is this version's.",
            autocompletion=complete.prompts,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="A name for people; without it the folder's.")] = None,
    comment: _Comment = "",
    as_json: JsonFlag = False,
) -> None:
    """Make a version of the files in a folder; it judges nothing until it is promoted.

    A folder that is not there yet gets the files of --from instead, to be edited. It holds the files in which a
    version differs; the others are those of --from, or the product's own.
    """
    from infra import prompts
    from schemas.prompts import PromptError

    settings: Settings = ctx.obj
    called = name if name is not None else folder.resolve().name
    check_name(called)
    there = folder.is_dir() and any(folder.iterdir())
    if not there and base is None:
        fail(
            f"{folder}: no such folder, or nothing in it; begin with `rewatch prompt new {folder} --from default`",
            USAGE,
        )

    async def main() -> "tuple[PromptVersion, bool | None]":
        known = await load_prompts(settings)
        before = find_version(known, base or "default")
        if not there:
            prompts.write(before.to_files(), folder)
            return before, None
        try:
            made = before.from_texts(prompts.texts_in(folder, before), called)
        except PromptError as error:
            fail(str(error), USAGE)
        return made, await known.add(made, comment)

    made, added = run(settings, main)
    if added is not None:
        _say_made(made, added=added, as_json=as_json)
    elif as_json:
        print_json({"folder": str(folder), "from": made.digest})
    else:
        typer.echo(f"{folder} has the files of {short(made)}: edit them, then `rewatch prompt new {folder}`")


@app.command(
    "edit",
    epilog=examples(
        "rewatch prompt edit active",
        "rewatch prompt edit default --part system --name shop",
        "EDITOR='code --wait' rewatch prompt edit active/front-door",
    ),
)
def edit(  # noqa: PLR0917
    ctx: typer.Context,
    version: _Version,
    part: Annotated[
        str | None, typer.Option(help="One file alone: system, user, repair, output_schema, parameters or sections.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The new version's name; without it the old one's.")] = None,
    comment: _Comment = "",
    as_json: JsonFlag = False,
) -> None:
    """Edit a version's files in $EDITOR and make a new version of them.

    What does not parse is refused with the reason, and the text is kept.
    """
    from infra import prompts
    from schemas.prompts import FILES, PromptError

    settings: Settings = ctx.obj
    files = [file for file in FILES if part is None or file.partition(".")[0] == part.partition(".")[0]]
    if not files:
        fail(f"--part {part}: there are {', '.join(file.partition('.')[0] for file in FILES)}", USAGE)
    if name is not None:
        check_name(name)

    async def read() -> "tuple[Prompts, PromptVersion]":
        known = await load_prompts(settings)
        return known, find_version(known, version)

    _, before = run(settings, read)
    folder = Path(tempfile.mkdtemp(prefix="rewatch-prompt-"))
    prompts.write(before.to_files(), folder)
    _open_editor([folder / file for file in files], folder)
    called = name or before.name or "edited"

    try:
        texts = prompts.texts_in(folder, before)
        if texts == before.to_files():
            _remove(folder)
            fail(f"nothing was changed: {short(before)} stays as it is, and no version was made", NO)
        made = before.from_texts(texts, called)
    except (PromptError, OSError) as error:
        fail(
            f"{error}\nyour text is kept in {folder}: mend it there, then "
            f"`rewatch prompt new {folder} --name {called}`",
            USAGE,
        )

    async def add() -> bool:
        known = await load_prompts(settings)
        return await known.add(made, comment)

    try:
        added = run(settings, add)
    except typer.Exit:
        typer.echo(f"your text is kept in {folder}: `rewatch prompt new {folder} --name {called}`", err=True)
        raise
    _remove(folder)
    _say_made(made, added=added, as_json=as_json)


@app.command(
    "diff",
    epilog=examples(
        "rewatch prompt diff active deliveries-strict-nights",
        "rewatch prompt diff default active/front-door",
        "rewatch prompt diff 3fa9c1 77b02e --json",
    ),
)
def diff(ctx: typer.Context, old: _Version, new_: _Version, as_json: JsonFlag = False) -> None:
    """Show what differs between two versions, part by part."""
    settings: Settings = ctx.obj

    async def main() -> "tuple[PromptVersion, PromptVersion]":
        known = await load_prompts(settings)
        return find_version(known, old), find_version(known, new_)

    before, after = run(settings, main)
    parts = _differences(before, after)
    if as_json:
        print_json({"old": before.digest, "new": after.digest, "parts": parts})
        return
    out = console()
    out.print(f"old {short(before)}\nnew {short(after)}", markup=False, soft_wrap=True)
    if not parts:
        out.print("they say the same")
    for lines in parts.values():
        for line in lines.splitlines():
            out.print(Text(printable(line), style=_style(line)), soft_wrap=True)


@app.command(
    "test",
    epilog=examples(
        "rewatch prompt test deliveries-strict-nights",
        "rewatch prompt test 3fa9c1 --windows 100 --camera front-door",
        "rewatch prompt test active --json > before.json",
    ),
)
def judge_windows(
    ctx: typer.Context,
    version: _Version,
    windows: Annotated[
        int, typer.Option("--windows", "-n", min=1, max=10_000, help="At most so many, the newest.")
    ] = 20,
    camera: _Camera = None,
    as_json: JsonFlag = False,
) -> None:
    """Judge recorded windows with a version, beside what was said of them; nothing is written.

    By the LLM server that judges here; where nothing was recorded yet, the stored window that every analyst can judge.
    One of its slots is left to live windows. Exit code 1 where a window could not be judged.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    settings: Settings = ctx.obj
    columns = (TextColumn("judging"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    async def main() -> "list[Tried]":
        from infra import prompts

        found = find_version(await load_prompts(settings), version)
        recorded = await _windows(settings, camera=camera, limit=windows)
        if not recorded:
            recorded = [prompts.canary()]
        quiet = as_json or not sys.stderr.isatty()
        bars = Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet)
        async with prompts.servers(settings) as llms:
            with bars:
                task = bars.add_task("", total=len(recorded))
                return await prompts.try_out(settings, llms, found, recorded, lambda: bars.advance(task))

    tried = run(settings, main, doing="looking for windows ...")
    if as_json:
        print_json([_plain(one) for one in tried])
    else:
        _print_tried(tried, settings.time_zone)
    if any(one.event is None for one in tried):
        raise typer.Exit(NO)


@app.command(
    "promote",
    epilog=examples(
        "rewatch prompt promote deliveries-strict-nights",
        'rewatch prompt promote 3fa9c1 --camera front-door --comment "fewer alarms at the door"',
        "rewatch prompt promote 3fa9c1 --evidence calmer    # this replay, not the newest",
    ),
)
def promote(  # noqa: PLR0917
    ctx: typer.Context,
    version: _Version,
    camera: _Camera = None,
    comment: _Comment = "",
    evidence: Annotated[
        str | None,
        typer.Option(
            metavar="REPLAY",
            help="The replay or shadow that speaks for it; without it the newest that judged with the version.",
            autocompletion=complete.replays,
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Put a version in force from the next window on, for all cameras or for one.

    A camera's own version stays in force when another is promoted for all. A version that cannot be rendered, or
    whose fixed part leaves no room in the context, is refused. The replay or shadow that it is promoted on the strength
    of is kept with the move; where none has judged with it yet, that is said, and it is promoted all the same.
    """
    from streams.prompts import rollback as undo

    settings: Settings = ctx.obj
    scope = _scope_of(camera)

    async def main() -> "tuple[PromptVersion, Replay | None, bool]":
        from infra import prompts
        from schemas.prompts import PromptError

        known = await load_prompts(settings)
        found = find_version(known, version)
        strength = _strength(await load_replays(settings), found, evidence)
        if camera is not None:
            await check_camera(settings, camera)
        try:
            async with prompts.servers(settings) as llms:
                await prompts.check(settings, llms, found)
        except PromptError as error:
            fail(f"not promoted: {error}", NO)
        await known.add(found, comment)
        named = strength.replay_id if strength is not None else ""
        return found, strength, await known.point(scope, found.digest, comment, evidence=named)

    found, strength, moved = run(settings, main, doing="checking ...")
    if moved and strength is None:
        typer.echo(
            f"no replay or shadow has judged with {short(found)} yet: nothing shows what it changes; next time "
            f"`rewatch replay run --prompt {found.digest[:_DIGEST]}` first",
            err=True,
        )
    if as_json:
        named = {"replay_id": strength.replay_id, "name": strength.name} if strength is not None else None
        print_json({"digest": found.digest, "name": found.name, "scope": scope, "changed": moved, "evidence": named})
    elif moved:
        why = f", on the strength of {printable(_called(strength))}" if strength is not None else ""
        typer.echo(
            f"{short(found)} judges {_cameras_of(scope)} from the next window on{why}; `{undo(scope)}` undoes it"
        )
    else:
        typer.echo(f"{short(found)} judges {_cameras_of(scope)} already; nothing was changed")


@app.command(
    "rollback",
    epilog=examples(
        "rewatch prompt rollback",
        'rewatch prompt rollback --camera front-door --comment "missed the courier"',
    ),
)
def rollback(
    ctx: typer.Context,
    camera: _Camera = None,
    comment: _Comment = "",
    as_json: JsonFlag = False,
) -> None:
    """Put the version before in force again, for every camera or for one.

    A second time goes forward again: to go further back, promote a version of `rewatch prompt ls --history`.
    """
    settings: Settings = ctx.obj
    scope = _scope_of(camera)

    async def main() -> "tuple[Prompts, str, str]":
        known = await load_prompts(settings)
        now, before = known.pointer(scope), known.before(scope)
        if before is None:
            which = f"camera {camera} has no version of its own" if camera else "no other version was in force before"
            fail(f"nothing to roll back: {which}; `rewatch prompt ls --history` lists every move", NO)
        if before and before not in known.versions():
            fail(f"version {before} was in force before, and is not there: promote one of `rewatch prompt ls`", NO)
        was = now.digest if now is not None else ""
        await known.point(scope, before, comment or f"rollback from {was[:_DIGEST] or 'the version of all cameras'}")
        return known, was, before

    known, was, now = run(settings, main)
    if as_json:
        print_json({"scope": scope, "from": was, "to": now})
        return
    names = {digest: short(found.version) for digest, found in known.versions().items()} | {
        "": "the version of all cameras"
    }
    typer.echo(
        f"{names[now]} judges {_cameras_of(scope)} again from the next window on, instead of {names.get(was, was)}"
    )


def _scope_of(camera: str | None) -> str:
    """The scope of a camera's pointer, or of everyone's."""
    if camera == "default":
        fail(
            "camera default can have no version of its own: `default` is the pointer of every camera without one. "
            "Leave --camera out to move that, or send that camera's pictures under another name",
            USAGE,
        )
    return camera or "default"


async def load_prompts(settings: "Settings") -> "Prompts":
    """Versions and pointers, as they are on the log."""
    from streams.kafka import Kafka
    from streams.prompts import Prompts

    found = Prompts(Kafka(settings.kafka))
    await found.table.load()
    return found


async def load_replays(settings: "Settings") -> "dict[str, Replay]":
    """The newest record of each replay and shadow, by id."""
    from schemas.records import Replay
    from streams.control import ControlTable
    from streams.kafka import Kafka

    table = ControlTable(Kafka(settings.kafka), "replays", Replay)
    await table.load()
    return table.all()


def _strength(replays: "dict[str, Replay]", version: "PromptVersion", asked: str | None) -> "Replay | None":
    """What speaks for the version: what was asked for, else the newest replay or shadow that judged with it."""
    from processors.replay.evidence import tried

    fit = tried(replays.values(), version.digest)
    if asked is None:
        return fit[0] if fit else None

    from infra.replays import UnknownReplayError, choose

    try:
        chosen = choose(asked, [(one.replay_id, one.name, one.updated_at) for one in replays.values()])
    except UnknownReplayError as error:
        fail(f"--evidence: {error}", NO)
    if chosen not in {one.replay_id for one in fit}:
        others = ", ".join(_called(one) for one in fit[:5]) or "none has yet"
        fail(
            f"--evidence {asked}: it did not judge with {short(version)}, or is not done; these did: {others}. "
            "Nothing was promoted",
            NO,
        )
    return replays[chosen]


def _called(replay: "Replay") -> str:
    return f"{replay.name} ({replay.replay_id})"


def _evidence(pointer: "PromptRecord", replays: "dict[str, Replay]") -> str | None:
    """What a pointer was moved on the strength of, as people read it; None where nothing was named."""
    if not pointer.evidence:
        return None
    replay = replays.get(pointer.evidence)
    return printable(_called(replay) if replay is not None else pointer.evidence)


def find_version(known: "Prompts", text: str) -> "PromptVersion":
    """The version that the text means; ends the command where there is none."""
    from streams.prompts import UnknownVersionError

    try:
        return known.find(text)
    except UnknownVersionError as error:
        fail(f"{error}; `rewatch prompt ls` lists them", NO)


async def check_camera(settings: "Settings", camera: str) -> None:
    """End the command where the camera is not known."""
    from schemas.records import Camera
    from streams.control import ControlTable
    from streams.kafka import Kafka

    table = ControlTable(Kafka(settings.kafka), "cameras", Camera)
    await table.load()
    if table.get(camera) is None:
        near = difflib.get_close_matches(camera, table.all(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"make it by `rewatch camera add {camera}`"
        fail(f"camera {camera} is not known; {hint}", NO)


async def _windows(settings: "Settings", *, camera: str | None, batch: str = "", limit: int) -> "list[Recorded]":
    from infra import recorded
    from processors.store.queries import Queries

    async with aclosing(Queries(settings.clickhouse)) as store:
        return await recorded.windows(store, camera=camera or "", batch=batch, limit=limit)


async def _window(settings: "Settings", *, camera: str | None, event: str | None, batch: str | None) -> "Recorded":
    """The one window that was asked for; says what is wrong where it is none, or several."""
    from processors.store.queries import Queries

    if event is not None:
        async with aclosing(Queries(settings.clickhouse)) as store:
            events = await store.events_like(event, limit=2)
        if len({found["batch_id"] for found in events}) != 1:
            what = "several events begin so" if events else "there is no such event"
            fail(f"--event {event}: {what}; `rewatch events ls` lists them", NO)
        batch = events[0]["batch_id"]
    found = await _windows(settings, camera=camera, batch=batch or "", limit=1 if batch is None else 2)
    exact = [window for window in found if window.context.batch_id == batch]
    if len(exact or found) != 1:
        if camera is not None:
            fail(
                f"--camera {camera}: no window of it was recorded yet; --rendered alone shows the stored one",
                NO,
            )
        fail(f"--batch {batch}: {'several windows begin so' if found else 'there is no such window'}", NO)
    return (exact or found)[0]


def check_name(name: str) -> None:
    """End the command where the name is not one that commands can take."""
    if not _NAME.fullmatch(name) or name == "active":
        fail(f"--name {name!r}: letters, digits, -, _ and ., at most 64, and not `active`", USAGE)


def _open_editor(files: list[Path], folder: Path) -> None:
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        code = subprocess.run([*shlex.split(editor), *map(str, files)], check=False).returncode  # noqa: S603 (theirs)
    except (OSError, ValueError) as error:
        _remove(folder)
        fail(f"{editor}: {error}; name an editor in EDITOR", USAGE)
    if code:
        fail(f"{editor} ended with exit code {code}: no version was made; your text is kept in {folder}", NO)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _differences(before: "PromptVersion", after: "PromptVersion") -> dict[str, str]:
    """Unified differences by file; of equal ones none."""
    old, new_ = before.to_files(), after.to_files()
    return {
        file: "".join(
            difflib.unified_diff(
                old[file].splitlines(keepends=True),
                new_[file].splitlines(keepends=True),
                f"{before.digest[:_DIGEST]}/{file}",
                f"{after.digest[:_DIGEST]}/{file}",
            )
        )
        for file in old
        if old[file] != new_[file]
    }


def _style(line: str) -> str:
    if line.startswith(("---", "+++")):
        return "bold"
    return {"-": "red", "+": "green", "@": "cyan"}.get(line[:1], "")


def short(version: "PromptVersion") -> str:
    """A version as people are told of it."""
    return printable(f"{version.name or 'a version without a name'} ({version.digest[:_DIGEST]})")


def _cameras_of(scope: str) -> str:
    return "all cameras" if scope == "default" else f"camera {scope}"


def _say_made(made: "PromptVersion", *, added: bool, as_json: bool) -> None:
    if as_json:
        print_json({"digest": made.digest, "name": made.name, "added": added})
        return
    digest = made.digest[:_DIGEST]
    typer.echo(f"{short(made)} {'is made' if added else 'was there already: a version is named by what it says'}")
    typer.echo(f"try it: rewatch prompt test {digest}     put it in force: rewatch prompt promote {digest}")


def _print_version(
    found: "PromptVersion", pointers: "list[PromptRecord]", replays: "dict[str, Replay]", *, as_json: bool
) -> None:
    files = found.to_files()
    if as_json:
        active = [{"scope": one.scope, "since": one.created_at, "evidence": one.evidence or None} for one in pointers]
        print_json({"digest": found.digest, "name": found.name, "files": files, "active": active})
        return
    out = console()
    out.print(Text(f"{printable(found.name)} {found.digest}", style="bold"), soft_wrap=True)
    for one in pointers:
        strength = _evidence(one, replays)
        why = f", on the strength of {strength}" if strength else ""
        out.print(f"in force for {printable(_cameras_of(one.scope))}{why}", markup=False, soft_wrap=True)
    for file, text in files.items():
        out.print(Text(f"\n{file}", style="bold cyan"))
        out.print(Text("\n".join(map(printable, text.rstrip("\n").split("\n")))), soft_wrap=True)


def _print_chat(found: "PromptVersion", shown: "Shown", *, as_json: bool) -> None:
    messages = [message._asdict() for message in shown.rendered.messages]
    if as_json:
        print_json(
            {
                "digest": found.digest,
                "messages": messages,
                "tokens": shown.tokens,
                "tokens_counted": shown.counted,
                "tokens_at_most": shown.most,
                "dropped_sections": list(shown.rendered.dropped),
            }
        )
        return
    out = console()
    for message in messages:
        out.print(Text(f"[{message['role']}]", style="bold cyan"))
        out.print(Text("\n".join(map(printable, message["content"].split("\n")))), soft_wrap=True)
    how = "" if shown.counted else "at most "
    why = "" if shown.counted else "; the server does not count them"
    out.print(Text(f"\n{how}{shown.tokens} tokens of {shown.most}{why}", style="dim"), soft_wrap=True)
    if shown.rendered.dropped:
        out.print(Text(f"dropped to fit: {', '.join(map(printable, shown.rendered.dropped))}", style="yellow"))


def _plain(one: "Tried") -> dict[str, Any]:
    old, event = one.recorded, one.event
    return {
        "batch_id": old.context.batch_id,
        "camera_id": old.context.camera_id,
        "started_at": old.context.batch.started_at,
        "event_id": old.event_id or None,
        "old": {"score": old.score, "level": old.level, "summary": old.summary} if old.event_id else None,
        "new": None
        if event is None
        else {
            "score": event.risk_score,
            "level": event.risk_level,
            "summary": event.summary,
            "repaired": event.repaired,
        },
        "failure": one.failure or None,
    }


def _print_tried(tried: "list[Tried]", time_zone: str) -> None:
    if [one.recorded.context.batch_id for one in tried] == ["canary"]:
        typer.echo("no window was recorded yet: this is the stored one, of somebody who passes a front door at noon")
    print_table(
        ("when", "camera", "before", "now", "what"),
        [
            (
                when(one.recorded.context.batch.started_at, time_zone),
                one.recorded.context.camera_id,
                level_text(one.recorded.level, one.recorded.score) if one.recorded.event_id else None,
                level_text(one.event.risk_level, one.event.risk_score) if one.event else "failed",
                one.event.summary if one.event else one.failure,
            )
            for one in tried
        ],
    )
    pairs = [(one.recorded, one.event) for one in tried if one.event is not None and one.recorded.event_id]
    changed = sum(old.level != event.risk_level for old, event in pairs)
    moved = sum(event.risk_score - old.score for old, event in pairs) / len(pairs) if pairs else 0.0
    if pairs:
        typer.echo(f"{changed} of {len(pairs)} levels changed; scores moved by {moved:+.1f} on average")
    if failed := sum(one.event is None for one in tried):
        typer.echo(f"{failed} of {len(tried)} could not be judged", err=True)
