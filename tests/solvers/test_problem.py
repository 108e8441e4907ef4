"""The layer problem: what its loss is, where its optimum lies, and what damping does to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fxprune.errors import SolverError
from fxprune.solvers import LayerProblem


def test_loss_is_the_squared_output_error_up_to_a_constant(make_case):
    case = make_case(5, 7)
    other = torch.randn(5, 7, dtype=torch.float64)

    def error(weight: Tensor) -> Tensor:
        return ((case.outputs - weight @ case.inputs) ** 2).sum() / case.inputs.shape[1]

    difference = case.problem.loss(other) - case.problem.loss(case.weight)
    torch.testing.assert_close(difference, error(other) - error(case.weight))


def test_optimum_is_least_squares(make_case):
    case = make_case(5, 7)
    expected = torch.linalg.lstsq(case.inputs.mT, case.outputs.mT).solution.mT
    torch.testing.assert_close(case.problem.optimum(), expected)


def test_optimum_of_its_own_output_is_the_weight(make_case):
    case = make_case(5, 7, own_output=True)
    torch.testing.assert_close(case.problem.optimum(), case.weight)


def test_damping_pulls_towards_the_weights(make_case):
    """Damping by lambda is least squares with sqrt(lambda P) more samples, one an input, that want the dense weights."""
    case = make_case(4, 6)
    hessian = case.problem.hessian
    damped = case.problem.damped(0.1)
    shift = 0.1 * sum(float(hessian[i, i]) for i in range(6)) / 6
    for i in range(6):
        for j in range(6):
            assert float(damped.hessian[i, j] - hessian[i, j]) == pytest.approx(shift if i == j else 0, abs=1e-12)
    assert damped.damping == 0.1
    extra = (shift * case.inputs.shape[1]) ** 0.5 * torch.eye(6, dtype=torch.float64)
    inputs, outputs = torch.cat([case.inputs, extra], 1), torch.cat([case.outputs, case.weight @ extra], 1)
    expected = torch.linalg.lstsq(inputs.mT, outputs.mT).solution.mT
    torch.testing.assert_close(damped.optimum(), expected)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_dead_input_costs_nothing(make_case, damping):
    """The other weights are found as if it were not there, and its own stays as it was."""
    case = make_case(4, 6, own_output=True)
    case.inputs[2] = 0
    problem = replace(case.problem, target=case.weight @ case.problem.hessian)
    damped = problem.damped(damping)
    assert damped.damping == damping
    torch.testing.assert_close(damped.optimum(), case.weight)


def test_fewer_samples_than_columns(make_case):
    """H has rank 3 of 8; without damping there is none to invert, so the damping is raised, and what was used is on record."""
    case = make_case(4, 8, samples=3)
    assert torch.linalg.matrix_rank(case.problem.hessian) == 3
    damped = case.problem.damped(0.0)
    assert damped.damping >= 1e-6
    assert torch.linalg.eigvalsh(damped.hessian).min() > 0
    assert torch.isfinite(damped.optimum()).all()
    assert case.problem.damped(0.01).damping == 0.01


def test_damping_is_raised_tenfold_until_the_factorisation_succeeds():
    hessian = torch.diag(torch.tensor([1.0, 1.0, -5e-4], dtype=torch.float64))
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    damped = LayerProblem(hessian, zeros, zeros).damped(1e-5)
    assert damped.damping == pytest.approx(1e-3)  # 1e-5 and 1e-4 do not outweigh -5e-4.
    assert torch.linalg.eigvalsh(damped.hessian).min() > 0


@pytest.mark.parametrize("sign", [1, -1])
def test_inputs_that_are_the_same_for_all_images_leave_the_weights(sign):
    """Their centred moments are rounding, the diagonal too, whose mean may be of either sign."""
    noise = torch.randn(6, 6, dtype=torch.float64)
    hessian = 1e-13 * (noise + noise.mT)
    hessian -= hessian.diagonal().sum() / 6 * torch.eye(6, dtype=torch.float64)
    hessian += sign * 1e-16 * torch.eye(6, dtype=torch.float64)
    weight = torch.randn(3, 6, dtype=torch.float64)
    damped = LayerProblem(hessian, weight @ hessian, weight).damped(0.01)
    torch.testing.assert_close(damped.optimum(), weight)


def test_a_hopeless_hessian_is_an_error():
    hessian = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(SolverError, match="not positive definite even with damping"):
        LayerProblem(hessian, zeros, zeros).damped(0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["hessian", "target"])
def test_statistics_that_are_not_finite_are_an_error(make_case, bad, where):
    problem = make_case(3, 4).problem
    getattr(problem, where)[1, 1] = bad
    with pytest.raises(SolverError, match="NaN or infinite"):
        problem.damped(0.01)


def test_each_group_is_damped_by_its_own_scale(make_case):
    cases = [make_case(3, 5, seed=seed).problem for seed in range(3)]
    scales = (1.0, 100.0, 0.0)  # The last group's inputs are all dead.
    stacked = LayerProblem(
        torch.stack([c.hessian * s for c, s in zip(cases, scales, strict=True)]),
        torch.stack([c.target * s for c, s in zip(cases, scales, strict=True)]),
        torch.stack([c.weight for c in cases]),
    )
    damped = stacked.damped(0.05)
    for group, case, scale in zip(list(damped.groups())[:2], cases, scales, strict=False):
        alone = LayerProblem(case.hessian * scale, case.target * scale, case.weight).damped(0.05)
        torch.testing.assert_close(group.hessian, alone.hessian)
        torch.testing.assert_close(group.target, alone.target)
    torch.testing.assert_close(damped.optimum()[2], cases[2].weight)  # Nothing to learn from: the weights stay.
    assert damped.loss(damped.optimum()).shape == (3,)
