from __future__ import annotations

import itertools
import random

import pytest

from fxprune.graph_diff.layout import Box, Drawing, lay_out

CARD = (200.0, 46.0)


def overlaps(a: Box, b: Box) -> bool:
    return a.x < b.x + b.width and b.x < a.x + a.width and a.y < b.y + b.height and b.y < a.y + a.height


def inside(box: Box, start: tuple[float, float], end: tuple[float, float]) -> bool:
    """Whether a horizontal or vertical stretch goes through the inside of a box."""
    (left, right), (top, bottom) = sorted((start[0], end[0])), sorted((start[1], end[1]))
    clear_x = right <= box.x + 0.01 or left >= box.x + box.width - 0.01
    clear_y = bottom <= box.y + 0.01 or top >= box.y + box.height - 0.01
    return not (clear_x or clear_y)


def check(drawing: Drawing) -> None:
    """Nothing overlaps, nothing leaves the page, and every line goes around every box."""
    for a, b in itertools.combinations(drawing.boxes, 2):
        assert not overlaps(a, b)
    for box in drawing.boxes:
        assert box.x >= 0
        assert box.x + box.width <= drawing.width
        assert box.y >= 0
        assert box.y + box.height <= drawing.height
    for line in drawing.lines:
        for start, end in itertools.pairwise(line.points):
            assert start[0] == end[0] or start[1] == end[1], "a slanted stretch"
            assert not any(inside(box, start, end) for box in drawing.boxes)
            assert 0 <= end[0] <= drawing.width


def test_a_chain_is_one_straight_column() -> None:
    drawing = lay_out([CARD, (80.0, 26.0), CARD], [(0, 1), (1, 2)])
    check(drawing)
    assert len({box.middle for box in drawing.boxes}) == 1
    assert [len(line.points) for line in drawing.lines] == [2, 2]
    assert [box.y for box in drawing.boxes] == sorted(box.y for box in drawing.boxes)


def test_a_residual_edge_runs_beside_the_column() -> None:
    drawing = lay_out([CARD] * 5, [(0, 1), (1, 2), (2, 3), (3, 4), (0, 3)])
    check(drawing)
    (skip,) = (line for line in drawing.lines if (line.source, line.target) == (0, 3))
    right = max(box.x + box.width for box in drawing.boxes)
    assert [x > right for x, _ in skip.points] == [False, True, True, False]
    assert len({box.middle for box in drawing.boxes}) == 1


def test_the_longer_branch_keeps_the_column_and_the_shorter_steps_aside() -> None:
    drawing = lay_out([CARD] * 5, [(0, 1), (1, 2), (2, 4), (0, 3), (3, 4)])
    check(drawing)
    middles = [box.middle for box in drawing.boxes]
    assert middles[0] == middles[1] == middles[2] == middles[4] != middles[3]


def test_weights_say_which_branch_keeps_the_column() -> None:
    edges = [(0, 1), (0, 2), (1, 3), (2, 3)]
    for light in (1, 2):
        weights = [1.0 if node != light else 0.4 for node in range(4)]
        middles = [box.middle for box in lay_out([CARD] * 4, edges, weights).boxes]
        assert middles[light] != middles[0] == middles[3 - light]


def test_many_edges_of_one_node_share_a_rail() -> None:
    # As in DenseNet: node 0 is read by every second node of a chain.
    chain = [(i, i + 1) for i in range(8)]
    drawing = lay_out([CARD] * 9, [*chain, (0, 2), (0, 4), (0, 6), (0, 8)])
    check(drawing)
    rails = {line.points[1][0] for line in drawing.lines if len(line.points) == 4}
    assert len(rails) == 1


def test_an_empty_graph_and_a_single_node() -> None:
    assert lay_out([], []).boxes == ()
    check(lay_out([CARD], []))


def test_an_edge_that_points_backwards_is_drawn() -> None:
    drawing = lay_out([CARD] * 3, [(0, 1), (1, 2), (2, 0)])
    assert {(line.source, line.target) for line in drawing.lines} == {(0, 1), (1, 2), (2, 0)}


@pytest.mark.parametrize("seed", range(30))
def test_random_graphs_are_drawn_cleanly(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(2, 40)
    sizes = [(rng.choice([80.0, 120.0, 260.0]), rng.choice([26.0, 46.0, 66.0])) for _ in range(count)]
    edges = {(rng.randint(max(0, b - rng.choice([1, 3, 12])), b - 1), b) for b in range(1, count)}
    edges |= {tuple(sorted(rng.sample(range(count), 2))) for _ in range(rng.randint(0, count))}
    drawing = lay_out(sizes, edges)
    assert {(line.source, line.target) for line in drawing.lines} == edges
    check(drawing)
