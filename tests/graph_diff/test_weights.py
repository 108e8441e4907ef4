from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxprune.graph_diff.read_fx import _module_weights
from fxprune.graph_diff.weights import composed, fold, relative_change, reorder, same_numbers, was_folded


def random_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.3, 2.0)
    return norm


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_fold_computes_what_the_two_layers_do(kind: type[nn.Conv2d], groups: int, bias: bool) -> None:
    layer, norm = kind(4, 6, 3, groups=groups, bias=bias).double(), random_norm(6).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    folded = fold(_module_weights(layer), _module_weights(norm))
    function = F.conv_transpose2d if kind is nn.ConvTranspose2d else F.conv2d
    output = function(x, folded.weight, folded.others["bias"], groups=groups)
    assert torch.allclose(output, norm(layer(x)), atol=1e-12)


def test_relative_change_is_that_of_the_norms() -> None:
    before, after = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]])
    assert relative_change(before, after) == pytest.approx(0.2)
    assert relative_change(before, before.clone()) == 0
    assert relative_change(before, after.T) is None
    assert relative_change(before, None) is None
    assert relative_change(torch.zeros(2), torch.ones(2)) == 1
    assert relative_change(before, before.half()) == 0
    assert relative_change(before, torch.full((1, 2), float("nan"))) is None
    same_nan = torch.tensor([1.0, float("nan")])
    assert relative_change(same_nan, same_nan.clone()) == 0


def test_was_folded_tells_folded_from_dropped_even_after_pruning() -> None:
    layer, norm = nn.Conv2d(8, 8, 3), random_norm(8)
    before, scale = _module_weights(layer), _module_weights(norm)
    folded = nn.Conv2d(8, 8, 3)
    merged = fold(before, scale)
    folded.weight.data = merged.weight.clone()
    folded.bias.data = merged.others["bias"]
    assert was_folded(before, scale, _module_weights(folded))
    folded.weight.data *= torch.rand_like(folded.weight) > 0.5
    assert was_folded(before, scale, _module_weights(folded))
    assert not was_folded(before, scale, before)
    assert not was_folded(before, _module_weights(random_norm(4)), before)


@pytest.mark.parametrize("kernels", [((3, 3), (1, 1)), ((3, 1), (1, 5)), ((1, 1), (3, 3))])
def test_composed_convolutions_do_what_the_two_do(kernels: tuple[tuple[int, int], tuple[int, int]]) -> None:
    first = torch.randn(3, 4, *kernels[0], dtype=torch.float64)
    second = torch.randn(6, 3, *kernels[1], dtype=torch.float64)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    both = composed(first, second)
    assert both is not None
    assert both.shape == (6, 4, *(a * b for a, b in zip(*kernels, strict=True)))
    assert torch.allclose(F.conv2d(x, both), F.conv2d(F.conv2d(x, first), second), atol=1e-10)


def test_composed_linear_layers_are_a_product_of_matrices() -> None:
    first, second = torch.randn(3, 4), torch.randn(5, 3)
    both = composed(first, second)
    assert both is not None
    assert torch.allclose(both, second @ first, atol=1e-6)


def test_what_does_not_compose_gives_none() -> None:
    assert composed(torch.randn(3, 4, 3, 3), torch.randn(6, 3, 3, 3)) is None
    assert composed(torch.randn(3, 4), torch.randn(6, 2)) is None
    assert composed(torch.randn(3, 4), torch.randn(6, 3, 1, 1)) is None


@pytest.mark.parametrize(("kind", "groups"), [(nn.Conv2d, 1), (nn.Conv2d, 2), (nn.ConvTranspose2d, 1)])
def test_reorder_moves_rows_and_columns(kind: type[nn.Conv2d], groups: int) -> None:
    layer = kind(4, 6, 3, groups=groups).double()
    inputs = torch.tensor([1, 0, 3, 2]) if groups == 2 else torch.tensor([2, 0, 3, 1])
    outputs = torch.tensor([2, 0, 1, 5, 3, 4])
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    moved = reorder(_module_weights(layer), inputs, outputs)
    function = F.conv_transpose2d if kind is nn.ConvTranspose2d else F.conv2d
    output = function(x[:, inputs], moved.weight, moved.others["bias"], groups=groups)
    assert torch.allclose(output, layer(x)[:, outputs], atol=1e-12)


def test_reorder_moves_the_vectors_of_a_normalisation() -> None:
    norm, outputs = random_norm(4), torch.tensor([3, 1, 0, 2])
    x = torch.randn(2, 4, 3, 3)
    moved = reorder(_module_weights(norm), None, outputs).others
    output = F.batch_norm(x[:, outputs], moved["running_mean"], moved["running_var"], moved["weight"], moved["bias"])
    assert torch.allclose(output, norm(x)[:, outputs], atol=1e-6)


def test_same_numbers_in_any_order() -> None:
    weight = torch.randn(4, 3)
    assert same_numbers(weight, weight.flip(0))
    assert not same_numbers(weight, weight + 1e-3)
    assert not same_numbers(weight, weight.T)
