"""nn.MultiheadAttention and torch's transformers, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.graph import module_of
from fxprune.intake.normal_form import is_layer_call
from fxprune.intake.origins import Origin, origins
from fxprune.tracing import trace


class Net(nn.Module):
    """A convolution, and attention over its pixels."""

    def __init__(self, *, weights: bool = False, mask: str = "", cross: bool = False, **options) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3)
        self.options = options
        sizes = {"kdim": 12, "vdim": 10} if cross else {}
        self.attention = nn.MultiheadAttention(16, 2, **sizes, **options)
        self.weights, self.mask, self.cross = weights, mask, cross

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2).transpose(1, 2)
        if not self.options.get("batch_first"):
            y = y.transpose(0, 1)
        key, value = (y[..., :12], y[..., :10]) if self.cross else (y, y)
        given = {}
        if self.mask == "causal":
            given = {"attn_mask": torch.ones(16, 16).tril().log(), "is_causal": True}
        elif self.mask == "bool":
            given = {"attn_mask": torch.ones(16, 16).tril() == 0}
        elif self.mask == "padding":
            given = {"key_padding_mask": y[:, :, 0].t() > 0.2}
        z, weights = self.attention(y, key, value, need_weights=self.weights, **given)
        return z if weights is None else (z, weights)


X = torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {},
        {"bias": False},
        {"weights": True},
        {"weights": True, "batch_first": True, "mask": "bool"},
        {"mask": "causal"},
        {"mask": "bool", "batch_first": True},
        {"mask": "padding"},
        {"cross": True},
        {"cross": True, "bias": False, "weights": True},
        {"dropout": 0.5},
    ],
    ids=str,
)
def test_it_is_three_projections_and_an_output(options):
    torch.manual_seed(0)
    model = Net(**options).eval()
    graph_module = trace(model, example=X)
    torch.testing.assert_close(graph_module(X), model(X), rtol=1e-4, atol=1e-5)
    layers = {str(n.target) for n in graph_module.graph.nodes if is_layer_call(n)}
    assert layers == {"conv", *(f"attention.{name}_proj" for name in ("q", "k", "v", "out"))}
    assert graph_module.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)


def test_the_weights_say_where_they_come_from():
    model = Net(batch_first=True)
    graph_module = trace(model, example=X)
    origin = origins(graph_module)["attention.k_proj.weight"]
    assert origin == Origin(("attention.in_proj_weight",), "rows", (16, 32))
    first, last = origin.rows
    kept = graph_module.get_parameter("attention.k_proj.weight")
    torch.testing.assert_close(kept, model.attention.in_proj_weight[first:last], rtol=0, atol=0)


def test_attention_weights_that_nobody_reads_are_not_computed():
    class First(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).flatten(2).transpose(1, 2)
            return self.attention(y, y, y)[0]

    graph_module = trace(First(batch_first=True), example=X)
    assert not graph_module.graph.find_nodes(op="call_method", target="softmax")


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_other_kinds_stay_whole(options):
    model = Net(batch_first=True, weights=True, **options).eval()
    graph_module = trace(model, example=X)
    torch.testing.assert_close(graph_module(X), model(X))
    assert isinstance(graph_module.attention, nn.MultiheadAttention)


def test_one_whose_forward_was_replaced_is_not_written_out():
    model = Net(batch_first=True, weights=True).eval()
    own = model.attention.forward
    model.attention.forward = lambda *args, **kwargs: tuple(2 * x for x in own(*args, **kwargs))
    graph_module = trace(model, example=X)
    torch.testing.assert_close(graph_module(X), model(X))


def test_an_excluded_one_stays_as_it_is():
    model = Net(batch_first=True, weights=True).eval()
    graph_module = trace(model, exclude=("attention",), example=X)
    torch.testing.assert_close(graph_module(X), model(X), rtol=0, atol=0)
    assert isinstance(graph_module.attention, nn.MultiheadAttention)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_transformers_are_traced_into(batch_first, norm_first):
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, norm_first=norm_first)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x.flatten(2).permute(0, 2, 1))

    model = Encoder().eval()
    graph_module = trace(model, example=X)
    torch.testing.assert_close(graph_module(X), model(X), rtol=1e-4, atol=1e-5)
    linear = [n for n in graph_module.graph.nodes if type(module_of(n)) is nn.Linear]
    assert len(linear) == 12
