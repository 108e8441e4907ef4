"""A command's help: flags, and the words for each beside or under them. Typer's own columns leave the words no room."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import typer
from typer.core import TyperCommand

from fxprune.tables import terminal_width

WIDEST = 100  # Longer lines are hard to read.
INDENT = 26  # Where help texts begin; flags that reach further have a line of their own.


class Command(TyperCommand):
    """A command whose help fits any terminal."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        width = min(terminal_width(), WIDEST)
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            title = getattr(parameter, "rich_help_panel", None)
            if record is not None:
                own = title or ("Arguments" if parameter.param_type_name == "argument" else "Options")
                panels.setdefault(own, []).append(record)
        usage = " ".join(["Usage:", ctx.command_path, *self.collect_usage_pieces(ctx)])
        parts = [usage, *(textwrap.fill(paragraph, width) for paragraph in (self.help or "").split("\n\n"))]
        for title, records in panels.items():
            lines = [line for flags, text in records for line in _option(flags, " ".join(text.split()), width)]
            parts.append("\n".join([typer.style(title, bold=True), *lines]))
        epilog = (self.epilog or "").replace("\\[", "[")
        parts += [epilog.replace("Example", typer.style("Example", bold=True), 1)] if epilog else []
        formatter.write("\n\n".join(parts) + "\n")


def _option(flags: str, text: str, width: int) -> list[str]:
    """The lines of one option."""
    text = re.sub(r"\bx>=(\d+)\]", r"at least \1]", text)
    beside = len(flags) <= INDENT - 4
    indent = " " * INDENT
    lines = [indent + line for line in textwrap.wrap(text, width - INDENT)]
    if beside and lines:
        lines[0] = f"  {typer.style(flags, fg='cyan')}{lines[0][2 + len(flags) :]}"
        return lines
    flag_lines = textwrap.wrap(
        flags, width - 2, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return [*(f"  {typer.style(line, fg='cyan')}" for line in flag_lines), *lines]
