"""Layers whose value is not W x + b are found by measuring, and left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import prune

import fxprune
from fxprune.errors import GraphError
from fxprune.passes import CheckHooks, FoldBatchNorm, RemoveInplace
from fxprune.passes.check_hooks import changed_by_hooks
from fxprune.tracing import trace
from tests.pipelines import calibration

X = torch.randn(16, 8, 9, 9, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3))
    model[1].running_mean.normal_()
    return model.eval()


def _clamp_weight(module: nn.Module, args: Any) -> None:
    module.weight.data = module.weight.data.clamp(-0.5, 0.5)


CHANGING: dict[str, Callable[[nn.Module], Any]] = {
    "doubles": lambda layer: layer.register_forward_hook(lambda module, args, y: 2 * y),
    "adds in place": lambda layer: layer.register_forward_hook(lambda module, args, y: y.add_(1)),
    "rounds the input": lambda layer: layer.register_forward_pre_hook(lambda module, args: (args[0].round(),)),
    "writes into the input": lambda layer: layer.register_forward_pre_hook(lambda module, args: (args[0].mul_(2),)),
    "limits what is rarely reached": lambda layer: layer.register_forward_hook(lambda module, args, y: y.clamp(-3, 3)),
    "keeps the weight small, as it is": lambda layer: layer.register_forward_pre_hook(_clamp_weight),
    "has a forward of its own": lambda layer: setattr(
        layer, "forward", lambda x: nn.functional.conv2d(x, layer.weight) - 1
    ),
}


@pytest.mark.parametrize("change", CHANGING.values(), ids=CHANGING.keys())
@pytest.mark.parametrize("index", [0, 3])
def test_a_layer_that_is_changed_is_kept_with_its_batchnorm(change: Callable[[nn.Module], Any], index: int) -> None:
    model = network()
    change(model[index])
    before, wanted = copy.deepcopy(model.state_dict()), model(X.clone())
    x = X.clone()
    compiled = fxprune.compile(model, [x], progress=False)
    assert torch.equal(x, X)
    kept, other = compiled.report[str(index)], compiled.report[str(3 - index)]
    assert kept.status == "kept"
    assert "is not W x + b" in kept.reason
    assert "remove the hook" in kept.reason
    assert other.status == "pruned"
    assert torch.equal(compiled.get_parameter(f"{index}.weight"), before[f"{index}.weight"])
    assert any(isinstance(module, nn.BatchNorm2d) for module in compiled.modules()) == (index == 0)
    whole = fxprune.compile(model, [X], exclude=("*",), progress=False)
    torch.testing.assert_close(whole(X.clone()), wanted)


def test_hooks_that_only_look_do_not_matter() -> None:
    plain, seen = fxprune.compile(network(), [X], progress=False), []
    handle = register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        compiled = fxprune.compile(network(), [X], progress=False)
    finally:
        handle.remove()
    assert seen
    assert torch.equal(compiled.get_parameter("0.weight"), plain.get_parameter("0.weight"))
    model = network()
    model[3].register_forward_hook(lambda module, args, y: seen.append(y.shape))
    model[3].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    assert fxprune.compile(model, [X], progress=False).report["3"].status == "pruned"


@pytest.mark.parametrize(
    ("register", "hook", "kind"),
    [
        (
            register_module_forward_hook,
            lambda module, args, y: y * 2 if isinstance(module, nn.Conv2d) else None,
            nn.Conv2d,
        ),
        (register_module_forward_pre_hook, lambda module, args: (args[0] + 1,), (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)),
        (
            register_module_forward_hook,
            lambda m, args, y: y * 2 if isinstance(m, nn.BatchNorm2d) else None,
            nn.BatchNorm2d,
        ),
    ],
)
def test_hooks_on_all_modules(register: Any, hook: Any, kind: Any) -> None:
    graph_module = trace(network())
    handle = register(hook)
    try:
        changed = changed_by_hooks(graph_module, X)
        CheckHooks()(graph_module, calibration([X]))
        FoldBatchNorm()(graph_module)
    finally:
        handle.remove()
    assert set(changed) == {name for name, m in graph_module.named_modules() if name and isinstance(m, kind)}
    assert isinstance(graph_module.get_submodule("1"), nn.BatchNorm2d)


def test_nothing_is_left_behind_by_looking() -> None:
    graph_module = trace(network())
    graph_module.get_submodule("3").register_forward_hook(lambda module, args, y: None)
    before, x = copy.deepcopy(graph_module.state_dict()), X.clone()
    assert changed_by_hooks(graph_module, x) == {}
    assert torch.equal(x, X)
    torch.testing.assert_close(graph_module.state_dict(), before, rtol=0, atol=0)


def test_where_hooks_leave_nothing_to_prune_a_warning_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3))
    model[0].register_forward_hook(lambda module, args, y: 2 * y)
    with pytest.warns(fxprune.errors.CalibrationWarning, match="only 0% of the weights were compressed to 2:4"):
        compiled = fxprune.compile(model, [X], progress=False)
    assert compiled.report["0"].status == "kept"
    torch.testing.assert_close(compiled(X), model(X))


def test_a_bias_that_a_hook_computes() -> None:
    model, plain = network(), network()
    prune.random_unstructured(model[3], "bias", 0.5)
    plain[3].bias.data = model[3].bias.detach().clone()
    pruned, expected = (fxprune.compile(m, [X], progress=False) for m in (model, plain))
    assert pruned.report["3"].status == "pruned"
    assert torch.equal(pruned(X), expected(X))


def test_an_activation_in_place_whose_value_a_hook_replaces() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.relu(y) + y  # y has been rectified by now.

    model = Twice().eval()
    hook = model.relu.register_forward_hook(lambda module, args, y: 2 * y)
    graph_module = trace(model)
    CheckHooks()(graph_module, calibration([X]))
    with pytest.raises(GraphError, match=r"'relu' overwrites conv, which add read later, and a hook .* inplace=False"):
        RemoveInplace()(graph_module)
    hook.remove()
    graph_module = trace(model)
    CheckHooks()(graph_module, calibration([X]))
    RemoveInplace()(graph_module)
    assert torch.equal(graph_module(X), model(X))
