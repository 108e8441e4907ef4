"""A constraint of one's own beside the package's: in a chain, with targets fitted twice, without statistics, in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.constraints import Constraint, Part, Rest
from fxprune.constraints.mask import Mask
from fxprune.geometry import LayerGeometry
from fxprune.options import Method
from fxprune.recipe import Recipe

HALF = Mask(fxprune.Pattern.parse("2:4"))


@dataclass(frozen=True)
class Rows(Constraint):
    """Every second output channel is zero."""

    @classmethod
    def parse(cls, text: str) -> Rows | None:
        return cls() if text == "rows" else None

    def decline(self, geometry: LayerGeometry) -> str | None:
        return "one row" if geometry.rows < 2 else None

    def solve(self, part: Part, rest: Rest, method: Method) -> tuple[Part, ...]:
        mask = torch.ones_like(part.matrix, dtype=torch.bool)
        mask[:, ::2] = False
        return rest(part.masked(mask, method))


@dataclass(frozen=True)
class Mirrored(Constraint):
    """Pairs of neighbouring input channels have one weight: no mask says so."""

    @classmethod
    def parse(cls, text: str) -> Mirrored | None:
        return cls() if text == "mirrored" else None

    def decline(self, geometry: LayerGeometry) -> str | None:
        return None if geometry.in_channels % 2 == 0 else "an odd number of input channels"

    def solve(self, part: Part, rest: Rest, method: Method) -> tuple[Part, ...]:
        problem, both = part.problem, torch.eye(part.geometry.columns // 2).repeat_interleave(2, 1).to(part.matrix)
        shared = torch.linalg.solve(both @ problem.hessian @ both.mT, (problem.target @ both.mT).mT).mT
        return rest(Part(part.geometry, problem, shared @ both))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


def compiled(model: nn.Module, *chain: Constraint, **settings: object) -> fxprune.CompiledModule:
    images = torch.randn(96, 4, 8, 8, generator=torch.Generator().manual_seed(1)).split(32)
    return fxprune.compile(model, images, Recipe((("*", chain),)), progress=False, **settings)


@pytest.mark.parametrize("method", ["admm", "sparsegpt", "magnitude"])
@pytest.mark.parametrize("chain", [(Rows(), HALF), (HALF, Rows())], ids=["rows first", "mask first"])
def test_masks_in_a_chain_hold_together(model: nn.Module, chain: tuple[Constraint, ...], method: str) -> None:
    result = compiled(model, *chain, method=method)
    for name in ("0", "2", "4"):
        weight: Tensor = result.get_submodule(name).weight
        assert not weight[::2].any()
        assert weight[1::2].flatten(1).any(1).all()
        assert HALF.pattern.check(weight).ok
        assert result.report[name].sparsity == pytest.approx(0.75)


def test_the_second_mask_chooses_among_what_the_first_left(model: nn.Module) -> None:
    both, first = compiled(model, Rows(), HALF), compiled(model, Rows())
    kept = first.get_submodule("0").weight != 0
    assert int((both.get_submodule("0").weight != 0).sum()) == int(kept.sum()) // 2


def test_a_relu_aware_fit_breaks_no_constraint_without_a_mask(model: nn.Module) -> None:
    result = compiled(model, Mirrored(), options=fxprune.Options(target="relu_aware"))
    for name in ("0", "2", "4"):
        weight: Tensor = result.get_submodule(name).weight
        torch.testing.assert_close(weight[:, ::2], weight[:, 1::2])
        assert result.report[name].relative_error < 1


def test_a_file_needs_not_the_class(model: nn.Module, tmp_path: Path) -> None:
    result = compiled(model, Rows())
    fxprune.save(result, tmp_path / "model.pt")
    loaded = fxprune.load(tmp_path / "model.pt")
    assert loaded.report == result.report
    assert not loaded.get_submodule("2").weight[::2].any()
