"""The ways in: each leads to a graph that computes what the model computes, on batches of other sizes too."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.errors import TraceError
from fxprune.graph import module_of
from fxprune.intake.normal_form import is_layer_call
from fxprune.intake.record import intake
from fxprune.tracing import trace

X = torch.randn(6, 8, 12, 12, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two convolutions with something between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 8, 3)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


class AsksForShapes(Net):
    def between(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        if channels != 16 or x.ndim != 4 or x.device.type == "meta":
            raise ValueError("16 channels, please")
        return x.reshape(n, channels, height * width).view(n, channels, height, -1)


class Iterates(Net):
    def between(self, x: Tensor) -> Tensor:
        parts = list(x.chunk(4, 1))
        assert len(parts) == 4
        return torch.cat([*parts[:2], *(part.relu() for part in parts[2:])], 1)


class SamePadding(Net):
    def between(self, x: Tensor) -> Tensor:
        pad = max((math.ceil(x.shape[-1] / 2) - 1) * 2 + 3 - x.shape[-1], 0)
        return F.pad(x, (pad // 2, pad - pad // 2))


class MakesTensors(Net):
    def between(self, x: Tensor) -> Tensor:
        ramp = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)
        return x + ramp + torch.zeros(len(x), 1, 1, 1) + x.new_ones(x.shape[0], 1, 1, 1)


class AssignsToItems(Net):
    def between(self, x: Tensor) -> Tensor:
        mask = x.new_zeros(x.shape[2:])
        for i, rows in enumerate((slice(0, 3), slice(3, -2), slice(-2, None))):
            mask[rows, 1:] = i
        x[:, 3:5, ..., 2:] = x[:, 3:5, ..., 2:] + mask[:, 2:]
        x[:, 0] = mask
        x[0, ..., -1] = 7
        return x


class WritesIntoViews(Net):
    def between(self, x: Tensor) -> Tensor:
        scale = self.first.bias.clone()
        scale[4:8].zero_()
        scale[8:][2:4].fill_(3.0).mul_(2)
        y = x * scale[:, None, None]
        y[:, 0].copy_(y[:, 1, :1])
        y[..., 2].clamp_(min=0.1)
        first = y[0]
        first[1].neg_()
        return y


class MoreArguments(Net):
    def forward(self, x: Tensor, *args, augment: bool = False, **kwargs) -> Tensor:
        if isinstance(x, dict) or args or kwargs.get("profile"):
            raise ValueError("images only")
        return super().forward(x)


class KeepsSomething(Net):
    """State in attributes, as detection heads cache their anchors."""

    shape = None

    def between(self, x: Tensor) -> Tensor:
        if self.shape != x.shape:
            self.shape = x.shape
        return x * (1 if self.shape[1] == 16 else 2)


@pytest.mark.parametrize(
    "cls",
    [
        AsksForShapes,
        Iterates,
        SamePadding,
        MakesTensors,
        AssignsToItems,
        WritesIntoViews,
        MoreArguments,
        KeepsSomething,
    ],
    ids=lambda cls: cls.__name__,
)
def test_questions_about_shapes_are_answered_by_the_example(cls):
    model = cls().eval()
    graph_module = trace(model, example=X)
    for x in (X, X[:2], X.repeat(2, 1, 1, 1), X[:1]):
        torch.testing.assert_close(graph_module(x), model(x))
    assert [str(n.target) for n in graph_module.graph.nodes if is_layer_call(n)] == ["first", "second"]
    assert intake(graph_module).way in ("torch.fx", "example values")
    assert intake(graph_module).lines == []
    torch.testing.assert_close(copy.deepcopy(graph_module)(X), model(X))
    torch.testing.assert_close(trace(graph_module, example=X)(X), model(X))


def test_the_random_state_and_the_example_stay_as_they_were():
    model, x = AsksForShapes(), X.clone()
    state = torch.get_rng_state()
    trace(model, example=x)
    assert torch.equal(x, X)
    assert torch.equal(torch.get_rng_state(), state)


class TestFrozenBranches:
    def test_one_on_the_number_of_images_is_an_error_that_names_it(self):
        class ByNumber(Net):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x * 2 if x.shape[0] > 4 else x)

        with pytest.raises(TraceError, match=r"batches of 3 images.*test_ways_in.py:\d+ .*x.shape\[0\] > 4"):
            trace(ByNumber(), example=X)

    def test_one_on_height_and_width_makes_the_graph_refuse_others(self):
        class BySize(Net):
            def between(self, x: Tensor) -> Tensor:
                return x[..., :16] * 2 if x.shape[-1] > 16 else x

        model = BySize().eval()
        graph_module = trace(model, example=X)
        torch.testing.assert_close(graph_module(X[:2]), model(X[:2]))
        assert "x.shape[-1] > 16" in intake(graph_module).frozen[0]
        with pytest.raises(
            AssertionError, match=r"images of 12 x 12: the model decides by their size.*x.shape\[-1\] > 16"
        ):
            graph_module(torch.randn(2, 8, 20, 20))


class DependsOnValues(nn.Module):
    """What no way gets through."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if x.mean() > 0 else x * 2)


@pytest.mark.slow
class TestLeaves:
    def test_they_are_the_innermost_modules_and_said(self):
        model = nn.Sequential(
            nn.Conv2d(8, 16, 3), nn.Sequential(nn.ReLU(), DependsOnValues()), nn.Conv2d(16, 8, 1)
        ).eval()
        with pytest.warns(
            UserWarning, match=r"1\.1 \(DependsOnValues\), with 17\.3% of the weights, is called as a whole"
        ):
            graph_module = trace(model, example=X)
        for x in (X, -X):
            torch.testing.assert_close(graph_module(x), model(x))
        (leaf,) = intake(graph_module).leaves
        assert (leaf.name, leaf.kind) == ("1.1", "DependsOnValues")
        assert "x.mean() > 0" in leaf.reason
        assert isinstance(graph_module.get_submodule("1.1"), DependsOnValues)

    def test_nothing_left_is_an_error(self):
        model = nn.Sequential(nn.ReLU(), nn.Sequential(DependsOnValues()))
        with pytest.raises(TraceError, match=r"Nothing that could be pruned is left outside of '1\.0'"):
            trace(model, example=torch.randn(3, 16, 6, 6))


class TestTorchExport:
    @staticmethod
    def program(model: nn.Module):
        return torch.export.export(model.eval(), (X,), dynamic_shapes=({0: torch.export.Dim("n")},))

    @staticmethod
    def model() -> nn.Module:
        torch.manual_seed(0)
        block = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Dropout())
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
        return nn.ModuleDict({"block": block, "head": head})

    class Whole(nn.Module):
        def __init__(self, parts: nn.Module) -> None:
            super().__init__()
            self.parts = parts

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.parts["block"](x)
            z = y.clone()
            z[:, 0] = 0
            return {"logits": self.parts["head"](y + z), "size": y.shape[0] * y.mean()}

    @pytest.mark.slow
    @pytest.mark.parametrize("form", ["program", "module"])
    def test_its_graphs_are_models(self, form):
        model = self.Whole(self.model()).eval()
        model.parts["block"][1].running_mean.uniform_()
        program = self.program(model)
        if form == "module":
            program = program.run_decompositions({}).module()
        graph_module = trace(program, example=X)
        for x in (X, X[:2]):
            torch.testing.assert_close(graph_module(x), model(x))
        kinds = {str(n.target): type(module_of(n)) for n in graph_module.graph.find_nodes(op="call_module")}
        assert kinds == {"parts.block.0": nn.Conv2d, "parts.block.1": nn.BatchNorm2d, "parts.head.2": nn.Linear}
        names = {name for name, _ in graph_module.named_parameters()}
        assert names == {name for name, _ in model.named_parameters()}
        assert not any(
            isinstance(n.target, torch._ops.OpOverload) for n in graph_module.graph.nodes if "relu" in n.name
        )
        copy.deepcopy(graph_module)


@pytest.mark.slow
def test_a_wrapped_function_that_reads_a_weight_is_traced_through():
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(8, 8, 3), nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return product(self.conv(x).mean((2, 3)), self.linear.weight)

    model = Wrapped().eval()
    graph_module = trace(model, example=X)
    torch.testing.assert_close(graph_module(X), model(X))
    assert [str(n.target) for n in graph_module.graph.nodes if is_layer_call(n)] == ["conv", "linear"]
    again = torch.fx.symbolic_trace(Wrapped())
    assert again.graph.find_nodes(op="call_function", target=product)


def product(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight.t()).relu()


torch.fx.wrap("product")


def test_the_users_model_keeps_its_parametrizations():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 4, 1))).eval()
    wanted, state = model(X), {k: v.clone() for k, v in model.state_dict().items()}
    trace(model, example=X)
    torch.testing.assert_close(model(X), wanted, rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("example", [None, X], ids=["", "on an example"])
def test_messages_name_no_class_of_ours(example):
    class ThroughNumpy(Net):
        def between(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.detach().numpy())

    with pytest.raises(TraceError, match=r"got a torch\.fx Proxy, which stands for a tensor\)") as raised:
        trace(ThroughNumpy(), example=example)
    assert "InplaceProxy" not in str(raised.value)
    assert "ValueProxy" not in str(raised.value)
