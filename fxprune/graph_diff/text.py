"""GraphDiff -> compact text for a terminal."""

from __future__ import annotations

import io
from collections import Counter
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fxprune.graph_diff.result import GraphDiff, NodeDiff

MARKS = {"unchanged": " ", "changed": "~", "removed": "-", "inserted": "+", "replaced": "!"}
STYLES = {"unchanged": "dim", "changed": "yellow", "removed": "red", "inserted": "green", "replaced": "magenta"}
NOT_PRUNED = "not pruned: "
_MAIN = ("pruned", "re-fitted")  # beside these, what follows goes without saying
_MINOR = (
    "bias changed",
    "bias differs by rounding",
    "channels permuted",
    "channels removed",
    "channels removed and permuted",
)
_WEIGHT = "weight: ‖after − before‖ / ‖before‖, with BatchNorm folded into before where it is in after."
_OUTPUT_ERROR = "output error: ‖y_dense − y_pruned‖² / ‖y_dense − mean‖² on calibration images (held-out if any)."


def render_text(diff: GraphDiff, *, all: bool, color: bool | None, width: int) -> str:
    """See `GraphDiff.render`."""
    if color is None:
        terminal = Console()
        color = terminal.is_terminal and not terminal.no_color
    console = Console(
        width=width,
        file=io.StringIO(),
        force_terminal=color,
        color_system="standard" if color else None,
        no_color=not color,
        highlight=False,
    )
    console.print(Group(*_parts(diff, all)))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().split("\n"))


def summary(diff: GraphDiff) -> str:
    """How many nodes changed, in a sentence."""
    counts = Counter(node.status for node in diff.nodes)
    folded = sum(node.status == "removed" and bool(node.into) for node in diff.nodes)
    parts = []
    for status in ("changed", "replaced", "inserted", "removed", "unchanged"):
        if counts[status]:
            extra = f" ({folded} folded into other layers)" if status == "removed" and folded else ""
            parts.append(f"{counts[status]} {status}{extra}")
    return f"{', '.join(parts)}."


def _parts(diff: GraphDiff, all: bool) -> list[RenderableType]:
    if diff.is_empty and not all:
        costs = diff.costs_after
        compared = f"no difference in {costs.nodes:,} nodes and {costs.parameters:,} parameters"
        return [Text(f"{diff.before} and {diff.after} are the same: {compared}."), *map(Text, diff.notes)]
    title = Text.assemble(("Graph diff  ", "bold"), diff.before, (" → ", "bold"), diff.after)
    shown = [node for node in diff.nodes if all or not (node.status == "unchanged" or _is_folded(node))]
    parts: list[RenderableType] = [title, Padding(_costs(diff), (1, 0, 1, 0)), Text(f"Nodes: {summary(diff)}")]
    told = dict.fromkeys(reason for node in shown for reason in _footnotes(node, all))
    reasons = {reason: number for number, reason in enumerate(told, 1)}
    parts.append(Padding(_nodes(shown, reasons, all), (1, 0, 1, 0)))
    parts += [Text(f"[{number}] {reason}") for reason, number in reasons.items()]
    if any(node.weight_change for node in shown):
        parts.append(Text(_WEIGHT, style="dim"))
    if any(node.output_error is not None for node in shown):
        parts.append(Text(_OUTPUT_ERROR, style="dim"))
    return [*parts, *map(Text, diff.notes)]


def _is_folded(node: NodeDiff) -> bool:
    """Whether the line of the layer that took this node over tells of it already."""
    return node.status == "removed" and bool(node.into)


def _costs(diff: GraphDiff) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    old, new = diff.costs_before, diff.costs_after
    table.add_row("nodes", f"{old.nodes:,}", f"{new.nodes:,}", relative(old.nodes, new.nodes))
    table.add_row("parameters", f"{old.parameters:,}", f"{new.parameters:,}", relative(old.parameters, new.parameters))
    table.add_row("  not zero", f"{old.nonzeros:,}", f"{new.nonzeros:,}", relative(old.nonzeros, new.nonzeros))
    for heading, a, b in (
        ("MACs", old.macs, new.macs),
        ("  with a non-zero weight", old.nonzero_macs, new.nonzero_macs),
    ):
        if a is not None or b is not None:
            table.add_row(heading, count_si(a), count_si(b), relative(a, b))
    return table


def _nodes(nodes: list[NodeDiff], reasons: dict[str, int], all: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, header_style="dim", show_edge=False)
    table.add_column("", width=1)
    table.add_column("node", overflow="fold", ratio=None, max_width=34)
    table.add_column("operation", overflow="fold", max_width=24)
    errors = any(node.output_error is not None for node in nodes)
    weights = any(node.state.weights for node in nodes)
    if weights:
        table.add_column("zeros", justify="right", no_wrap=True)
        table.add_column("weight", justify="right", no_wrap=True)
    if errors:
        table.add_column("output\nerror", justify="right", no_wrap=True)
    table.add_column("what changed", overflow="fold")
    for node in nodes:
        cells: list[RenderableType] = [Text(MARKS[node.status], style=STYLES[node.status])]
        cells += [Text(node.name, style=STYLES[node.status]), _operation(node)]
        if weights:
            cells += [_zeros(node), "" if node.weight_change is None else percent(node.weight_change)]
        if errors:
            cells.append("" if node.output_error is None else percent(node.output_error))
        table.add_row(*cells, _changes(node, reasons, all))
    return table


def _operation(node: NodeDiff) -> Text:
    state = node.state
    text = Text(state.op)
    if state.weight_shape:
        text.append(f" {sizes(state.weight_shape)}", style="dim")
    elif state.weights:
        text.append(f" {state.weights:,} weights", style="dim")
    return text


def _zeros(node: NodeDiff) -> str:
    if not node.state.weights:
        return ""
    shares = [f"{state.sparsity:.1%}" for state in (node.before, node.after) if state is not None]
    return shares[-1] if shares[0] in ("0.0%", shares[-1]) else f"{shares[0].rstrip('%')} → {shares[-1]}"


def _changes(node: NodeDiff, reasons: dict[str, int], all: bool) -> Text:
    """What changed in a few words, with the numbers of what stands below the table."""
    phrases = list(node.changes) or ([node.status] if node.status in ("removed", "inserted") else [])
    if not all and phrases and phrases[0].startswith(_MAIN):
        # A recurrent layer has several: "weight_ih_l0.bias changed by 3%".
        phrases = [phrase for phrase in phrases if not phrase[phrase.find(".bias ") + 1 :].startswith(_MINOR)]
    if node.reason.startswith(NOT_PRUNED):
        phrases.append(NOT_PRUNED.rstrip(": "))
    text = Text("; ".join(phrases))
    numbers = ", ".join(str(reasons[reason]) for reason in _footnotes(node, all))
    if numbers:
        text.append(f"{' ' if phrases else ''}[{numbers}]", style="dim")
    return text


def _footnotes(node: NodeDiff, all: bool) -> list[str]:
    reason = [node.reason.removeprefix(NOT_PRUNED)] if node.reason else []
    return [*reason, *node.notes] if all else reason


def sizes(shape: tuple[int | str, ...]) -> str:
    """Sizes of a tensor.

    >>> sizes((16, 3, 3, 3))
    '16×3×3×3'
    """
    return "×".join(map(str, shape))


def percent(share: float) -> str:
    """A share with about three digits; what is small is not called zero.

    >>> percent(0.1234), percent(0.00012), percent(3e-7), percent(0.0)
    ('12.3%', '0.01%', '3e-05%', '0%')
    """
    value = share * 100
    if value == 0:
        return "0%"
    if value < 0.01:
        return f"{value:.0e}%"
    digits = 2 if value < 1 else 1 if value < 1000 else 0
    return f"{value:,.{digits}f}%"


def relative(before: int | None, after: int | None) -> str:
    """The change from one count to another.

    >>> relative(200, 100), relative(3, 3), relative(0, 5)
    ('−50.0%', 'same', '+5')
    """
    if before is None or after is None:
        return ""
    if before == after:
        return "same"
    sign = "+" if after > before else "−"
    return sign + (percent(abs(after - before) / before) if before else f"{abs(after - before):,}")


def count_si(count: int | None) -> str:
    """A large count with four digits.

    >>> count_si(40551040), count_si(512), count_si(None)
    ('40.55 M', '512', 'not known')
    """
    if count is None:
        return "not known"
    for factor, letter in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= factor:
            return f"{count / factor:.4g} {letter}"
    return str(count)
