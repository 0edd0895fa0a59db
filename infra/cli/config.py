"""`rewatch config show|check|schema`: the settings in force and where each comes from; what can be set."""

import difflib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.cli.help import MAINTENANCE, examples
from infra.cli.output import USAGE, JsonFlag, fail, print_json, print_table

if TYPE_CHECKING:
    from pydantic import BaseModel

    from infra.config import Settings

app = typer.Typer(no_args_is_help=True)


def register(root: typer.Typer) -> None:
    """Add these commands to the root."""
    root.add_typer(
        app,
        name="config",
        rich_help_panel=MAINTENANCE,
        help="Show and check the settings.",
        epilog=examples("rewatch config show", "rewatch --config site.yaml config check"),
    )


@app.command(
    epilog=examples(
        "rewatch config show",
        "rewatch config show kafka",
        "rewatch config show --changed             # only what is not a default",
        "REWATCH_TIME_ZONE=Europe/Berlin rewatch config show time_zone --json",
    )
)
def show(
    ctx: typer.Context,
    section: Annotated[
        str | None, typer.Argument(metavar="[SECTION]", help="Of this section or setting only, as kafka or llm.slots.")
    ] = None,
    changed: Annotated[bool, typer.Option("--changed", help="Only what is not a default.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show the settings in force, and where each comes from. Secrets are not shown."""
    rows = [
        row
        for row in in_force(ctx.obj)
        if (section is None or row[0] == section or row[0].startswith(f"{section}."))
        and not (changed and row[2] == "default")
    ]
    if section is not None and not rows and not changed:
        fail(f"there is no setting {section}; {_nearest(section)}", USAGE)
    if as_json:
        print_json([{"setting": name, "value": value, "from": source} for name, value, source in rows])
    elif not rows:
        typer.echo("everything is a default")
    else:
        print_table(("setting", "value", "from"), rows)


@app.command(epilog=examples("rewatch config check", "rewatch --config site.yaml config check && rewatch up"))
def check(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """Check the settings: exit code 0 when they can be used, 2 and a line for each that cannot."""
    # They were read, and refused where they cannot be used, before this command began.
    settings: Settings = ctx.obj
    file = type(settings).file
    changed = [(name, source) for name, _, source in in_force(settings) if source != "default"]
    if as_json:
        print_json({"ok": True, "file": file, "set": [{"setting": name, "from": source} for name, source in changed]})
        return
    where = f"{file} is" if file else "there is no rewatch.yaml here; environment and defaults are"
    typer.echo(f"{where} good: {len(changed)} settings are not defaults (`rewatch config show --changed`)")


@app.command(
    epilog=examples(
        "rewatch config schema > rewatch.schema.json",
        "rewatch config schema | jq '.properties | keys'",
    )
)
def schema(ctx: typer.Context) -> None:
    """Print the JSON schema of rewatch.yaml, for editors that check and complete."""
    del ctx
    from infra.config import Settings

    print_json(Settings.model_json_schema())


def in_force(settings: "Settings") -> list[tuple[str, Any, str]]:
    """Every setting as `(dotted name, JSON-able value, where it comes from)`; secrets are masked."""
    written = _written(type(settings).file)
    return [(name, _plain(value), _source(name, settings, written)) for name, value in _leaves(settings, "")]


def _nearest(name: str) -> str:
    from infra.config import known_settings

    close = difflib.get_close_matches(name, known_settings(), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "`rewatch config show` lists all"


def _leaves(model: "BaseModel", prefix: str) -> list[tuple[str, Any]]:
    from pydantic import BaseModel

    leaves: list[tuple[str, Any]] = []
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            leaves += _leaves(value, f"{prefix}{name}.")
        elif isinstance(value, dict) and value and all(isinstance(item, BaseModel) for item in value.values()):
            for key, item in value.items():
                leaves += _leaves(item, f"{prefix}{name}.{key}.")
        else:
            leaves.append((prefix + name, value))
    return leaves


def _plain(value: Any) -> Any:
    from pydantic import Secret, SecretStr

    from infra.masks import MASK, credentials

    if isinstance(value, SecretStr):
        return MASK
    if isinstance(value, Secret):  # one that says itself what may be shown of it
        return str(value)
    if isinstance(value, str | Path):
        return credentials(str(value))
    if isinstance(value, tuple | list | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _source(name: str, settings: "Settings", written: set[str]) -> str:
    """Which of the sources won, in their order of precedence."""
    from infra.config import ALIASES

    names = {key.upper(): key for key in os.environ}
    parts = name.split(".")
    # A section, or a map in one, can be given whole: REWATCH_KAFKA='{"partitions": 64}'.
    for length in range(len(parts), 0, -1):
        variable = f"REWATCH_{'__'.join(parts[:length])}".upper()
        if variable in names and _holds(os.environ[names[variable]], parts[length:]):
            return names[variable]
    for alias, path in ALIASES.items():
        if path == name and alias in os.environ:
            return alias
    if any(name == path or name.startswith(f"{path}.") for path in written):
        return str(type(settings).file)
    return "default"


def _holds(text: str, parts: list[str]) -> bool:
    """Whether the JSON in a variable says something about the setting so far below it."""
    tree: Any = json.loads(text) if parts else None
    for part in parts:
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def _written(file: Path | None) -> set[str]:
    """The dotted names that the file sets."""
    if file is None:
        return set()

    import yaml

    def names(tree: Any, prefix: str) -> set[str]:
        if not isinstance(tree, dict):
            return {prefix}
        return {
            found for key, value in tree.items() for found in names(value, f"{prefix}.{key}" if prefix else str(key))
        }

    return names(yaml.safe_load(file.read_text()) or {}, "")
