"""What takes the place of decompositions for many columns, each against the decomposition itself."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fxprune.solvers import LayerProblem
from fxprune.solvers.few_columns import LowRankSystems
from fxprune.solvers.shifted_systems import (
    DenseSystems,
    conjugate_gradients,
    divided_by_shifts,
    inverse,
    inverse_diagonal,
    inverse_of_lower,
    systems_of,
    unit_diagonal,
)

module = importlib.import_module("fxprune.solvers.shifted_systems")


@pytest.fixture
def of_few(make_case):
    """A damped problem whose inputs were seen in 6 patches, of 5 dead columns among 61."""
    case = make_case(7, 61, samples=6)
    case.inputs[10:15] = 0
    return replace(case.problem, rank=6).damped(0.01)


def shifted(matrix: Tensor, rho: float) -> Tensor:
    return matrix + rho * torch.eye(len(matrix), dtype=matrix.dtype)


@pytest.mark.parametrize("leaf", [1, 4, 16, 64])
@pytest.mark.parametrize("columns", [1, 2, 31, 40])
def test_inverses_by_halves(make_case, monkeypatch, columns, leaf):
    monkeypatch.setattr(module, "INVERSE_LEAF", leaf)
    hessian = make_case(3, columns, correlation=0.5).problem.damped(0.01).hessian
    torch.testing.assert_close(inverse(hessian), torch.linalg.inv(hessian))
    lower = torch.linalg.cholesky(hessian)
    torch.testing.assert_close(inverse_of_lower(lower), torch.linalg.inv(lower))


def test_low_rank_form_is_the_hessian(of_few, monkeypatch):
    systems = of_few.low_rank
    assert isinstance(systems, LowRankSystems)
    assert systems.factor.shape == (61, 6)
    hessian, x = unit_diagonal(of_few.hessian).float(), torch.randn(7, 61)
    torch.testing.assert_close(systems.product(x), x @ hessian, rtol=1e-4, atol=1e-4)
    for rho in (0.0, 0.1, 3.0):
        torch.testing.assert_close(systems.divided(systems.product(x) + rho * x, rho), x, rtol=1e-3, atol=1e-3)


def test_a_rank_that_is_too_low_is_not_believed(of_few):
    assert replace(of_few, rank=5, factors={}).low_rank is None
    assert replace(of_few, rank=8, factors={}).low_rank is None  # 61 / 8 columns are the most that pay.
    assert replace(of_few, rank=None, factors={}).low_rank is None
    assert isinstance(systems_of(replace(of_few, rank=5, factors={})), DenseSystems)


@pytest.mark.parametrize("wide", [1, 1000])
@pytest.mark.parametrize("rank", [6, None])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_diagonal_of_the_inverse(of_few, monkeypatch, size, rank, wide):
    monkeypatch.setattr(module, "WIDE", wide)
    problem = LayerProblem(size * of_few.hessian, of_few.target, of_few.weight, shift=size * of_few.shift, rank=rank)
    expected = torch.linalg.inv(problem.hessian).diagonal()
    torch.testing.assert_close(inverse_diagonal(problem), expected, rtol=1e-3, atol=0)


def test_diagonal_where_float32_cannot_factor(monkeypatch):
    monkeypatch.setattr(module, "WIDE", 1)
    hessian = torch.full((4, 4), 1.0, dtype=torch.float64) + 1e-9 * torch.eye(4, dtype=torch.float64)
    problem = LayerProblem(hessian, hessian, hessian)
    torch.testing.assert_close(inverse_diagonal(problem), torch.linalg.inv(hessian).diagonal(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_divided_by_shifts(make_case, monkeypatch, correlation):
    """Two groups, each with shifts of its own; more shifts take no more products."""
    monkeypatch.setattr(module, "SHIFTS_TOLERANCE", 1e-7)
    cases = [make_case(5, 33, samples=20, correlation=correlation, seed=seed).problem for seed in range(2)]
    hessian, wanted = (torch.stack([getattr(case, name) for case in cases]) for name in ("hessian", "target"))
    scales = torch.tensor([0.5, 2.0], dtype=torch.float64)[:, None, None]
    shifts = [value * scales for value in (0.01, 0.1, 1.0, 10.0)]
    for found, shift in zip(divided_by_shifts(hessian, wanted, shifts), shifts, strict=True):
        expected = wanted @ torch.linalg.inv(hessian + shift * torch.eye(33, dtype=torch.float64))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    zero = divided_by_shifts(hessian, torch.zeros_like(wanted), shifts)
    assert all(not found.any() for found in zero)


@pytest.mark.parametrize("rho", [0.0, 0.1, 0.3, 1.0])
def test_conjugate_gradients(make_case, monkeypatch, rho):
    monkeypatch.setattr(module, "product_dtype", lambda device: torch.float32)
    hessian = unit_diagonal(make_case(5, 40, correlation=0.6).problem.damped(0.01).hessian)
    systems, wanted = DenseSystems(hessian.float()), torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    wanted[2] = 0  # A row that is solved from the start.
    nothing = torch.zeros_like(wanted)
    found, image = conjugate_gradients(systems, nothing, nothing, wanted, rho, steps=40, tolerance=1e-6)
    exact = (wanted.double() @ torch.linalg.inv(shifted(hessian, rho))).float()
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(image, found @ hessian.float(), rtol=1e-3, atol=1e-3)
    assert not nothing.any()  # What it starts from is left as it was.
    again, _ = conjugate_gradients(systems, found, image, wanted, rho, steps=40, tolerance=0.1)
    assert torch.equal(again, found)  # Good enough already.


def test_one_inverse_serves_every_rho(make_case, monkeypatch):
    """Three steps come within a few percent, however badly conditioned H is."""
    monkeypatch.setattr(module, "product_dtype", lambda device: torch.bfloat16)
    inputs = torch.randn(300, 96, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(0, -3, 96))
    mixed = inputs @ torch.randn(96, 96, generator=torch.Generator().manual_seed(1))
    hessian = unit_diagonal(shifted((mixed.mT @ mixed).double() / 300, 1e-4))
    wanted = torch.randn(4, 96, generator=torch.Generator().manual_seed(2))
    nothing = torch.zeros_like(wanted)
    for rho in (0.1, 0.3, 1.0):
        found, _ = conjugate_gradients(
            DenseSystems(hessian.float()), nothing, nothing, wanted, rho, steps=3, tolerance=0.0
        )
        exact = (wanted.double() @ torch.linalg.inv(shifted(hessian, rho))).float()
        assert (found - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("rank", [6, None])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_products_of_wide_problems(of_few, monkeypatch, size, rank):
    monkeypatch.setattr(importlib.import_module("fxprune.solvers.problem"), "WIDE", 1)
    few = LayerProblem(size * of_few.hessian, of_few.target, of_few.weight, shift=size * of_few.shift, rank=rank)
    expected = few.weight @ few.hessian
    torch.testing.assert_close(few.image(few.weight), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    stacked = replace(
        few,
        **{name: torch.stack([getattr(few, name)] * 2) for name in ("hessian", "target", "weight", "shift")},
        factors={},
    )
    torch.testing.assert_close(stacked.image(stacked.weight)[1], few.image(few.weight))


def test_a_mean_that_lowers_the_rank_leaves_the_form_exact(make_case):
    case = make_case(7, 61, samples=6)
    x = case.inputs - case.inputs.mean(1, keepdim=True)
    problem = replace(case.problem, hessian=x @ x.mT, rank=6).damped(0.01)
    systems = problem.low_rank
    assert isinstance(systems, LowRankSystems)
    y = torch.randn(7, 61)
    torch.testing.assert_close(systems.product(y), y @ unit_diagonal(problem.hessian).float(), rtol=1e-4, atol=1e-4)
