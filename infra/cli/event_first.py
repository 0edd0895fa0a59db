"""A group of commands whose first word may be an event: `rewatch label EVENT true`, `rewatch hold EVENT --why ...`.

`EVENT` is a command of the group under that very name; whatever names no other command is taken for an event.
"""

import difflib
from typing import Any, ClassVar

from typer.core import TyperCommand, TyperGroup

EVENT = "EVENT"


class EventFirst(TyperGroup):
    """The group: its first word is a command, or an event."""

    said_of_events: ClassVar[frozenset[str]] = frozenset()
    """Words that only the command of events takes: with one of them the first word is no slip of the keyboard."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command of the first word; that of events for whatever is none, but for a slip of the keyboard."""
        first, *rest = args
        slip = self.said_of_events.isdisjoint(rest) and difflib.get_close_matches(first, self.commands)
        if first in self.commands or (slip and not ctx.resilient_parsing):
            return super().resolve_command(ctx, args)
        return EVENT, self.commands[EVENT], args

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """The commands, and the newest events in the place of the command that is named for them."""
        found = [item for item in super().shell_complete(ctx, incomplete) if item.value != EVENT]
        event = next(parameter for parameter in self.commands[EVENT].params if parameter.name == "event")
        return found if incomplete.startswith("-") else [*found, *event.shell_complete(ctx, incomplete)]


class OnEvent(TyperCommand):
    """The command of events: its name stands where its first argument does."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Without the argument that the name says already."""
        return [piece for piece in super().collect_usage_pieces(ctx) if piece.strip("{}") != EVENT]
