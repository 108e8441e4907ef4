"""Layers whose weight is read at several places: one module called several times, or several modules with one weight.

Such calls are one least-squares problem, whose statistics are the sum over the calls. It is solved at the first call, and all
calls run with the new weights from then on.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from fxprune.annotations import Role, annotation
from fxprune.geometry import LayerGeometry, MatrixLayer, is_matrix_layer
from fxprune.graph import module_of

Calls = dict[Node, tuple[Node, ...]]


def weight_calls(graph_module: GraphModule) -> Calls:
    """For every call of a Conv or Linear module, all calls that read the same weight, in graph order."""
    by_weight: dict[int, list[Node]] = {}
    for node in graph_module.graph.nodes:
        module = module_of(node)
        weight = module._parameters.get("weight") if is_matrix_layer(module) else None
        if weight is not None:
            by_weight.setdefault(id(weight), []).append(node)
    return {node: tuple(calls) for calls in by_weight.values() for node in calls}


def keeps_own_target(calls: Calls, node: Node, geometry: LayerGeometry) -> bool:
    """Whether a layer's target is its own output on its own inputs, whatever `Options.target` says: its weights fit that best.

    With several calls there is no one output to make up for, and with blocks of columns none that each could be fitted to.
    """
    return len(calls[node]) > 1 or geometry.blocks > 1


def role_without_chain(calls: Calls, node: Node, geometry: LayerGeometry, *, reconstruct: bool) -> Role:
    """What is to be done with a layer that no constraint is left for; one whose inputs lost channels makes up for them anyway.

    Args:
        calls: see `weight_calls`.
        node: the layer's call.
        geometry: of the layer.
        reconstruct: whether layers that stay dense are re-fitted.
    """
    narrowing = annotation(node).narrowing
    if narrowing is not None and narrowing.lost_inputs:
        return "compress"
    return "reconstruct" if reconstruct and not keeps_own_target(calls, node, geometry) else "keep"


def modules_called(calls: tuple[Node, ...]) -> tuple[MatrixLayer, ...]:
    """The modules that these nodes call, each once."""
    modules = [module for node in calls if is_matrix_layer(module := module_of(node))]
    return tuple(dict.fromkeys(modules))


def not_one_problem(graph_module: GraphModule, calls: tuple[Node, ...]) -> str | None:
    """Why the weight that these calls read cannot be solved as theirs, or None."""
    modules = modules_called(calls)
    first = modules[0]
    biases = {id(b): b for module in modules if (b := module._parameters.get("bias")) is not None}
    for node, module in zip(calls, map(module_of, calls), strict=True):
        assert is_matrix_layer(module)
        if type(module) is not type(first) or LayerGeometry.of(module) != LayerGeometry.of(first):
            return f"its weight is shared with {str(node.target)!r}, which reads its input in another way"
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    for parameter in (first.weight, *biases.values()):
        for name, other in graph_module.named_parameters(remove_duplicate=False):
            if other is not parameter:
                continue
            owner, _, own_name = name.rpartition(".")
            if name in read or own_name not in ("weight", "bias"):
                return f"its {own_name} is shared with another part of the model"
            above = [owner[:i] for i, letter in enumerate(owner) if letter == "."]
            whole = next((module for module in above if module in called), None)
            if whole is not None:
                return f"its {own_name} is shared with {owner!r}, inside {whole!r}, which is called as a whole"
            if graph_module.get_submodule(owner) not in modules:
                return f"its {own_name} is shared with {owner!r}"
    return None
