"""GraphModule -> ModelGraph. The graph module is read, never changed; it may be anybody's."""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from fxprune.annotations import annotation, changes, report_of
from fxprune.calibration.batches import inputs_of, map_tensors, tensors_in
from fxprune.channels.apply import channel_order
from fxprune.errors import GraphError
from fxprune.export.inputs_outputs import example_tensors
from fxprune.export.parity import evaluating
from fxprune.fine_tuning.recorded_zeros import FilledZeros, filled_zeros
from fxprune.geometry import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from fxprune.graph import module_of, value_shapes
from fxprune.graph_diff.model_graph import GraphNode, ModelGraph
from fxprune.graph_diff.weights import Weights, recurrent_macs, weight_macs
from fxprune.layers.recurrent import Recurrent
from fxprune.operations import Argument, is_augmented, operation_of, writes_in_place
from fxprune.passes.fold_batchnorm import scale_and_shift
from fxprune.report import LayerReport, PruneReport

_COMMA = re.compile(r",\s*(?![^()\[\]{}]*[)\]}])")  # not inside brackets
_LEFT_OUT = ("inplace", "bias", "in_features", "out_features")


def read_fx(graph_module: GraphModule, example_inputs: Any = None) -> ModelGraph:
    """Read a graph module.

    Args:
        graph_module: run once in eval mode if there are inputs; its training flags are put back.
        example_inputs: a tensor, a tuple of the model's inputs, or a dict of them by name; None leaves sizes of
            activations and MACs unknown.

    Raises:
        ExportError: example_inputs does not fit the model's inputs.
        GraphError: the graph cannot run on them.
    """
    filled = filled_zeros(graph_module)
    shapes = {} if example_inputs is None else _output_shapes(graph_module, example_inputs)
    calls = Counter(str(node.target) for node in graph_module.graph.nodes if node.op == "call_module")
    seen: Counter[str] = Counter()
    uncounted: Counter[str] = Counter()
    nodes: list[GraphNode] = []
    parameters: dict[int, tuple[str, nn.Parameter]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            continue
        seen[str(node.target)] += 1
        call = seen[str(node.target)] if calls[str(node.target)] > 1 else 0
        read = _read_node(graph_module, node, call, shapes, filled)
        nodes.append(read)
        own = _node_parameters(graph_module, node)
        for name, parameter in own:
            parameters.setdefault(id(parameter), (name, parameter))
        if node.op == "call_module" and read.macs is None and any(p.dim() > 1 for _, p in own):
            uncounted[read.op] += 1
    report = report_of(graph_module)
    return ModelGraph(
        title=_title(graph_module, report, filled),
        nodes=tuple(nodes),
        parameters={name: parameter.detach() for name, parameter in parameters.values()},
        changes=changes(graph_module),
        compressed="" if report is None else report.done,
        shapes_known=bool(shapes),
        notes=(
            *([f"{filled}."] if filled else []),
            *(f"MACs leave out what happens inside {op} ({calls} calls)." for op, calls in uncounted.items() if shapes),
        ),
    )


def _title(graph_module: GraphModule, report: PruneReport | None, filled: FilledZeros) -> str:
    name = graph_module._get_name()
    told = name if report is None else f"{name} {report.done} with {report.method}"
    return f"{told}{', zeros filled in since' if filled else ''}"


def _read_node(
    graph_module: GraphModule, node: Node, call: int, shapes: Mapping[Node, tuple[int, ...]], filled: FilledZeros
) -> GraphNode:
    """One node that is not get_attr; `call` counts the calls of a module that has several, and is 0 otherwise."""
    report = annotation(node).report
    lost = filled.layers.get(report.name, 0) if report else 0
    weights = _node_weights(graph_module, node)
    if report is None and weights.matrices:
        report = _of_matrices(graph_module, node)
        lost = sum(filled.layers.get(f"{node.target}.{name}", 0) for name in weights.matrices)
    name, key = node.name, ""
    if node.op == "call_module":
        name = f"{node.target} (call {call})" if call else str(node.target)
        key = "" if call else f"module:{node.target}"
    elif node.op in ("placeholder", "output"):
        key = f"{node.op}:{node.target}"
    elif weights.weight is not None:
        key = "weight:" + next(str(a.target) for a in node.all_input_nodes if a.op == "get_attr")
    return GraphNode(
        id=node.name,
        name=name,
        key=key,
        op=_operation_name(node),
        arguments=_operation_arguments(node),
        inputs=tuple(source.name for source in _read_nodes(node) if source.op != "get_attr"),
        weights=weights,
        order=_order(node),
        inplace=writes_in_place(node),
        output_shape=shapes.get(node),
        macs=_macs(node, weights, shapes),
        status=report.status if report and not lost else "",
        pattern=report.pattern if report and not lost else "",
        output_error=report.relative_error if report else None,
        reason=f"{lost:,} of its zeros have been filled in" if lost else report.reason if report else "",
    )


def _of_matrices(graph_module: GraphModule, node: Node) -> LayerReport | None:
    """What was done to a recurrent layer, whose matrices have a row each."""
    whole = report_of(graph_module)
    rows = [] if whole is None else [row for row in whole.layers if row.name.rpartition(".")[0] == str(node.target)]
    if not rows:
        return None
    pruned = [row for row in rows if row.status == "pruned"]
    kept = [f"{row.name}: {row.reason}" for row in rows if row.status == "kept" and row.reason]
    errors = [row.relative_error for row in rows if row.relative_error is not None]
    return replace(
        rows[0],
        pattern=", ".join(dict.fromkeys(row.pattern for row in pruned)),
        status="pruned" if pruned else rows[0].status,
        reason="; ".join(kept),
        relative_error=max(errors, default=None),
    )


def _output_shapes(graph_module: GraphModule, example_inputs: Any) -> dict[Node, tuple[int, ...]]:
    """Sizes of every node's (first) tensor, from one run in eval mode; training flags are put back."""
    inputs = _values(graph_module, example_inputs)
    first = next((p for p in graph_module.parameters() if p.is_floating_point()), None)
    if first is not None:
        inputs = map_tensors(inputs, lambda x: x.to(first.device, first.dtype if x.is_floating_point() else x.dtype))
    try:
        with evaluating(graph_module):
            shapes = value_shapes(graph_module, *inputs)
    except Exception as error:
        sizes = ", ".join(str(tuple(x.shape)) for x in tensors_in(inputs))
        raise GraphError(
            f"{graph_module._get_name()} cannot run on example_inputs of shape {sizes}: "
            f"{str(error).splitlines()[0]}. Give inputs of the size that the model takes, or none"
        ) from error
    found = {node: _first_size(shape) for node, shape in shapes.items()}
    return {node: tuple(size) for node, size in found.items() if size is not None}


def _values(graph_module: GraphModule, example_inputs: Any) -> tuple[Any, ...]:
    """A value for each placeholder: a tensor, or for a part of a model what reaches it, which may be a list of them."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    if isinstance(example_inputs, dict) and not all(isinstance(x, Tensor) for x in example_inputs.values()):
        return tuple(inputs_of(example_inputs, placeholders).values())
    return example_tensors(example_inputs, graph_module)


def _first_size(shape: Any) -> Size | None:
    """The size of a tensor, or of the first one in a tuple."""
    if shape is None or isinstance(shape, Size):
        return shape
    return next(filter(None, map(_first_size, shape)), None)


def _order(node: Node) -> tuple[Tensor | None, Tensor | None]:
    """What a permutation of channels wrote down: the former places of the input's and of the output's channels."""
    inputs, outputs = channel_order(node)
    return (
        None if inputs is None else torch.as_tensor(inputs, dtype=torch.long),
        None if outputs is None else torch.as_tensor(outputs, dtype=torch.long),
    )


def _macs(node: Node, weights: Weights, shapes: Mapping[Node, tuple[int, ...]]) -> int | None:
    """MACs for one sample: of a layer with a weight, or of a product of two activations."""
    sources = [source for source in _read_nodes(node) if source.op != "get_attr"]
    if node not in shapes or not sources or sources[0] not in shapes:
        return None
    if weights.weight is not None:
        return weight_macs(weights, shapes[sources[0]], shapes[node])
    if weights.matrices:
        steps = shapes[node][1 if getattr(module_of(node), "batch_first", False) and len(shapes[node]) > 2 else 0]
        return recurrent_macs(weights, steps)
    operation = operation_of(node)
    if operation is not None and operation.factors is not None:
        first = _read_nodes(node)[operation.factors[0]]
        return math.prod(shapes[node][1:]) * shapes[first][-1] if first in shapes else None
    return None


def _operation_name(node: Node) -> str:
    """Module class, function or method; relu_, iadd and view are called relu, add and reshape."""
    module = module_of(node)
    if module is not None:
        return type(module).__name__
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    name = _function_name(node)
    return name[1:] if is_augmented(node) else {"view": "reshape", "view_as": "reshape_as"}.get(name, name)


def _operation_arguments(node: Node) -> dict[str, str]:
    """Everything that a node is called with beside tensors, by name, as text.

    Left out: `inplace`, which does not change the values; `bias`, which is compared as a tensor; sizes of weights.
    """
    module = module_of(node)
    arguments = _function_arguments(node) if module is None else _module_arguments(module)
    return {name: text for name, text in arguments.items() if name not in _LEFT_OUT}


def _read_nodes(node: Node) -> list[Node]:
    """The nodes that a node reads, in order of the arguments; one that is read twice comes twice."""
    found: list[Node] = []
    torch.fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _function_name(node: Node) -> str:
    target: Any = node.target
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", packet)).strip("_")


def _function_arguments(node: Node) -> dict[str, str]:
    """Arguments of a function or method by name, with a dot for every node in them."""
    if node.op not in ("call_function", "call_method"):
        return {}
    try:
        names = list(inspect.signature(node.target).parameters) if callable(node.target) else []
    except ValueError:  # a built-in function without a signature
        names = []
    texts = {}
    for position, value in enumerate(node.args):
        texts[names[position] if position < len(names) else f"argument {position}"] = _text(value)
    texts |= {name: _text(value) for name, value in node.kwargs.items()}
    return {name: text for name, text in texts.items() if text != "·"}


def _text(value: Any) -> str:
    """The value as text, with a dot for every node in it."""
    if isinstance(value, Node):
        return "·"
    if isinstance(value, (list, tuple)):
        opening, closing = "[]" if isinstance(value, list) else "()"
        return opening + ", ".join(map(_text, value)) + closing
    if isinstance(value, slice):
        return ":".join("" if part is None else _text(part) for part in (value.start, value.stop, value.step))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    return str(value)


def _module_arguments(module: nn.Module) -> dict[str, str]:
    """What a module prints about itself, by name; sizes of its parameters are left out."""
    texts: dict[str, str] = {}
    for position, item in enumerate(_COMMA.split(module.extra_repr())):
        name, named, value = item.partition("=")
        if named:
            texts[name.strip()] = value.strip()
        elif item.strip() and not module._parameters:
            texts[f"argument {position}"] = item.strip()
    return texts


def _node_weights(graph_module: GraphModule, node: Node) -> Weights:
    """Tensors of the module behind a node, or those that a function reads from the model itself."""
    module = module_of(node)
    return _function_weights(graph_module, node) if module is None else _module_weights(module)


def _module_weights(module: nn.Module) -> Weights:
    if isinstance(module, LazyModuleMixin):  # its parameters have no sizes before the first call
        return Weights()
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors = {k: t.detach().cpu() for k, t in tensors.items() if "num_batches_tracked" not in k}
    transposed = isinstance(module, TRANSPOSED_CONVOLUTIONS)
    if isinstance(module, (*CONVOLUTIONS, nn.Linear)) or transposed:
        weight: Any = module.weight  # not from `tensors`: it may be parametrized
        return Weights(
            weight.detach().cpu(), _without(tensors, "weight"), int(getattr(module, "groups", 1)), transposed
        )
    if isinstance(module, (Recurrent, nn.RNNBase)):
        matrices = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items() if tensor.dim() == 2}
        return Weights(None, {name: tensor for name, tensor in tensors.items() if tensor.dim() == 1}, matrices=matrices)
    if not isinstance(module, _BatchNorm) or module.running_mean is None or module.running_var is None:
        return Weights(None, tensors)
    scale, shift = scale_and_shift(module)
    return Weights(None, tensors, scale=scale.cpu(), shift=shift.cpu())


def _function_weights(graph_module: GraphModule, node: Node) -> Weights:
    """Tensors that a function reads from the model itself; a convolution's bias is called so, whatever its name."""
    stored = {source: tensor.detach().cpu() for source, tensor in _attributes(graph_module, node)}
    known = operation_of(node)
    is_layer = known is not None and known.channels == "matrix"
    second = None if known is None or known.weight is None else known.weight.of(node)
    third = Argument(2, "bias").of(node)
    names = {source: "bias" if is_layer and source is third else str(source.target) for source in stored}
    others = {names[source]: tensor for source, tensor in stored.items() if source is not second}
    weight = stored.get(second) if isinstance(second, Node) else None
    if known is not None and weight is not None and is_layer:
        groups = Argument(6, "groups", 1).of(node)
        return Weights(weight, others, groups if isinstance(groups, int) else 1, "transpose" in known.name)
    if known is not None and weight is not None and known.factors is not None and weight.dim() == 2:
        return Weights(weight.T, others)
    return Weights(None, {names[source]: tensor for source, tensor in stored.items()})


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


def _node_parameters(graph_module: GraphModule, node: Node) -> list[tuple[str, nn.Parameter]]:
    """Parameters that a node reads, with their names in the model."""
    module = module_of(node)
    if module is not None:
        return list(module.named_parameters(prefix=str(node.target)))
    attributes = _attributes(graph_module, node)
    return [(str(source.target), tensor) for source, tensor in attributes if isinstance(tensor, nn.Parameter)]
