"""How commands describe themselves in `--help`: the panels of the root, and examples to type as they stand."""

from typing import Any

from rich.markup import escape
from typer.core import TyperGroup

RUN = "Run"
LOOK = "Look"
CAMERAS = "Cameras"
PROMPTS = "Prompts"
LETTERS = "Dead letters"
MAINTENANCE = "Maintenance"

PANELS = (RUN, LOOK, CAMERAS, PROMPTS, LETTERS, MAINTENANCE)
"""The panels of `rewatch --help`, in the order of a first day; a command that names none stands before them."""

EXIT_CODES = """[bold]Exit codes[/bold]
  0  yes, done; also an orderly Ctrl-C of `up` and `run`
  1  the answer is no, nothing fits, or a check failed
  2  usage or settings: the message names the option or setting
  3  a service is away: the broker, ClickHouse, the LLM server;
     `prompt parse`: the answer needs a repair
  130  Ctrl-C ended it before it was done"""


def examples(*lines: str) -> str:
    """The examples of a command, for its `epilog`: lines for a shell, what stands behind # says what they do."""
    return "\n".join(["[bold]Examples[/bold]", *(f"  {escape(line)}" for line in lines)])


HELP_ASKED = "rewatch.help_asked"
"""In `ctx.meta`: whether a command was only asked for its help."""

_HELP_OPTIONS = frozenset({"--help", "-h"})


class Panelled(TyperGroup):
    """The root group: its commands stand panel by panel, in the order they were registered."""

    def invoke(self, ctx: Any) -> Any:
        """Run the callback, then the command; tell the callback whether the command will only show its help."""
        ctx.meta[HELP_ASKED] = not _HELP_OPTIONS.isdisjoint(ctx.args)
        return super().invoke(ctx)

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, sorted by panel."""

        def place(name: str) -> int:
            panel = getattr(self.get_command(ctx, name), "rich_help_panel", None)
            return PANELS.index(panel) if panel in PANELS else -1

        return sorted(super().list_commands(ctx), key=place)
