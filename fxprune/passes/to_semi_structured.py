"""ToSemiStructured: runs 2:4 Linear layers and 1x1 convolutions on the sparse tensor cores of an NVIDIA GPU.

The weights become torch's compressed semi-structured tensors, which the matrix products of cuSPARSELt or CUTLASS read. A 1x1
convolution of stride 1 is the matrix product over the channels of every position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.sparse import to_sparse_semi_structured

from fxprune.errors import GraphError
from fxprune.geometry import LayerGeometry, is_matrix_layer
from fxprune.graph import call_sites, module_of
from fxprune.layers.deployment import torch_semi_structured
from fxprune.passes.base import Pass


class SparseProduct(nn.Module):
    """y = x W^T + b over the channels, W compressed 2:4.

    Args:
        weight: (R, C) dense, 2:4 sparse, float16 or bfloat16, on CUDA.
        bias: (R,) or None.
        channel_dim: 1 for (N, C, *spatial), -1 for (..., C).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, channel_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(to_sparse_semi_structured(weight), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.channel_dim = channel_dim

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *spatial) or (..., C) -> the same with R channels."""
        last = input.movedim(self.channel_dim, -1)
        rows = last.reshape(-1, last.shape[-1])
        product = F.linear(rows, self.weight, self.bias)
        return product.reshape(*last.shape[:-1], -1).movedim(-1, self.channel_dim)


class ToSemiStructured(Pass):
    """Replaces every layer that torch's 2:4 kernels can take by a `SparseProduct`; all others stay, with the reason.

    The graph module has to be on a CUDA device, in float16 or bfloat16 (`compiled.half().cuda()`).
    """

    def requires(self, graph_module: GraphModule) -> None:  # noqa: D102 - documented on Pass
        for name, parameter in graph_module.named_parameters():
            if parameter.device.type != "cuda":
                raise GraphError(
                    f"semi-structured weights exist on CUDA only, and {name!r} is on {parameter.device}; "
                    "move the model there, or run low_rank for a speed-up on other devices"
                )
            if parameter.dtype not in (torch.float16, torch.bfloat16):
                raise GraphError(
                    f"{name!r} is {parameter.dtype}; 2:4 kernels take float16 and bfloat16: call .half() or .bfloat16() first"
                )

    def call(self, graph_module: GraphModule) -> PassResult:  # noqa: D102 - documented on Pass
        modified = False
        for module, nodes in call_sites(graph_module).items():
            if not is_matrix_layer(module):
                continue
            reason = reason_to_keep(module)
            for node in nodes:
                if reason is not None:
                    self.record(graph_module, "kept", node, reason=reason)
                else:
                    self._replace(graph_module, node, module)
                    modified = True
        return PassResult(graph_module, modified)

    def _replace(self, graph_module: GraphModule, node: Node, module: nn.Module) -> None:
        """Put a SparseProduct under the layer's own name; other call sites of the same module find it there."""
        if not isinstance(module_of(node), SparseProduct):
            assert isinstance(module.weight, Tensor)
            bias = module.bias if isinstance(module.bias, Tensor) else None
            product = SparseProduct(module.weight.detach().flatten(1), bias, -1 if module.weight.dim() == 2 else 1)
            graph_module.set_submodule(str(node.target), product)
        self.record(graph_module, "replaced", node, into=node.name, reason="2:4 kernels of torch")


def reason_to_keep(module: nn.Module) -> str | None:
    """Why a Conv or Linear cannot run on torch's 2:4 kernels, or None."""
    geometry = LayerGeometry.of(module)
    if geometry.transposed:
        return "a transposed convolution is not one matrix product"
    if geometry.groups > 1:
        return "a grouped convolution is not one matrix product"
    if not geometry.is_pointwise or any(stride > 1 for stride in geometry.stride):
        return "only Linear layers and 1x1 convolutions of stride 1 without padding are matrix products"
    assert isinstance(module.weight, Tensor)
    rule = torch_semi_structured(module.weight, op=type(module).__name__, dtype=module.weight.dtype)
    return None if rule.ok else rule.reason
