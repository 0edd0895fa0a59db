"""`rewatch config show|schema`: the settings in force and where each comes from; what can be set."""

import json
import os
import re
from pathlib import Path
from typing import Any

import typer
import yaml
from pydantic import BaseModel, SecretStr

from infra.cli.output import JsonFlag, print_json, print_table
from infra.config import ALIASES, Settings

app = typer.Typer(no_args_is_help=True, help="The settings.")

MASK = "(set, not shown)"

# What stands between the scheme and the host of an address: user and password.
_CREDENTIALS = re.compile(r"(\w://)[^/@\s]+@")


def register(root: typer.Typer) -> None:
    """Add these commands to the root."""
    root.add_typer(app, name="config")


@app.command()
def show(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """Show the settings in force, and where each comes from. Secrets are not shown."""
    rows = in_force(ctx.obj)
    if as_json:
        print_json([{"setting": name, "value": value, "from": source} for name, value, source in rows])
    else:
        print_table(("setting", "value", "from"), rows)


@app.command()
def schema(ctx: typer.Context) -> None:
    """Print the JSON schema of rewatch.yaml, for editors that check and complete."""
    del ctx
    print_json(Settings.model_json_schema())


def in_force(settings: Settings) -> list[tuple[str, Any, str]]:
    """Every setting as `(dotted name, JSON-able value, where it comes from)`; secrets are masked."""
    written = _written(type(settings).file)
    return [(name, _plain(value), _source(name, settings, written)) for name, value in _leaves(settings, "")]


def _leaves(model: BaseModel, prefix: str) -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name in type(model).model_fields:
        value = getattr(model, name)
        leaves += _leaves(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else [(prefix + name, value)]
    return leaves


def _plain(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return MASK
    if isinstance(value, str | Path):
        return _CREDENTIALS.sub(rf"\g<1>{MASK}@", str(value))
    if isinstance(value, tuple | list | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _source(name: str, settings: Settings, written: set[str]) -> str:
    """Which of the sources won, in their order of precedence."""
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

    def names(tree: Any, prefix: str) -> set[str]:
        if not isinstance(tree, dict):
            return {prefix}
        return {
            found for key, value in tree.items() for found in names(value, f"{prefix}.{key}" if prefix else str(key))
        }

    return names(yaml.safe_load(file.read_text()) or {}, "")
