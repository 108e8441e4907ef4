"""Which stored tensors a torch.fx node reads, and what they are to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from fxprune.geometry import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from fxprune.graph import module_of
from fxprune.graph_diff.fx_operation import operation_name
from fxprune.graph_diff.model_graph import Weights

_WEIGHTED = re.compile(r"conv[123]d|conv_transpose[123]d|linear")
PRODUCTS = ("matmul", "mm", "bmm")


def node_weights(graph_module: GraphModule, node: Node) -> Weights:
    """Tensors of the module behind a node, or those that a function reads from the model itself."""
    module = module_of(node)
    return _function_weights(graph_module, node) if module is None else _module_weights(module)


def _module_weights(module: nn.Module) -> Weights:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors = {k: t.detach().cpu() for k, t in tensors.items() if t is not None and "num_batches_tracked" not in k}
    transposed = isinstance(module, TRANSPOSED_CONVOLUTIONS)
    if isinstance(module, (*CONVOLUTIONS, nn.Linear)) or transposed:
        weight: Any = module.weight  # not from `tensors`: it may be parametrized
        return Weights(
            weight.detach().cpu(), _without(tensors, "weight"), int(getattr(module, "groups", 1)), transposed
        )
    if not isinstance(module, _BatchNorm) or module.running_mean is None or module.running_var is None:
        return Weights(None, tensors)
    scale = (module.running_var.double() + module.eps).rsqrt().cpu()
    if module.weight is not None:
        scale = scale * tensors["weight"].double()
    shift = -tensors["running_mean"].double() * scale
    if module.bias is not None:
        shift = shift + tensors["bias"].double()
    return Weights(None, tensors, scale=scale, shift=shift)


def _function_weights(graph_module: GraphModule, node: Node) -> Weights:
    """Tensors that a function reads from the model itself; a convolution's bias is called so, whatever its name."""
    stored = {source: tensor.detach().cpu() for source, tensor in _attributes(graph_module, node)}
    operation = operation_name(node)
    second, third = (_argument(node, i, name) for i, name in ((1, "weight"), (2, "bias")))
    is_layer = bool(_WEIGHTED.fullmatch(operation))
    names = {source: "bias" if is_layer and source is third else str(source.target) for source in stored}
    others = {names[source]: tensor for source, tensor in stored.items() if source is not second}
    weight = stored.get(second) if isinstance(second, Node) else None
    if weight is not None and is_layer:
        transposed = "transpose" in operation
        groups = _argument(node, 6, "groups")
        return Weights(weight, others, groups if isinstance(groups, int) else 1, transposed)
    if weight is not None and operation in PRODUCTS and weight.dim() == 2:
        return Weights(weight.T, others)
    return Weights(None, {names[source]: tensor for source, tensor in stored.items()})


def _argument(node: Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _without(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def _attributes(graph_module: GraphModule, node: Node) -> list[tuple[Node, Tensor]]:
    """The get_attr nodes among a node's inputs that hold a tensor."""
    found = []
    for source in node.all_input_nodes if node.op != "call_module" else ():
        value = attrgetter(str(source.target))(graph_module) if source.op == "get_attr" else None
        if isinstance(value, Tensor):
            found.append((source, value))
    return found


def node_parameters(graph_module: GraphModule, node: Node) -> list[tuple[str, nn.Parameter]]:
    """Parameters that a node reads, with their names in the model."""
    module = module_of(node)
    if module is not None:
        return list(module.named_parameters(prefix=str(node.target)))
    attributes = _attributes(graph_module, node)
    return [(str(source.target), tensor) for source, tensor in attributes if isinstance(tensor, nn.Parameter)]
