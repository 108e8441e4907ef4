"""The normal form: whatever way a model writes its products, they are plain modules under their own names."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fxprune
from fxprune.graph import module_of
from fxprune.intake.normal_form import is_layer_call
from fxprune.intake.origins import Origin, origins
from fxprune.tracing import trace

X = torch.randn(3, 8, 9, 9, generator=torch.Generator().manual_seed(1))


def checked(model: nn.Module, x: Tensor = X, *, exact: bool = False, **options) -> dict[str, nn.Module]:
    """The plain layers of a model's graph by name, after a comparison with the model."""
    wanted = copy.deepcopy(model).eval()(x) if not options.pop("no_copy", False) else model.eval()(x)
    graph_module = trace(model, example=x, **options)
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    torch.testing.assert_close(graph_module(x), wanted, **tolerance)
    checked.graph_module = graph_module
    return {str(n.target): module_of(n) for n in graph_module.graph.nodes if is_layer_call(n)}


class Named(nn.Conv2d):
    """A subclass that changes nothing."""


class Padded(nn.Conv2d):
    """Pads by itself, with a module of its own, as EfficientNet-Lite's convolutions do."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    """Its weight is made of its parameters at every call."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = self.gain * (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ByBatchNorm(nn.Conv2d):
    """timm standardises weights with a batch_norm over their rows."""

    def forward(self, x: Tensor) -> Tensor:
        w = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0)
        return F.conv2d(x, w.reshape_as(self.weight), self.bias, self.stride, self.padding)


class TestSubclasses:
    def test_they_come_out_plain_and_keep_name_and_values(self):
        model = nn.Sequential(Named(8, 16, 3, stride=2, bias=False), Padded(16, 12, 3, groups=4), nn.Conv2d(12, 4, 1))
        layers = checked(model, exact=True)
        assert [type(m) for m in layers.values()] == [nn.Conv2d] * 3
        assert list(layers) == ["0", "1", "2"]
        for name, layer in layers.items():
            torch.testing.assert_close(layer.weight, model.get_submodule(name).weight, rtol=0, atol=0)
        assert layers["0"].bias is None
        assert (layers["0"].stride, layers["1"].groups) == ((2, 2), 4)
        assert origins(checked.graph_module) == {}
        assert set(dict(checked.graph_module.named_parameters())) == set(dict(model.named_parameters()))

    @pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
    def test_another_padding_mode_is_a_padding_before_it(self, mode):
        assert type(checked(nn.Sequential(Named(8, 4, 3, padding=1, padding_mode=mode)))["0"]) is nn.Conv2d

    @pytest.mark.parametrize(
        ("cls", "function", "shape"),
        [(nn.Conv1d, F.conv1d, (2, 8, 9)), (nn.Conv3d, F.conv3d, (2, 8, 5, 5, 5))],
    )
    def test_one_and_three_dimensions(self, cls, function, shape):
        class Own(cls):
            def forward(self, x: Tensor) -> Tensor:
                return function(x, self.weight, bias=self.bias, padding="same")

        assert type(checked(nn.Sequential(Own(8, 4, 3)), torch.randn(shape))["0"]) is cls

    def test_transposed_convolutions(self):
        class Up(nn.ConvTranspose2d):
            def forward(self, x: Tensor, output_size=None) -> Tensor:
                return F.conv_transpose2d(x, self.weight, self.bias, (2, 2), 1, 1, 2)

        layer = checked(nn.Sequential(Up(8, 4, 3, groups=2)))["0"]
        assert type(layer) is nn.ConvTranspose2d
        assert (layer.stride, layer.padding, layer.output_padding, layer.groups) == ((2, 2), (1, 1), (1, 1), 2)

    def test_batchnorm_written_as_a_function(self):
        class Own(nn.BatchNorm2d):
            def forward(self, x: Tensor) -> Tensor:
                return F.relu(
                    F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
                )

        model = nn.Sequential(nn.Conv2d(8, 4, 1), Own(4, eps=1e-3))
        model[1].running_mean.uniform_()
        checked(model)
        norm = checked.graph_module.get_submodule("1")
        assert type(norm) is nn.BatchNorm2d
        assert norm.eps == 1e-3


class Products(nn.Module):
    """Products of a value and a bare parameter, in the ways that Python and torch have for it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        rows_first = form in ("x @ w.t()", "F.linear", "matmul(w.T)", "transpose")
        self.w = nn.Parameter(torch.randn(5, 8) if rows_first else torch.randn(8, 5))
        self.b = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        forms = {
            "x @ w": lambda: x @ self.w + self.b,
            "x @ w.t()": lambda: x @ self.w.t(),
            "F.linear": lambda: F.linear(x, self.w, bias=self.b),
            "matmul": lambda: torch.matmul(x, self.w),
            "matmul(w.T)": lambda: x.matmul(self.w.T),
            "transpose": lambda: x.mm(self.w.transpose(0, 1)),
            "mm": lambda: torch.mm(x, mat2=self.w),
            "addmm": lambda: torch.addmm(self.b, x, self.w),
        }
        return forms[self.form]()


@pytest.mark.parametrize(
    "form", ["x @ w", "x @ w.t()", "F.linear", "matmul", "matmul(w.T)", "transpose", "mm", "addmm"]
)
def test_products_with_a_bare_parameter(form):
    model = Products(form)
    layer = checked(model)["w"]
    assert type(layer) is nn.Linear
    assert (layer.weight.shape, layer.bias is not None) == ((5, 8), form in ("F.linear", "addmm"))
    rows_first = model.w.shape == (5, 8)
    torch.testing.assert_close(layer.weight, model.w if rows_first else model.w.t(), rtol=0, atol=0)
    assert origins(checked.graph_module)["w.weight"] == Origin(("w",), "same" if rows_first else "transposed")


class TestFunctionalCalls:
    def test_of_a_module_that_is_never_called(self):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(8, 4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return F.conv2d(F.pad(x, (1, 0)), self.conv.weight, self.conv.bias, dilation=2)

        assert checked(Net())["conv"].dilation == (2, 2)

    def test_two_calls_with_one_parameter_are_one_layer(self):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.filter = nn.Parameter(torch.randn(8, 8, 1, 1))

            def forward(self, x: Tensor) -> Tensor:
                return F.conv2d(F.conv2d(x, self.filter).relu(), self.filter)

        assert list(checked(Net())) == ["filter"]
        assert len(checked.graph_module.graph.find_nodes(op="call_module", target="filter")) == 2

    def test_a_call_beside_the_module_itself_is_the_same_layer(self):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(8, 8, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.conv(x) + F.conv2d(x.relu(), self.conv.weight, self.conv.bias)

        assert list(checked(Net())) == ["conv"]

    def test_a_weight_with_another_reader_keeps_both(self):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.words = nn.Embedding(6, 8)

            def forward(self, x: Tensor) -> Tensor:
                return self.words((x.mean((2, 3)) @ self.words.weight.t()).argmax(1)) * self.words.weight.mean()

        (name,) = checked(Net())
        assert checked.graph_module.get_submodule(name).weight is checked.graph_module.words.weight

    def test_what_depends_on_the_input_stays(self):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.filter = nn.Parameter(torch.randn(4, 8, 1, 1))

            def forward(self, x: Tensor) -> Tensor:
                return F.conv2d(x, self.filter * x.mean())

        assert checked(Net()) == {}

    def test_a_random_weight_stays(self):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.filter = nn.Parameter(torch.randn(4, 8, 1, 1))

            def forward(self, x: Tensor) -> Tensor:
                return F.conv2d(x, torch.bernoulli(self.filter.sigmoid()))

        graph_module = trace(Net(), example=X)
        assert not any(map(is_layer_call, graph_module.graph.nodes))

    def test_a_parameter_that_is_written_to_stays(self):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.filter = nn.Parameter(torch.ones(4, 8, 1, 1))

            def forward(self, x: Tensor) -> Tensor:
                self.filter.mul_(2).clamp_(max=2)
                return F.conv2d(x, self.filter)

        graph_module = trace(Net())
        assert not any(map(is_layer_call, graph_module.graph.nodes))


class TestComputedWeights:
    @pytest.mark.parametrize("cls", [Standardised, ByBatchNorm])
    def test_of_a_subclass(self, cls):
        model = nn.Sequential(cls(8, 16, 3), nn.Conv2d(16, 4, 1))
        layers = checked(model)
        assert list(layers) == ["0", "1"]
        assert "0.weight" in origins(checked.graph_module)
        assert origins(checked.graph_module)["0.weight"].how == "computed"
        assert not any("gain" in name for name, _ in checked.graph_module.named_parameters())

    @pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
    @pytest.mark.parametrize(
        "wrap",
        [
            nn.utils.weight_norm,
            nn.utils.spectral_norm,
            parametrizations.weight_norm,
            parametrizations.spectral_norm,
            parametrizations.orthogonal,
            lambda m: prune.l1_unstructured(m, "weight", 0.5),
            lambda m: prune.random_structured(prune.l1_unstructured(m, "weight", 0.2), "weight", 0.25, dim=0),
        ],
    )
    def test_by_a_hook_or_a_parametrization(self, wrap):
        torch.manual_seed(0)
        model = nn.Sequential(wrap(nn.Conv2d(8, 16, 3)), nn.ReLU(), wrap(nn.Conv2d(16, 8, 1))).eval()
        model(X)
        layers = checked(model, no_copy=True)
        assert [type(m) for m in layers.values()] == [nn.Conv2d] * 2
        for layer in layers.values():
            assert set(dict(layer.named_parameters())) == {"weight", "bias"}
            assert not layer._forward_pre_hooks
        origin = origins(checked.graph_module)["0.weight"]
        assert origin.how == "computed"
        assert set(origin.names) <= set(model.state_dict())

    @pytest.mark.parametrize("exclude", [("*",), ("0",)])
    def test_excluded_ones_stay_as_they_are(self, exclude):
        model = nn.Sequential(
            Standardised(8, 16, 3), nn.Conv2d(16, 8, 1), parametrizations.weight_norm(nn.Conv2d(8, 4, 1))
        )
        layers = checked(model, exact=True, exclude=exclude)
        assert "0" not in layers
        torch.testing.assert_close(checked.graph_module.get_parameter("0.weight"), model[0].weight, rtol=0, atol=0)
        assert "0.gain" in dict(checked.graph_module.named_parameters())


def test_excluding_everything_is_exact():
    model = nn.Sequential(
        Named(8, 16, 3), Padded(16, 16, 3), ByBatchNorm(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Products2()
    )
    checked(model, exact=True, exclude=("*",))


class Products2(nn.Module):
    """x @ w on features."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Views(nn.Module):
    """Behind a value of one channel, whose strides do not say whether it is in channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(8, 1, 1)
        self.bn = nn.BatchNorm2d(1)
        self.wide = nn.Conv2d(1, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(self.bn(self.narrow(x)))
        y = y.view(size=(y.size(0), 8, -1)).view(-1, 8, 9, 9).view((y.size(0), -1)).view_as(x.flatten(1))
        return y.view(torch.int32).view(dtype=torch.float32).view(y.dtype)


def test_views_do_not_depend_on_how_a_value_lies_in_memory():
    model, x = Views().eval(), X.contiguous(memory_format=torch.channels_last)
    checked(model, x, exact=True)
    called = [node.target for node in checked.graph_module.graph.find_nodes(op="call_method")]
    assert called.count("reshape") == 3
    assert called.count("reshape_as") == 1
    assert called.count("view") == 3  # As another dtype.
    compiled = fxprune.compile(
        model, [x], "2:4", progress=False
    )  # BatchNorm is folded, and what it gave was contiguous.
    assert compiled(x).shape == model(x).shape


class AsksAboutWeights(nn.Module):
    """Reads the type, the place and the size of its layers' weights, as many models do before they cast."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x.to(self.first.weight.dtype).to(device=self.first.weight.device)))
        x = x.reshape(-1, self.first.weight.shape[0], *x.shape[2:]) / self.second.weight.size(1)
        return self.second(x.to(self.norm.weight.dtype) * self.second.weight.dim())


def test_a_question_about_a_weight_is_no_use_of_it(tmp_path: Path) -> None:
    model, images = AsksAboutWeights().eval(), torch.randn(32, 8, 9, 9)
    compiled = fxprune.compile(model, images.split(8), "2:4", method="magnitude", progress=False)
    assert [row.status for row in compiled.report.layers] == ["pruned", "pruned"]
    assert not compiled.graph.find_nodes(op="call_module", target="norm")
    half = copy.deepcopy(compiled).half()
    assert half(images[:2].half()).dtype == torch.float16
    fxprune.save(compiled, tmp_path / "model.pt")
    assert torch.equal(fxprune.load(tmp_path / "model.pt")(images), compiled(images))
    fxprune.export_onnx(compiled, tmp_path / "model.onnx", images[:4])
    alone = fxprune.compile(model, images.split(8), exclude=("*",), progress=False)
    assert torch.equal(alone(images), model(images))
