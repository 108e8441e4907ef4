"""GraphDiff -> one HTML page with everything inside: no network, no other file.

The graph is placed here, once; the page's script only answers clicks, keys and the search box.
"""

from __future__ import annotations

import base64
import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fxprune.graph_diff.layout import Box, Drawing, Line, Point, lay_out
from fxprune.graph_diff.text import MARKS, count_si, relative, sizes, summary

if TYPE_CHECKING:
    from fxprune.graph_diff.pictures import WeightPicture
    from fxprune.graph_diff.result import Edge, GraphDiff, NodeDiff

_CARD_HEIGHT, _STRIP_HEIGHT, _PILL_HEIGHT = 46.0, 20.0, 26.0
_NAME_WIDTH, _TEXT_WIDTH = 7.4, 6.7  # of one character, in pixels: monospaced names, proportional text
_CARD_WIDTHS = (180.0, 340.0)
_CORNER = 9.0


@dataclass(frozen=True)
class _Block:
    """What is drawn as one: a node, with the BatchNorms that were folded into it attached below.

    `members` are positions in `GraphDiff.nodes`, the node itself first.
    """

    members: tuple[int, ...]
    is_card: bool


def render_html(diff: GraphDiff) -> str:
    """See `GraphDiff.to_html`."""
    environment = Environment(
        loader=PackageLoader("fxprune.graph_diff"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    blocks = _blocks(diff)
    drawing, kinds = _draw(diff, blocks)
    shapes = zip(blocks, drawing.boxes, strict=True)
    lines = zip(drawing.lines, kinds, strict=True)
    counts = Counter[str](node.status for node in diff.nodes)
    page: str = environment.get_template("page.html.j2").render(
        diff=diff,
        summary=summary(diff),
        statuses=[(status, MARKS[status].strip(), counts[status]) for status in MARKS if counts[status]],
        costs=_costs(diff),
        width=drawing.width,
        height=drawing.height,
        blocks=[_block_view(diff, block, box) for block, box in shapes],
        lines=[{"d": _path(line), "kind": kind, "ends": (line.source, line.target)} for line, kind in lines],
        data={"nodes": [_node_data(node) for node in diff.nodes]},
    )
    return page


def _blocks(diff: GraphDiff) -> list[_Block]:
    position = {id(node): i for i, node in enumerate(diff.nodes)}
    by_name = {node.name: node for node in diff.nodes if node.status == "removed" and node.into}
    folded = {i: [position[id(by_name[name])] for name in node.folded] for i, node in enumerate(diff.nodes)}
    attached = {i for members in folded.values() for i in members}
    return [_Block((i, *folded[i]), _is_card(node)) for i, node in enumerate(diff.nodes) if i not in attached]


def _is_card(node: NodeDiff) -> bool:
    return bool(node.state.weights) or node.status in ("changed", "replaced")


def _draw(diff: GraphDiff, blocks: list[_Block]) -> tuple[Drawing, list[str]]:
    """Place the blocks and route the edges between them; each edge with "kept", "removed" or "inserted"."""
    block_of = {member: i for i, block in enumerate(blocks) for member in block.members}
    sides: dict[tuple[int, int], list[Edge]] = {}
    for edge in diff.edges:
        link = (block_of[edge.source], block_of[edge.target])
        if link[0] != link[1]:
            sides.setdefault(link, []).append(edge)
    weights = [1.0 if diff.nodes[block.members[0]].after else 0.4 for block in blocks]  # what is gone stands aside
    drawing = lay_out(_block_sizes(diff, blocks), sides, weights)
    kinds = []
    for line in drawing.lines:
        edges = sides[line.source, line.target]
        before, after = any(edge.before for edge in edges), any(edge.after for edge in edges)
        kinds.append("kept" if before and after else "removed" if before else "inserted")
    return drawing, kinds


def _block_sizes(diff: GraphDiff, blocks: list[_Block]) -> list[Point]:
    """Cards are all equally wide, as wide as the longest name needs."""
    nodes = [diff.nodes[block.members[0]] for block in blocks]
    wanted = [
        max(len(node.name) * _NAME_WIDTH + 48, len(_subtitle(node)) * _TEXT_WIDTH + 112)
        for node, block in zip(nodes, blocks, strict=True)
        if block.is_card
    ]
    card = min(max([_CARD_WIDTHS[0], *wanted]), _CARD_WIDTHS[1])
    found = []
    for node, block in zip(nodes, blocks, strict=True):
        height = (_CARD_HEIGHT if block.is_card else _PILL_HEIGHT) + _STRIP_HEIGHT * (len(block.members) - 1)
        pill = min(max(len(_label(node)) * _NAME_WIDTH + 42, 92.0), card)
        found.append((card if block.is_card else pill, height))
    return found


def _label(node: NodeDiff) -> str:
    """What a pill says: the operation, or of an input or output the name."""
    return node.name if node.state.op in ("input", "output") else node.state.op


def _subtitle(node: NodeDiff) -> str:
    state = node.state
    if state.weight_shape:
        return f"{state.op} {sizes(state.weight_shape)}"
    if state.weights:
        return f"{state.op}, {state.weights:,} weights"
    if node.into or not node.changes:
        return state.op
    return f"{state.op}: {node.changes[0]}"


def _block_view(diff: GraphDiff, block: _Block, box: Box) -> dict[str, Any]:
    """What the template needs to draw a block."""
    index = block.members[0]
    node = diff.nodes[index]
    return {
        "index": index,
        "node": node,
        "mark": MARKS[node.status].strip(),
        "title": _tail(node.name, int((box.width - 48) / _NAME_WIDTH)) if block.is_card else _label(node),
        "subtitle": _subtitle(node) if block.is_card else "",
        "kept": None if not node.state.weights else 1 - node.state.sparsity,
        "strips": [(i, _strip_name(diff.nodes[i], node)) for i in block.members[1:]],
        "is_card": block.is_card,
        "box": box,
        "head_height": (_CARD_HEIGHT if block.is_card else _PILL_HEIGHT),
    }


def _tail(name: str, most: int) -> str:
    """A module's path of at most so many characters: what it ends with tells layers apart.

    >>> _tail("encoder.layers.encoder_layer_0.self_attention.q_proj", 30)
    '…self_attention.q_proj'
    """
    if len(name) <= most:
        return name
    parts = name.split(".")
    while len(parts) > 1 and len(".".join(parts)) >= most:
        parts.pop(0)
    return f"…{'.'.join(parts)[1 - most :]}"


def _strip_name(norm: NodeDiff, layer: NodeDiff) -> str:
    """The BatchNorm's name without what it has in common with the layer's."""
    stem = layer.name.rpartition(".")[0]
    name = norm.name.removeprefix(f"{stem}.") if stem else norm.name
    return f"{norm.state.op} {name}" if name.isdecimal() else name


def _path(line: Line) -> str:
    """The line with rounded corners, as an SVG path."""
    points = line.points
    parts = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        enter, leave = _towards(corner, before), _towards(corner, after)
        parts.append(f"L{enter[0]:.1f} {enter[1]:.1f}Q{corner[0]:.1f} {corner[1]:.1f} {leave[0]:.1f} {leave[1]:.1f}")
    parts.append(f"L{points[-1][0]:.1f} {points[-1][1]:.1f}")
    return "".join(parts)


def _towards(corner: Point, other: Point) -> Point:
    """The point on the way from a corner to the next where its rounding ends."""
    length = abs(corner[0] - other[0]) + abs(corner[1] - other[1])
    share = min(_CORNER, length / 2) / length if length else 0.0
    return corner[0] + (other[0] - corner[0]) * share, corner[1] + (other[1] - corner[1]) * share


def _costs(diff: GraphDiff) -> list[tuple[str, str, str, str]]:
    """(heading, before, after, change) of every cost that is known."""
    old, new = diff.costs_before, diff.costs_after
    rows: list[tuple[str, int | None, int | None]] = [
        ("Nodes", old.nodes, new.nodes),
        ("Parameters", old.parameters, new.parameters),
        ("Non-zero parameters", old.nonzeros, new.nonzeros),
        ("MACs", old.macs, new.macs),
        ("… with a non-zero weight", old.nonzero_macs, new.nonzero_macs),
    ]
    return [(name, _count(a), _count(b), relative(a, b)) for name, a, b in rows if a is not None or b is not None]


def _count(count: int | None) -> str:
    return count_si(count) if count is None or count >= 10**6 else f"{count:,}"


def _node_data(node: NodeDiff) -> dict[str, Any]:
    return node.to_dict() | {"picture": None if node.picture is None else _picture_data(node.picture)}


def _picture_data(picture: WeightPicture) -> dict[str, Any]:
    fields = {f.name: getattr(picture, f.name) for f in dataclasses.fields(picture)}
    for name, value in fields.items():
        if isinstance(value, bytes):
            fields[name] = base64.b64encode(value).decode("ascii")
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields[name] = dataclasses.asdict(value)
    return fields
