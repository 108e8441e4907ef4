"""Lowering to the sparse tensor cores: the rules everywhere, the products on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import GraphError
from fxprune.passes import ToSemiStructured, changes
from fxprune.passes.to_semi_structured import SparseProduct, reason_to_keep
from fxprune.tracing import trace


def sparse(module: nn.Module) -> nn.Module:
    module.weight.data = fxprune.Pattern.parse("2:4").project(module.weight.data)
    return module.half()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Linear(128, 64), None),
        (nn.Conv2d(128, 64, 1), None),
        (nn.Conv2d(128, 64, 1, stride=2), "stride 1"),
        (nn.Conv2d(128, 64, 1, padding=1), "without padding"),
        (nn.Conv2d(128, 64, 3), "1x1"),
        (nn.Conv2d(128, 64, 1, groups=2), "grouped"),
        (nn.Linear(128, 10), "multiple"),
    ],
)
def test_which_layers_can_be_lowered(module, reason):
    found = reason_to_keep(sparse(module))
    assert found is None if reason is None else reason in found


def test_a_dense_weight_is_kept():
    assert "not 2:4" in reason_to_keep(nn.Linear(128, 64).half())


def test_other_devices_get_a_clear_error():
    graph_module = trace(nn.Sequential(sparse(nn.Linear(128, 64))))
    with pytest.raises(GraphError, match=r"CUDA only.*low_rank"):
        ToSemiStructured()(graph_module)


@pytest.mark.gpu
def test_the_products_equal_the_dense_ones():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = sparse(nn.Conv2d(128, 64, 1))
            self.b = nn.Conv2d(64, 64, 3, padding=1)
            self.c = sparse(nn.Linear(64, 64, bias=False))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(self.a(x).relu()).relu().mean((2, 3)))

    model = Net().half().cuda().eval()
    x = torch.randn(8, 128, 14, 14, device="cuda", dtype=torch.float16)
    graph_module = trace(model)
    with torch.no_grad():
        wanted = model(x)
        assert ToSemiStructured()(graph_module).modified
        found = graph_module(x)
    assert isinstance(graph_module.a, SparseProduct)
    assert isinstance(graph_module.c, SparseProduct)
    assert [c.reason for c in changes(graph_module) if c.action == "kept" and c.target == "b"]
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    assert not ToSemiStructured()(graph_module).modified
