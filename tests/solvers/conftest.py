"""Layer problems in float64 whose inputs are known, so that a naive reference can work on the inputs themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fxprune.solvers import LayerProblem


@dataclass(frozen=True)
class Case:
    """Inputs X (D, P), wanted outputs Y (R, P), dense weights, and the problem they pose."""

    inputs: Tensor
    outputs: Tensor
    weight: Tensor

    @property
    def problem(self) -> LayerProblem:
        count = self.inputs.shape[1]
        return LayerProblem(self.inputs @ self.inputs.mT / count, self.outputs @ self.inputs.mT / count, self.weight)


@pytest.fixture
def make_case() -> Callable[..., Case]:
    def make(
        rows: int,
        columns: int,
        *,
        samples: int | None = None,
        correlation: float = 0.0,
        own_output: bool = False,
        seed: int = 0,
    ) -> Case:
        """`correlation` is how much of every input is one shared signal; `own_output` wants what the weights give."""
        generator = torch.Generator().manual_seed(seed)
        normal = {"generator": generator, "dtype": torch.float64}
        samples = samples or 4 * columns
        inputs = torch.randn(columns, samples, **normal) * (0.3 + torch.rand(columns, 1, **normal))
        inputs = (1 - correlation) * inputs + correlation * torch.randn(1, samples, **normal)
        weight = torch.randn(rows, columns, **normal)
        noise = 0 if own_output else torch.randn(rows, samples, **normal)
        return Case(inputs, weight @ inputs + noise, weight)

    return make
