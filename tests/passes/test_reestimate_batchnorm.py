from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

from fxprune.errors import CalibrationError
from fxprune.passes.base import changes
from fxprune.passes.reestimate_batchnorm import ReestimateBatchNorm


def network() -> nn.Sequential:
    """Two BatchNorms in float64 with statistics that are off, and a Dropout that must stay silent."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=0.1),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5, momentum=0.3, affine=False),
        nn.Flatten(),
        nn.Linear(5 * 4, 2),
    )
    for index in (1, 5):
        model[index].running_mean.normal_()
        model[index].running_var.uniform_(2, 3)
        model[index].num_batches_tracked.fill_(77)
    return model.double().eval()


def batches() -> list[Tensor]:
    return [torch.randn(size, 3, 6, 6, dtype=torch.float64) * size + size for size in (2, 4, 3)]


def traced(model: nn.Module) -> GraphModule:
    return torch.fx.symbolic_trace(copy.deepcopy(model))


def test_is_the_average_of_the_batches_statistics() -> None:
    model, data = network(), batches()
    graph_module = traced(model)
    assert ReestimateBatchNorm(data)(graph_module).modified
    first, second = [], []
    for x in data:
        y = model[0](x)
        first.append((y.mean((0, 2, 3)), y.var((0, 2, 3))))
        norm = model[1]
        y = F.batch_norm(y, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
        y = model[4](y.relu())
        second.append((y.mean((0, 2, 3)), y.var((0, 2, 3))))
    for name, statistics in (("1", first), ("5", second)):
        norm = graph_module.get_submodule(name)
        mean, var = (torch.stack(values).mean(0) for values in zip(*statistics, strict=True))
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-12, atol=1e-12)
        assert norm.num_batches_tracked == 3
    assert [(change.action, change.target, change.reason) for change in changes(graph_module)] == [
        ("replaced", "1", "re-estimated on 3 batches"),
        ("replaced", "5", "re-estimated on 3 batches"),
    ]


def test_makes_up_for_a_disturbed_weight() -> None:
    # The purpose: scaling and shifting a layer in front of a BatchNorm is undone by new statistics.
    model, x = network(), torch.randn(64, 3, 6, 6, dtype=torch.float64)
    dense, disturbed = traced(model), traced(model)
    with torch.no_grad():
        disturbed.get_submodule("4").weight.mul_(3)
        disturbed.get_submodule("4").bias.add_(2)
    ReestimateBatchNorm([x])(dense)
    ReestimateBatchNorm([x])(disturbed)
    torch.testing.assert_close(disturbed(x), dense(x), rtol=1e-4, atol=1e-4)  # Up to eps.


def test_second_run_changes_nothing() -> None:
    graph_module, data = traced(network()), batches()
    assert ReestimateBatchNorm(data)(graph_module).modified
    recorded = changes(graph_module)
    assert not ReestimateBatchNorm(data)(graph_module).modified
    assert changes(graph_module) == recorded
    assert ReestimateBatchNorm(data[:2])(graph_module).modified


@pytest.mark.parametrize("training", [True, False])
def test_every_flag_and_every_parameter_is_as_before(training: bool) -> None:
    graph_module = traced(network().train(training))
    graph_module.get_submodule("3").train()
    graph_module.get_submodule("5").eval()
    flags = [module.training for module in graph_module.modules()]
    parameters = copy.deepcopy(dict(graph_module.named_parameters()))
    ReestimateBatchNorm(batches())(graph_module)
    assert [module.training for module in graph_module.modules()] == flags
    assert [graph_module.get_submodule(name).momentum for name in ("1", "5")] == [0.1, 0.3]
    torch.testing.assert_close(dict(graph_module.named_parameters()), parameters, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in graph_module.parameters())


@pytest.mark.parametrize("wrap", [lambda x: (x, 1), lambda x: [x], lambda x: {"image": x, "label": 2}, lambda x: (x,)])
def test_forms_of_a_batch(wrap: Any) -> None:
    data = batches()
    plain, wrapped = traced(network()), traced(network())
    wrapped.load_state_dict(plain.state_dict())
    ReestimateBatchNorm(data)(plain)
    ReestimateBatchNorm(wrap(x) for x in data)(wrapped)
    torch.testing.assert_close(wrapped.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_dropout_stays_silent_in_a_model_in_training_mode() -> None:
    model, data = network(), batches()
    evaluated, trained = traced(model), traced(model).train()
    ReestimateBatchNorm(data)(evaluated)
    ReestimateBatchNorm(data)(trained)
    torch.testing.assert_close(trained.state_dict(), evaluated.state_dict(), rtol=0, atol=0)


def test_a_shared_batchnorm_averages_over_its_calls() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) + self.bn(input=x * 2 + 1)

    x = torch.randn(8, 3, dtype=torch.float64)
    graph_module = traced(Model().double().eval())
    ReestimateBatchNorm([x])(graph_module)
    norm = graph_module.get_submodule("bn")
    torch.testing.assert_close(norm.running_mean, (x.mean(0) + (2 * x + 1).mean(0)) / 2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, 2.5 * x.var(0), rtol=1e-12, atol=1e-12)


def test_a_batchnorm_inside_a_leaf_is_found() -> None:
    class Leaf(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else self[0](x)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Leaf) or super().is_leaf_module(m, module_qualified_name)

    model = nn.Sequential(Leaf(nn.BatchNorm1d(3), nn.BatchNorm1d(3))).eval()
    model[0][1].running_mean.fill_(5)
    graph_module = GraphModule(model, Tracer().trace(model))
    x = -torch.rand(8, 3)
    assert ReestimateBatchNorm([x])(graph_module).modified
    torch.testing.assert_close(model[0][0].running_mean, x.mean(0))
    torch.testing.assert_close(model[0][1].running_mean, torch.full((3,), 5.0), rtol=0, atol=0)
    assert [(change.action, change.reason) for change in changes(graph_module)] == [
        ("replaced", "re-estimated on 1 batches"),
        ("kept", "no calibration batch reached this BatchNorm"),
    ]


def test_without_running_statistics_or_functional_is_kept() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.bn(x), None, None, training=True)

    graph_module = traced(Model().eval())
    assert not ReestimateBatchNorm([torch.randn(2, 3, 4, 4)])(graph_module).modified
    assert [(change.action, change.node) for change in changes(graph_module)] == [
        ("kept", "bn"),
        ("kept", "batch_norm"),
    ]


def test_a_model_without_batchnorm_is_left_alone() -> None:
    graph_module = traced(nn.Sequential(nn.Linear(3, 2)))
    assert not ReestimateBatchNorm([])(graph_module).modified


def _broken(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, 0, 0, 0] = float("nan")
    return x


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "gave no batches"),
        ([torch.zeros(0, 3, 6, 6)], "batch 0 is empty: shape"),
        ([torch.zeros(2, 3, 6, 6).double(), "image.png"], "batch 1 is a str"),
        ([()], "batch 0 is an empty tuple"),
        ([_broken(torch.zeros(2, 3, 6, 6).double())], "batch 0 holds NaN or infinite"),
        (
            [torch.zeros(2, 4, 6, 6).double()],
            r"failed on calibration batch 0 at node '_0' .* \[\(2, 4, 6, 6\)\]",
        ),
        ([torch.zeros(1, 3, 5, 5).double()], "more than one value per channel|more than 1 value per channel"),
        ([torch.full((2, 3, 6, 6), 1e308, dtype=torch.float64)], "statistics that are not finite"),
    ],
)
def test_errors_leave_the_model_as_it_was(data: list[Any], message: str) -> None:
    graph_module = traced(network())
    state = copy.deepcopy(graph_module.state_dict())
    with pytest.raises(CalibrationError, match=message):
        ReestimateBatchNorm(data)(graph_module)
    torch.testing.assert_close(graph_module.state_dict(), state, rtol=0, atol=0)
    assert not any(module.training for module in graph_module.modules())
    assert [m.momentum for m in graph_module.modules() if isinstance(m, _BatchNorm)] == [0.1, 0.3]


@pytest.mark.gpu
def test_runs_on_the_device_and_comes_back() -> None:
    model, data = network(), batches()
    here, there = traced(model), traced(model)
    ReestimateBatchNorm(data)(here)
    ReestimateBatchNorm(data, device="cuda")(there)
    assert {tensor.device.type for tensor in there.state_dict().values()} == {"cpu"}
    torch.testing.assert_close(there.state_dict(), here.state_dict(), rtol=1e-9, atol=1e-9)
