"""Copies of a compiled module: each keeps the report, or an export says that it is gone."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, symbolic_trace

import fxprune
from fxprune.errors import FxPruneError, GraphError, ValidationError
from fxprune.passes import changes

X = torch.randn(8, 4, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def compiled() -> fxprune.CompiledModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    return fxprune.compile(model, [X], method="sparsegpt", device="cpu", progress=False)


def through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[fxprune.CompiledModule], fxprune.CompiledModule]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "oldest pickle": lambda model: pickle.loads(pickle.dumps(model, protocol=2)),
    "torch.save": through_torch,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "copy of a copy": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(copy.copy(model)))),
    "half and back": lambda model: copy.deepcopy(model).half().float(),
    "to": lambda model: copy.deepcopy(model).to("cpu", torch.float32),
    "train and back": lambda model: copy.deepcopy(model).train().eval(),
}  # fmt: skip


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_keeps_the_report(name: str, compiled: fxprune.CompiledModule) -> None:
    copied = COPIES[name](compiled)
    assert isinstance(copied, fxprune.CompiledModule)
    assert copied is not compiled
    assert copied.report == compiled.report
    assert changes(copied) == changes(compiled) != ()
    assert [layer.sparsity for layer in copied.report.layers] == [0.5, 0.5]
    assert type(copied).__name__ == "Sequential"
    assert (copied.code, str(copied.graph)) == (compiled.code, str(compiled.graph))
    ours = [{key: value for key, value in n.meta.items() if key.startswith("fxprune")} for n in compiled.graph.nodes]
    assert [{key: n.meta[key] for key in kept} for n, kept in zip(copied.graph.nodes, ours, strict=True)] == ours
    assert any(ours)
    torch.testing.assert_close(copied(X), compiled(X), rtol=0, atol=0 if "half" not in name else 1e-2)
    assert [module.training for module in copied.modules()] == [module.training for module in compiled.modules()]


def test_a_deep_copy_and_a_pickle_share_nothing_and_a_shallow_copy_shares_its_modules(
    compiled: fxprune.CompiledModule,
) -> None:
    for name, shared in (("pickle", False), ("deepcopy", False), ("copy", True)):
        copied = COPIES[name](compiled)
        assert (copied.get_submodule("0") is compiled.get_submodule("0")) == shared
        assert copied.meta is not compiled.meta


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_whose_zeros_are_filled_is_not_exported(
    name: str, compiled: fxprune.CompiledModule, tmp_path: Path
) -> None:
    copied = copy.deepcopy(COPIES[name](compiled))
    copied.get_submodule("3").weight.data += 0.01
    with pytest.raises(ValidationError, match="288 of 432 zeros have been filled in"):
        fxprune.export_onnx(copied, tmp_path / "a.onnx", X)


class Calls(nn.Module):
    """Functions of all kinds, an operator of torch.ops and a constant: what tracing the code again would change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor, scale: float = 2.0) -> dict[str, torch.Tensor]:
        y = torch.ops.aten.mul.Tensor(F.gelu(self.conv(x)), torch.arange(4).view(1, -1, 1, 1))
        return {"a": (y + scale)[..., 1::2], "b": y.to(dtype=torch.float64).mean((2, 3))}


def test_pickle_keeps_a_graph_as_it_is() -> None:
    model = fxprune.compile(Calls(), [X], method="magnitude", device="cpu", progress=False)
    copied = pickle.loads(pickle.dumps(model))
    assert str(copied.graph) == str(model.graph)
    for key, value in model(X).items():
        assert torch.equal(copied(X)[key], value)
    fxprune.compile(copied, [X], "1:4", method="magnitude", device="cpu", progress=False)


def test_torchscript_takes_it(compiled: fxprune.CompiledModule) -> None:
    torch.testing.assert_close(torch.jit.script(compiled)(X), compiled(X))
    torch.testing.assert_close(torch.jit.trace(compiled, X)(X), compiled(X))


def test_torch_compile_shows_the_report_of_what_it_wraps(compiled: fxprune.CompiledModule) -> None:
    assert torch.compile(compiled, backend="eager").report == compiled.report


REPORT_LOST: dict[str, Callable[[fxprune.CompiledModule], nn.Module]] = {
    "traced again": symbolic_trace,
    "weights in another model": lambda model: nn.Sequential(*copy.deepcopy(model).children()),
}  # fmt: skip


@pytest.mark.parametrize("name", REPORT_LOST)
def test_an_export_says_that_no_pattern_was_checked(
    name: str, compiled: fxprune.CompiledModule, tmp_path: Path
) -> None:
    model = REPORT_LOST[name](compiled)
    with pytest.warns(UserWarning, match="No sparsity pattern was checked"):
        report = fxprune.export_onnx(model, tmp_path / "a.onnx", X)
    assert "No sparsity pattern was checked" in report.summary + str(report)


def test_a_graph_of_torch_exports_is_not_written_unchecked(compiled: fxprune.CompiledModule, tmp_path: Path) -> None:
    program = torch.export.export(compiled, (X,), dynamic_shapes=({0: torch.export.Dim("n")},))
    with pytest.raises(ValidationError, match=r"0, 3 was pruned.*Export the model that fxprune\.compile returned"):
        fxprune.export_onnx(program.module(), tmp_path / "a.onnx", X)
    assert not (tmp_path / "a.onnx").exists()


def test_an_export_of_what_nobody_pruned_or_of_what_has_its_report_warns_of_nothing(
    compiled: fxprune.CompiledModule, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "No sparsity pattern")
        fxprune.export_onnx(compiled, tmp_path / "a.onnx", X)
        fxprune.export_onnx(nn.Sequential(nn.Conv2d(4, 8, 3)), tmp_path / "b.onnx", X)


def test_a_report_that_is_not_there_is_an_error_with_the_reason() -> None:
    bare = fxprune.CompiledModule(nn.Module(), symbolic_trace(nn.Identity()).graph)
    with pytest.raises(GraphError, match="carries no report"):
        bare.report  # noqa: B018
    assert issubclass(GraphError, FxPruneError)
    assert isinstance(copy.deepcopy(bare), GraphModule)


class Pools(nn.Module):
    """Functions that torch makes inside other functions, where pickle does not look for them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(self.conv(x), 2)
        return F.adaptive_max_pool2d(x, 1) + F.adaptive_avg_pool2d(x, 1)


@pytest.mark.parametrize("copied", [COPIES["pickle"], COPIES["torch.save"]])
def test_pooling_by_functions_is_pickled(copied: Callable[[fxprune.CompiledModule], fxprune.CompiledModule]) -> None:
    compiled = fxprune.compile(Pools(), [X], method="magnitude", device="cpu", progress=False)
    again = copied(compiled)
    assert again.report == compiled.report
    assert torch.equal(again(X), compiled(X))
