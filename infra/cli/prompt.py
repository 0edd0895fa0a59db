"""The group `rewatch prompt`, and in it `parse`: what would be made of a model's raw output."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from infra.cli.help import PROMPTS, examples
from infra.cli.output import USAGE, fail, print_json

UNUSABLE = 3
"""The exit code for an output that the model would be asked to repair."""

app = typer.Typer(no_args_is_help=True)


def register(root: typer.Typer) -> None:
    """Add these commands to the root."""
    root.add_typer(
        app,
        name="prompt",
        rich_help_panel=PROMPTS,
        help="See, change and try what the LLM is told, and put it in force.",
        epilog=examples(
            "rewatch prompt edit active      # $EDITOR, then a new version",
            "rewatch prompt test 3fa9c1      # on windows that were recorded",
            "rewatch prompt promote 3fa9c1   # from the next window on",
            "rewatch prompt rollback",
            "rewatch prompt parse answer.txt",
        ),
    )


@app.command(
    epilog=examples(
        "rewatch prompt parse answer.txt",
        "rewatch prompt parse - < answer.txt",
    )
)
def parse(
    file: Annotated[
        str, typer.Argument(metavar="FILE|-", help="What a model wrote, UTF-8; `-` reads it from standard input.")
    ],
) -> None:
    """Show what is made of a model's raw output: a verdict, or why it must be repaired.

    The verdict comes as JSON with its level and the names of what was forgiven (fences, a trailing comma ...). Where
    the model would be asked to repair its output, it is {"repair": "why"} and the exit code is 3.
    """
    text = _text(file)

    import msgspec

    from processors.analyze import answers
    from schemas import prompts

    try:
        verdict, forgiven = answers.parse(text, prompts.default())
    except answers.UnusableError as error:
        print_json({"repair": str(error)})
        raise typer.Exit(UNUSABLE) from None
    level = answers.risk_level(verdict.risk_score)
    print_json({**msgspec.to_builtins(verdict), "risk_level": level, "forgiven": list(forgiven)})


def _text(file: str) -> str:
    try:
        return (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode()
    except OSError as error:
        fail(f"{file}: {error.strerror}", USAGE)
    except UnicodeDecodeError as error:
        fail(f"{'standard input' if file == '-' else file} is not UTF-8: {error.reason} at byte {error.start}", USAGE)
