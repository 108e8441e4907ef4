from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxprune.solvers import channel_elimination
from fxprune.solvers.channel_elimination import ReadUnits, eliminate


def problem(units: int, size: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """A Hessian and weights (R, n k) of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    columns = units * size
    x = torch.randn(3 * columns, columns, generator=generator, dtype=torch.float64)
    x[:, 0] = x[:, -1] + 0.1 * x[:, 0]
    hessian = x.T @ x / len(x) + 1e-3 * torch.eye(columns, dtype=torch.float64)
    return hessian, torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def loss(hessian: Tensor, weight: Tensor, kept: list[int]) -> float:
    """What the best weights on some columns lose of the output that all of them give."""
    best = torch.zeros_like(weight)
    best[:, kept] = torch.linalg.solve(hessian[kept][:, kept], (weight @ hessian)[:, kept].T).T
    return float(((best - weight) @ hessian * (best - weight)).sum())


def naive(problems: list[tuple[Tensor, Tensor, int, float]], units: int, least: int) -> tuple[list[int], list[float]]:
    """Try every unit with a fit from scratch, remove the one that costs least, and so on."""

    def total(left: list[int]) -> float:
        return sum(
            scale * loss(hessian, weight, [u * size + i for u in left for i in range(size)])
            for hessian, weight, size, scale in problems
        )

    left, order, errors = list(range(units)), [], [0.0]
    while len(left) > least:
        costs = {unit: total([u for u in left if u != unit]) for unit in left}
        unit = min(costs, key=lambda u: costs[u])
        left.remove(unit)
        order.append(unit)
        errors.append(costs[unit])
    return order, errors


@pytest.mark.parametrize("lazy", [1, 8, 256])
@pytest.mark.parametrize(
    "sizes", [[1], [4], [9], [1, 4], [2, 2, 9]], ids=["linear", "2x2", "3x3", "two readers", "three readers"]
)
def test_order_and_errors_are_those_of_trying_each(
    sizes: list[int], lazy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_elimination, "LAZY_COLUMNS", lazy)
    units, least = 7, 2
    problems = [(*problem(units, k, 3 + i, seed=i), k, 0.5 + i) for i, k in enumerate(sizes)]
    order, errors = naive(problems, units, least)
    found = eliminate([ReadUnits(torch.linalg.inv(h), w, scale) for h, w, _, scale in problems], units, least=least)
    assert found.order.tolist() == order
    torch.testing.assert_close(found.errors, torch.tensor(errors, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_what_the_other_columns_give_is_in_the_block_of_the_inverse() -> None:
    """A layer reads other channels, too: they stay, and make up for what goes."""
    units, size, others = 5, 3, 4
    hessian, weight = problem(units + others, size, 6, seed=3)
    own, rest = list(range(units * size)), list(range(units * size, (units + others) * size))
    found = eliminate([ReadUnits(torch.linalg.inv(hessian)[own][:, own], weight[:, own])], units)
    for i, error in enumerate(found.errors.tolist()):
        left = [u for u in range(units) if u not in found.order[:i].tolist()]
        kept = [u * size + j for u in left for j in range(size)] + rest
        assert error == pytest.approx(loss(hessian, weight, kept), rel=1e-6, abs=1e-9)


def test_a_duplicate_goes_first_and_costs_nothing_but_its_twin_then_does() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    x[:, 4] = 2 * x[:, 1]
    hessian = x.T @ x / len(x) + 1e-9 * torch.eye(6, dtype=torch.float64)
    weight = torch.randn(3, 6, generator=generator, dtype=torch.float64) + 2
    found = eliminate([ReadUnits(torch.linalg.inv(hessian), weight)], 6)
    assert int(found.order[0]) in (1, 4)
    assert float(found.errors[1]) < 1e-6
    assert float(found.errors[2]) > 0.1


def test_units_that_nobody_reads_cost_nothing() -> None:
    found = eliminate([], 4, least=1)
    assert len(found.order) == 3
    assert found.errors.tolist() == [0.0] * 4
