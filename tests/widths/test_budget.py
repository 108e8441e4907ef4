from __future__ import annotations

import itertools

import numpy as np
import pytest

from fxprune.widths.network import LayerSize, Times
from fxprune.widths.plan import Curve, least_cost, within_budget


def layers(*times: Times | None) -> list[LayerSize]:
    """Three layers in a row, of 16, 32 and 10 channels."""
    fixed = [({}, {0: 1}, 3, 0), ({0: 1}, {1: 1}, 0, 0), ({1: 1}, {}, 0, 10)]
    return [
        LayerSize(f"layer{i}", per_pair, inputs, outputs, read, given, time)
        for i, (per_pair, (inputs, outputs, read, given), time) in enumerate(zip((9, 9, 1), fixed, times, strict=True))
    ]


def curves() -> list[Curve]:
    """Errors that grow faster and faster, the second width's cheaper ones."""
    return [
        Curve(tuple(range(16, 0, -1)), tuple((n / 16) ** 2 for n in range(16))),
        Curve(tuple(range(32, 0, -1)), tuple(0.7 * (n / 32) ** 3 for n in range(32))),
    ]


def steps(count: int, block: int, microseconds: float) -> tuple[tuple[int, float], ...]:
    """A kernel that works in blocks of channels."""
    return tuple((n, microseconds * -(-n // block)) for n in range(1, count + 1))


STEPS = (
    Times(20.0, (), steps(16, 8, 10.0)),
    Times(40.0, steps(16, 8, 20.0), steps(32, 8, 10.0)),
    Times(8.0, steps(32, 8, 2.0), ()),
)


@pytest.mark.parametrize("times", [(None, None, None), STEPS])
@pytest.mark.parametrize("share", [0.9, 0.75, 0.6, 0.4])
def test_the_budget_is_kept_and_the_error_is_near_the_least(times: tuple[Times | None, ...], share: float) -> None:
    given, of_layers = curves(), layers(*times)
    every = list(itertools.product(*(curve.choices for curve in given)))
    costs = np.array([sum(float(layer.cost(counts)) for layer in of_layers) for counts in every])
    errors = np.array(
        [sum(c.errors[c.choices.index(n)] for c, n in zip(given, counts, strict=True)) for counts in every]
    )
    found = within_budget(given, of_layers, share * costs[0])
    place = every.index(tuple(found))
    assert costs[place] <= share * costs[0]
    assert errors[place] <= 1.1 * errors[costs <= share * costs[0]].min()


def test_no_channel_goes_that_saves_no_time() -> None:
    found = within_budget(curves(), layers(*STEPS), 0.7 * 68)
    assert all(n % 8 == 0 for n in found)
    assert any(n % 8 for n in within_budget(curves(), layers(None, None, None), 0.7 * 5360))


def test_times_between_measured_numbers() -> None:
    times = Times(40.0, ((8, 20.0), (16, 40.0)), ((8, 10.0), (32, 40.0)))
    assert times.at(16, 32) == pytest.approx(40.0)
    assert times.at(12, 20) == pytest.approx(30.0 * 25.0 / 40.0)
    assert times.at(np.array([8, 16]), 8) == pytest.approx([5.0, 10.0])
    assert Times(40.0, (), ((8, 10.0), (32, 40.0))).at(7, 8) == pytest.approx(10.0)


def test_the_least_cost() -> None:
    assert least_cost(curves(), layers(None, None, None)) == 9 * 3 + 9 + 10
