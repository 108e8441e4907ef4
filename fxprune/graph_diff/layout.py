"""Places a graph on a page, top to bottom.

Rows are ranks: a node stands one row below the lowest node that it reads. The longest path through the graph becomes
one straight column; what is left over is taken apart into longest paths again, each of which goes into the nearest
column that is free there. An edge that skips rows goes down its own column if that is free, else down a rail beside
the column. Edges from one node share a rail, so that a value read in twenty places is one line with twenty exits.

The idea is that of a layered (Sugiyama) drawing; a network is so much of a chain that crossings need no reduction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Point = tuple[float, float]

COLUMN_GAP = 26.0
ROW_GAP = 26.0
RAIL_GAP = 12.0
MARGIN = 24.0


@dataclass(frozen=True)
class Box:
    """Where a node is drawn: its upper left corner and its size, in pixels."""

    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        """Horizontal centre."""
        return self.x + self.width / 2

    def side(self, share: float) -> float:
        """The height at a share of the box, from its top."""
        return self.y + self.height * share


@dataclass(frozen=True)
class Line:
    """Where an edge is drawn: corners of a line with horizontal and vertical parts, in pixels."""

    source: int
    target: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Drawing:
    """A whole graph on a page of the given size."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]


def lay_out(
    sizes: Sequence[Point], edges: Iterable[tuple[int, int]], weights: Sequence[float] | None = None
) -> Drawing:
    """Place nodes and route edges.

    Args:
        sizes: (width, height) of every node, in topological order.
        weights: how much each node counts for the length of a path; 1 by default.
        edges: (source, target) positions in `sizes`. An edge that points backwards is drawn, but does not count for
            the ranks.
    """
    links = sorted(set(edges))
    forward = [(a, b) for a, b in links if a < b]
    ranks = _ranks(len(sizes), forward)
    columns = _columns(ranks, forward, weights or [1.0] * len(sizes))
    cells = set(zip(columns, ranks, strict=True))
    straight = {(a, b) for a, b in forward if not any((columns[a], r) in cells for r in range(ranks[a] + 1, ranks[b]))}
    slots = _rail_slots([link for link in links if link not in straight], ranks, columns)

    right = _right_edges(sizes, columns, slots)
    tops, bottoms = _rows(sizes, ranks)
    widest = {c: max(sizes[i][0] for i, column in enumerate(columns) if column == c) for c in set(columns)}
    boxes = []
    for (width, height), column, rank in zip(sizes, columns, ranks, strict=True):
        centre = right[column] - widest[column] / 2
        boxes.append(Box(centre - width / 2, (tops[rank] + bottoms[rank] - height) / 2, width, height))
    rails = {node: right[columns[node]] + COLUMN_GAP / 2 + RAIL_GAP * slot for node, slot in slots.items()}
    lines = []
    for a, b in links:
        above = tops[ranks[b]] - ROW_GAP / 2
        rail = None if (a, b) in straight else rails[a]
        lines.append(Line(a, b, tuple(_route(boxes[a], boxes[b], above, rail, columns[b] - columns[a]))))
    width = max((box.x + box.width for box in boxes), default=0.0)
    width = max([width, *rails.values()]) + MARGIN
    return Drawing(width, max(bottoms, default=0.0) + MARGIN, tuple(boxes), tuple(lines))


def _route(source: Box, target: Box, above: float, rail: float | None, columns: int) -> Iterator[Point]:
    """Corners of one edge.

    Args:
        source: where it starts.
        target: where it ends.
        above: a height in the gap above the target's row.
        rail: the rail's horizontal position, None for an edge that goes down its own column.
        columns: how many columns the target stands to the right.
    """
    if rail is None:
        yield source.middle, source.y + source.height
        if abs(source.middle - target.middle) > 0.5:
            yield source.middle, above
            yield target.middle, above
        yield target.middle, target.y
        return
    yield source.x + source.width, source.side(0.7)
    yield rail, source.side(0.7)
    if columns in (0, 1):
        yield rail, target.side(0.3)
        yield target.x + (target.width if columns == 0 else 0), target.side(0.3)
    else:
        yield rail, above
        yield target.middle, above
        yield target.middle, target.y


def _ranks(count: int, edges: list[tuple[int, int]]) -> list[int]:
    """One more than the lowest node above; a node that reads nothing stands just above its first reader."""
    ranks = [0] * count
    has_source = {b for _, b in edges}
    for a, b in edges:  # sorted by source, and sources come before targets
        ranks[b] = max(ranks[b], ranks[a] + 1)
    for node in range(count):
        readers = [ranks[b] for a, b in edges if a == node]
        if node not in has_source and readers:
            ranks[node] = max(min(readers) - 1, 0)
    return ranks


def _columns(ranks: list[int], edges: list[tuple[int, int]], weights: Sequence[float]) -> list[int]:
    """Column of each node: 0 for the longest path, then -1, 1, -2, 2, ... wherever there is room."""
    count = len(ranks)
    successors: list[list[int]] = [[] for _ in range(count)]
    for a, b in edges:
        successors[a].append(b)
    columns: dict[int, int] = {}
    taken: dict[int, list[tuple[int, int]]] = {}
    while len(columns) < count:
        path = _longest_path(successors, columns, weights)
        first = ranks[path[0]]
        readers = [ranks[b] for b in successors[path[-1]]]
        last = max(ranks[path[-1]], min(readers) - 1 if readers else 0)
        column = next(c for c in _outwards(2 * count) if all(last < a or b < first for a, b in taken.get(c, ())))
        taken.setdefault(column, []).append((first, last))
        columns.update(dict.fromkeys(path, column))
    return [columns[i] for i in range(count)]


def _outwards(limit: int) -> Iterable[int]:
    yield 0
    for distance in range(1, limit + 1):
        yield -distance
        yield distance


def _longest_path(successors: list[list[int]], placed: Mapping[int, int], weights: Sequence[float]) -> list[int]:
    """The longest path through nodes that are not placed yet."""
    count = len(successors)
    length = [0.0] * count
    follow = [-1] * count
    for node in range(count - 1, -1, -1):
        if node not in placed:
            free = [b for b in successors[node] if b not in placed]
            follow[node] = max(free, key=lambda b: length[b], default=-1)
            length[node] = weights[node] + (length[follow[node]] if free else 0)
    node = max(range(count), key=lambda i: length[i])
    path = [node]
    while follow[path[-1]] >= 0:
        path.append(follow[path[-1]])
    return path


def _rail_slots(links: list[tuple[int, int]], ranks: list[int], columns: list[int]) -> dict[int, int]:
    """For each source of the edges a place in the gutter right of its column; the shorter, the nearer to the column."""
    ends: dict[int, tuple[int, int]] = {}
    for a, b in links:
        low, high = ends.get(a, (ranks[a], ranks[a]))
        ends[a] = min(low, ranks[b]), max(high, ranks[b])
    slots: dict[int, int] = {}
    taken: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for node in sorted(ends, key=lambda n: (ends[n][1] - ends[n][0], n)):
        first, last = ends[node]
        slot = 0
        while any(first < b and a < last for a, b in taken.get((columns[node], slot), ())):
            slot += 1
        taken.setdefault((columns[node], slot), []).append((first, last))
        slots[node] = slot
    return slots


def _right_edges(sizes: Sequence[Point], columns: list[int], slots: Mapping[int, int]) -> dict[int, float]:
    """Where each column ends on the right; its gutter with the rails follows."""
    edges: dict[int, float] = {}
    x = MARGIN
    for column in sorted(set(columns)):
        members = [i for i, c in enumerate(columns) if c == column]
        edges[column] = x + max(sizes[i][0] for i in members)
        rails = max((slots[i] + 1 for i in members if i in slots), default=0)
        x = edges[column] + COLUMN_GAP + RAIL_GAP * rails
    return edges


def _rows(sizes: Sequence[Point], ranks: list[int]) -> tuple[list[float], list[float]]:
    """Top and bottom of each row."""
    tops, bottoms = [], []
    y = MARGIN
    for rank in range(max(ranks, default=-1) + 1):
        height = max((sizes[i][1] for i, r in enumerate(ranks) if r == rank), default=0.0)
        tops.append(y)
        bottoms.append(y + height)
        y += height + ROW_GAP
    return tops, bottoms
