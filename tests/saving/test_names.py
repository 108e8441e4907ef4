"""Names: whatever PyTorch allows is traced, saved and loaded, or refused with the remedy."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

import fxprune
from fxprune.errors import CheckpointError, TraceError
from fxprune.graph.code_names import RESERVED
from fxprune.saving import load, save

# Keywords; what Python reads in another form (the ligature fi, an accent on its own); what no identifier can hold; what
# generated code uses itself.
NAMES = (
    "class", "global", "None", "lambda", "match",
    "\ufb01", "e\u0301", "\u00e9", "\u65e5\u672c", "block1-0", "global pool", "1x1",
    "'", "{0}", "%s", "a;b", "#", "self", "torch", "device", "inf", "input", "output", "getattr", "_x", "__x",
)  # fmt: skip


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(OrderedDict([(name, nn.Conv2d(4, 4, 3))]))
    return nn.Sequential(OrderedDict([(name, nn.Conv2d(4, 4, 3)), ("inner", inner), ("again", nn.ReLU())]))


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_compiled_saved_and_loaded(name: str, tmp_path: Path) -> None:
    x = torch.randn(4, 4, 7, 7)
    model = network(name)
    before = fxprune.compile(model, [x], method="magnitude", device="cpu", progress=False)
    save(before, tmp_path / "a.pt")
    after = load(tmp_path / "a.pt")
    assert torch.equal(after(x), before(x))
    assert after.code == before.code
    assert list(after.state_dict()) == list(model.state_dict())
    assert after.report == before.report
    assert [layer.name for layer in after.report.layers] == [name, f"inner.{name}"]
    again = fxprune.compile(after, [x], "1:4", method="magnitude", device="cpu", progress=False)
    assert again.report.sparsity == 0.75


class Parts(nn.Module):
    """Weights with such names, which are read and not called."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.ParameterDict({"lambda": torch.rand(1), "w-1": torch.rand(1)})
        self.shift = nn.Module()
        self.shift.register_buffer("in", torch.rand(1))
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) * self.scale["lambda"] + self.scale["w-1"] * getattr(self.shift, "in")


def test_weights_may_have_any_name_too(tmp_path: Path) -> None:
    x = torch.randn(4, 4, 2, 2)
    model = Parts()
    before = fxprune.compile(model, [x], "0.5", method="magnitude", exclude=("conv",), device="cpu", progress=False)
    save(before, tmp_path / "a.pt")
    assert torch.allclose(load(tmp_path / "a.pt")(x), model(x))
    assert list(load(tmp_path / "a.pt").state_dict()) == list(before.state_dict())


@pytest.mark.parametrize("name", ["graph", "code", "meta", "report", "of", "recompile", "shape_env"])
def test_names_that_a_graph_module_needs_are_refused_with_the_remedy(name: str) -> None:
    x = torch.randn(4, 4, 7, 7)
    with pytest.raises(TraceError, match=rf"part named '{name}'.*Sequential\(model\).*'0\.{name}'"):
        fxprune.compile(network(name), [x], method="magnitude", device="cpu", progress=False)
    compiled = fxprune.compile(nn.Sequential(network(name)), [x], method="magnitude", device="cpu", progress=False)
    assert compiled.report[f"0.{name}"].sparsity == 0.5


def test_no_public_attribute_of_a_compiled_module_is_forgotten() -> None:
    assert {name for name in vars(fxprune.CompiledModule) if not name.startswith("_")} <= RESERVED


@pytest.mark.parametrize("name", ['a"b', "a\\b"])
def test_what_could_end_a_string_is_traced_but_not_saved(name: str, tmp_path: Path) -> None:
    x = torch.randn(4, 4, 7, 7)
    model = network(name)
    compiled = fxprune.compile(model, [x], exclude=("*",), method="magnitude", device="cpu", progress=False)
    assert torch.allclose(compiled(x), model(x))
    with pytest.raises(CheckpointError, match=r"has a part named '.*rename it"):
        save(compiled, tmp_path / "a.pt")


def test_a_name_with_a_line_break_is_refused() -> None:
    with pytest.raises(TraceError, match=r"'a\\nb' cannot stand in a line of code; rename"):
        fxprune.compile(network("a\nb"), [torch.randn(4, 4, 7, 7)], device="cpu", progress=False)


def test_a_graph_without_such_names_is_written_by_torch_itself() -> None:
    plain = symbolic_trace(nn.Sequential(nn.ReLU()))
    assert fxprune.tracing.trace(nn.Sequential(nn.ReLU())).graph._codegen.__class__ is plain.graph._codegen.__class__
