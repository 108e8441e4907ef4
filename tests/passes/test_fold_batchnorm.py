from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune

from fxprune.calibration.calibration import Calibration
from fxprune.passes.base import Change, changes
from fxprune.passes.fold_batchnorm import FoldBatchNorm
from fxprune.tracing import trace

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def trained(model: nn.Module) -> nn.Module:
    """The model in float64 and eval mode, with BatchNorm parameters and statistics as after training."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 3)
            if module.weight is not None:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.double().eval()


def fold(model: nn.Module, *images: Tensor, modified: bool = True) -> GraphModule:
    """Trace a copy and fold it, with or without images; a second run must find nothing to do and say nothing new."""
    graph_module = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert FoldBatchNorm()(graph_module, Calibration(images) if images else None).modified is modified
    recorded = changes(graph_module)
    assert FoldBatchNorm()(graph_module).modified is False
    assert changes(graph_module) == recorded
    return graph_module


def norms_left(graph_module: GraphModule) -> int:
    return sum(isinstance(module, _BatchNorm) for module in graph_module.modules())


def assert_folded(model: nn.Module, x: Tensor) -> GraphModule:
    """Fold all BatchNorms of a model and compare it with the model as it was."""
    state = copy.deepcopy(model.state_dict())
    graph_module = fold(model, x)
    assert norms_left(graph_module) == 0
    assert {change.action for change in changes(graph_module)} == {"folded"}
    torch.testing.assert_close(graph_module(x), model(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    return graph_module


def assert_kept(model: nn.Module, x: Tensor, reason: str, norms: int = 1) -> GraphModule:
    """Nothing is folded, every BatchNorm's reason is on record, and the weights are what they were."""
    graph_module = fold(model, modified=False)
    assert norms_left(graph_module) == norms
    kept = changes(graph_module)
    assert kept
    for change in kept:
        assert (change.pass_name, change.action) == ("FoldBatchNorm", "kept")
        assert reason in change.reason
    if not any(module.training for module in model.modules()):
        torch.testing.assert_close(graph_module(x), model(x), rtol=0, atol=0)
    return graph_module


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolution(dims: int, transposed: bool, groups: int, bias: bool, affine: bool) -> None:
    options = {"output_padding": 1} if transposed else {}
    conv = (TRANSPOSED if transposed else CONVS)[dims](
        4, 12, 3, stride=2, padding=2, dilation=2, groups=groups, bias=bias, **options
    )
    model = trained(nn.Sequential(conv, NORMS[dims](12, affine=affine, eps=1e-2), nn.ReLU()))
    graph_module = assert_folded(model, torch.randn(2, 4, *[7] * dims, dtype=torch.float64))
    assert changes(graph_module) == (Change("FoldBatchNorm", "folded", "_1", "1", "_0"),)
    folded = graph_module.get_submodule("0")
    assert type(folded) is type(conv)
    assert isinstance(folded.weight, nn.Parameter)
    assert isinstance(folded.bias, nn.Parameter)


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
def test_padding_mode(padding_mode: str) -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode=padding_mode)
    assert_folded(trained(nn.Sequential(conv, nn.BatchNorm2d(4))), torch.randn(2, 3, 5, 5, dtype=torch.float64))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_after_flatten(bias: bool, affine: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.Flatten(),
        nn.Linear(27, 8, bias=bias),
        nn.BatchNorm1d(8, affine=affine),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(8, 5, bias=bias),
        nn.BatchNorm1d(5, affine=affine),
    )
    assert_folded(trained(model), torch.randn(4, 2, 5, 5, dtype=torch.float64))


class _Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(8, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(torch.tanh(x)))


@pytest.mark.parametrize("shape", [(3, 8), (3, 4, 8)])
def test_linear_on_an_unknown_number_of_dimensions_is_kept(shape: tuple[int, ...]) -> None:
    assert_kept(trained(_Dense()), torch.randn(shape, dtype=torch.float64), "(N, C) or (N, L, C) is not known")


def _by_images(graph_module: GraphModule, x: Tensor) -> bool:
    return FoldBatchNorm()(graph_module, Calibration([x])).modified


def _by_shape_prop(graph_module: GraphModule, x: Tensor) -> bool:
    ShapeProp(graph_module).propagate(x)
    return FoldBatchNorm()(graph_module).modified


@pytest.mark.parametrize("fold", [_by_images, _by_shape_prop])
def test_linear_with_known_shape(fold: Callable[[GraphModule, Tensor], bool]) -> None:
    model = trained(_Dense())
    x = torch.randn(3, 8, dtype=torch.float64)
    graph_module = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert fold(graph_module, x)
    torch.testing.assert_close(graph_module(x), model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("fold", [_by_images, _by_shape_prop])
def test_linear_on_a_sequence_normalises_another_dimension(fold: Callable[[GraphModule, Tensor], bool]) -> None:
    model = trained(_Dense())
    x = torch.randn(3, 4, 8, dtype=torch.float64)  # L = C = 4: runs, but dimension 1 is L.
    graph_module = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert not fold(graph_module, x)
    assert "3-dimensional" in changes(graph_module)[0].reason
    torch.testing.assert_close(graph_module(x), model(x), rtol=0, atol=0)


def test_unbatched_conv1d_normalises_another_dimension() -> None:
    model = trained(nn.Sequential(nn.Conv1d(2, 5, 1), nn.BatchNorm1d(5)))
    graph_module = torch.fx.symbolic_trace(model)
    ShapeProp(graph_module).propagate(torch.randn(2, 5, dtype=torch.float64))
    assert not FoldBatchNorm()(graph_module).modified
    assert "2-dimensional" in changes(graph_module)[0].reason


class _TwoConvs(nn.Module):
    """Two calls of convolutions, each followed by a BatchNorm: which of the four modules are one and the same?"""

    def __init__(self, *, share_conv: bool, share_bn: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2 = self.conv1 if share_conv else nn.Conv2d(3, 3, 3, padding=1)
        self.bn2 = self.bn1 if share_bn else nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


def test_a_shared_batchnorm_is_folded_into_both_convolutions() -> None:
    model = trained(_TwoConvs(share_conv=False, share_bn=True))
    graph_module = assert_folded(model, torch.randn(2, 3, 5, 5, dtype=torch.float64))
    assert [change.into for change in changes(graph_module)] == ["conv1", "conv2"]


def test_a_shared_convolution_under_one_batchnorm_is_folded_once() -> None:
    model = trained(_TwoConvs(share_conv=True, share_bn=True))
    graph_module = assert_folded(model, torch.randn(2, 3, 5, 5, dtype=torch.float64))
    assert [change.into for change in changes(graph_module)] == ["conv1", "conv1_1"]


def test_a_shared_convolution_under_two_batchnorms_is_kept() -> None:
    model = trained(_TwoConvs(share_conv=True, share_bn=False))
    assert_kept(model, torch.randn(2, 3, 5, 5, dtype=torch.float64), "conv1 is called at 2 places", norms=2)


def test_a_shared_batchnorm_that_cannot_be_folded_everywhere_keeps_its_module() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(self.bn(x)))

    model = trained(Model())
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    graph_module = fold(model)
    assert [change.action for change in changes(graph_module)] == ["kept", "folded"]
    torch.testing.assert_close(graph_module(x), model(x), rtol=1e-11, atol=1e-11)


def test_a_tied_parameter_is_kept() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other, self.bn = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.other.weight = self.conv.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) + self.other(x)

    assert_kept(trained(Model()), torch.randn(2, 3, 4, 4, dtype=torch.float64), "shared with another part")


def test_a_parameter_read_directly_is_kept() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) * (x * self.conv.weight.view(1, 9, 1, 1)[:, :3])

    assert_kept(trained(Model()), torch.randn(2, 3, 4, 4, dtype=torch.float64), "shared with another part")


def test_a_batchnorm_weight_read_directly_stays_in_the_module() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) * self.bn.weight.view(1, 3, 1, 1)

    model = trained(Model())
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    graph_module = fold(model)
    torch.testing.assert_close(graph_module(x), model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("returned", [False, True])
def test_a_convolution_with_several_users_is_kept(returned: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return self.bn(y), y if returned else y.relu()

    reader = "output" if returned else "relu"
    assert_kept(trained(Model()), torch.randn(2, 3, 5, 5, dtype=torch.float64), f"also read by {reader}")


def test_two_batchnorms_on_one_convolution_are_kept() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.a(y) + self.b(y).relu()

    assert_kept(trained(Model()), torch.randn(2, 3, 5, 5, dtype=torch.float64), "also read by", norms=2)


def test_two_batchnorms_in_a_row_are_both_folded() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    graph_module = assert_folded(model, torch.randn(2, 3, 5, 5, dtype=torch.float64))
    assert [change.into for change in changes(graph_module)] == ["_0", "_0"]


def test_batch_statistics_are_kept() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)))
    assert_kept(model, torch.randn(2, 3, 5, 5, dtype=torch.float64), "no running statistics")


@pytest.mark.parametrize("which", ["0", "1"])
def test_training_mode_is_kept(which: str) -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model.get_submodule(which).train()
    assert_kept(model, torch.randn(2, 3, 5, 5, dtype=torch.float64), "training mode")


def test_preactivation_is_kept() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    assert_kept(trained(layers), torch.randn(2, 3, 7, 7, dtype=torch.float64), "'1' is a ReLU")


def test_a_batchnorm_on_the_input_is_kept() -> None:
    model = trained(nn.Sequential(nn.BatchNorm2d(3)))
    assert_kept(model, torch.randn(2, 3, 7, 7, dtype=torch.float64), "not the output of a convolution")


def test_functional_forms_are_kept() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.register_buffer("mean", torch.randn(4))
            self.register_buffer("var", torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            x = F.batch_norm(self.conv(x), self.mean, self.var)
            return self.bn(F.conv2d(x, self.conv.weight[:, :1].expand(4, 4, 3, 3)))

    graph_module = fold(trained(Model()), modified=False)
    assert [(change.node, change.reason.split(";")[0]) for change in changes(graph_module)] == [
        ("batch_norm", "a functional call"),
        ("bn", "its input 'conv2d' is not the output of a convolution or linear module"),
    ]


class _MyConv(nn.Conv2d):
    __module__ = "torch.nn.mine"  # Makes torch.fx keep it as a leaf.

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class _MyNorm(nn.BatchNorm2d):
    __module__ = "torch.nn.mine"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("conv", "norm", "reason"),
    [
        (_MyConv, nn.BatchNorm2d, "not exactly a convolution"),
        (nn.Conv2d, _MyNorm, "not exactly a BatchNorm"),
        (nn.Conv2d, nn.SyncBatchNorm, "SyncBatchNorm is not exactly"),
    ],
)
def test_subclasses_are_kept(conv: type[nn.Conv2d], norm: type[_BatchNorm], reason: str) -> None:
    model = trained(nn.Sequential(conv(3, 4, 3), norm(4)))
    assert_kept(model, torch.randn(2, 3, 5, 5, dtype=torch.float64), reason)


@pytest.mark.parametrize("wrap", ["parametrized", "weight_norm", "spectral_norm", "prune", "hook"])
def test_computed_weights_and_hooks_are_kept(wrap: str) -> None:
    conv = nn.Conv2d(3, 4, 3)
    match wrap:
        case "parametrized":
            nn.utils.parametrizations.weight_norm(conv)
        case "weight_norm":
            nn.utils.weight_norm(conv)
        case "spectral_norm":
            nn.utils.spectral_norm(conv)
        case "prune":
            prune.l1_unstructured(conv, "weight", 0.5)
        case "hook":
            conv.register_forward_hook(lambda module, args, output: output * 2)
    model = trained(nn.Sequential(conv, nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    model(x)
    graph_module = torch.fx.symbolic_trace(model)  # Weights computed in a hook cannot be deep-copied.
    assert not FoldBatchNorm()(graph_module).modified
    (change,) = changes(graph_module)
    assert change.action == "kept"
    assert ("parametrized" if wrap == "parametrized" else "hooks or a computed weight") in change.reason


def test_a_hook_on_the_batchnorm_is_kept() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    assert_kept(model, torch.randn(2, 3, 5, 5, dtype=torch.float64), "forward hooks")


def test_a_mismatch_is_kept() -> None:
    model = trained(nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.BatchNorm1d(5)))
    graph_module = fold(model, modified=False)
    assert "BatchNorm1d(5) does not match the output of 1" in changes(graph_module)[0].reason


def test_values_that_overflow_the_dtype_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model[1].running_var.fill_(0)
    nn.init.constant_(model[1].weight, 1e4)
    graph_module = fold(model.half(), modified=False)
    assert "would not be finite in torch.float16" in changes(graph_module)[0].reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_once_to_the_weights_dtype(dtype: torch.dtype) -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))).to(dtype)
    conv, norm = copy.deepcopy(model).double()
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    folded = fold(model).get_submodule("0")
    torch.testing.assert_close(folded.weight, (conv.weight * scale.view(-1, 1, 1, 1)).to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(folded.bias, (norm.bias - norm.running_mean * scale).to(dtype), rtol=1e-7, atol=0)


def test_frozen_weights_stay_frozen() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in fold(model).parameters())


def test_keyword_calls() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(input=self.conv(output_size=[8, 8], input=x)).relu()

    assert_folded(trained(Model()), torch.randn(2, 3, 3, 3, dtype=torch.float64))


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.skip = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def test_nested_residual_blocks() -> None:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6))
    stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = trained(nn.Sequential(stem, _Block(4), _Block(4), head))
    graph_module = assert_folded(model, torch.randn(2, 3, 7, 7, dtype=torch.float64))
    assert [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"] == [
        "0.0", "0.2", "1.body.0", "1.skip.0", "2.body.0", "2.skip.0", "3.0", "3.1", "3.2",
    ]  # fmt: skip


@pytest.mark.parametrize("exclude", [("0",), ("1",), ("[01]",)])
def test_an_excluded_layer_stays_as_it_is(exclude):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval()
    graph_module = trace(model)
    assert FoldBatchNorm(exclude=exclude)(graph_module).modified
    assert torch.equal(graph_module.get_submodule("0").weight, model[0].weight)
    assert [node.target for node in graph_module.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    assert [c.reason for c in changes(graph_module) if c.action == "kept"] == [
        "excluded, or the layer in front of it is"
    ]
