"""The normal form: every convolution and matrix product with a constant weight is a plain module under its own name.

However a model writes it (a subclass, `F.conv2d` on a parameter, `x @ w.t()`, a weight computed of other parameters, an
operator of torch.export), after this it is a call of nn.ConvNd, nn.ConvTransposeNd or nn.Linear, and BatchNorm written as
a function is nn.BatchNormNd. So everything behind it knows one form.

`view` becomes `reshape`, which gives the same view where there is one: passes may change how a value lies in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxprune.geometry import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from fxprune.graph import module_of
from fxprune.intake.constants import Constants
from fxprune.intake.names import matches
from fxprune.intake.origins import Origin
from fxprune.operations import OPERATIONS, named_arguments, operation_name

_PLAIN = (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class _Layer:
    """A call that becomes a module.

    Attributes:
        module: the module, without hooks, in eval mode.
        input: what it reads.
        home: the node of the weight (of BatchNorm: the running mean), after which the module is named.
        origins: where its parameters and buffers come from, by their names in the module.
    """

    module: nn.Module
    input: Node
    home: Node
    origins: dict[str, Origin]


def normalise(graph_module: GraphModule, model: nn.Module, *, exclude: Sequence[str] = ()) -> dict[str, Origin]:
    """Bring a graph into the normal form, in place.

    Args:
        graph_module: a traced model in eval mode.
        model: the model that was traced, for the classes of its modules.
        exclude: module names or fnmatch patterns. In excluded modules only what stays exactly the same becomes a module:
            convolutions and linear layers whose weight is a parameter.

    Returns:
        The origin of every parameter that has another name, or another value, than in the model.
    """
    return _Normaliser(graph_module, model, tuple(exclude)).run()


@dataclass
class _Normaliser:
    graph_module: GraphModule
    model: nn.Module
    exclude: tuple[str, ...]
    origins: dict[str, Origin] = field(default_factory=dict)
    made: dict[str, nn.Module] = field(default_factory=dict)

    def run(self) -> dict[str, Origin]:
        graph = self.graph_module.graph
        constants = Constants(self.graph_module)
        layers = {node: layer for node in graph.nodes if (layer := self._layer(node, constants)) is not None}
        homes = {node: self._home(layer, constants) for node, layer in layers.items()}
        for node, layer in layers.items():
            inputs = node.all_input_nodes
            node.args, node.kwargs = (layer.input,), {}
            for source in inputs:
                constants.forget(source)
        for node, layer in layers.items():
            name = self._name(layer, homes[node])
            with graph.inserting_before(node):
                call = graph.call_module(name, node.args)
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            graph.erase_node(node)
        if layers:
            self._drop_unread()
        if _reshape_for_view(self.graph_module) or layers:
            self.graph_module.recompile()
        return self.origins

    def _layer(self, node: Node, constants: Constants) -> _Layer | None:
        """The module for a node's call, or None where it is none of those or has to stay."""
        name = operation_name(node)
        build = _BUILDERS.get(name)
        if build is None:
            return None
        layer = build(named_arguments(node), name, constants, self.model)
        if layer is None or constants.holds(layer.input):
            return None
        sources = [_find(self.graph_module, name) for name in constants.sources(layer.home)]
        if name != "batch_norm" and not any(isinstance(source, nn.Parameter) for source in sources):
            return None  # A fixed filter or basis, which nobody trained.
        if build is _convolution_or_linear and all(o.how == "same" for o in layer.origins.values()):
            return layer
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        places = [*constants.sources(layer.home), *(str(place[0]) for place in stack[-1:])]
        return None if any(matches(place, self.exclude) for place in places) else layer

    def _home(self, layer: _Layer, constants: Constants) -> str:
        """The name of the parameter that a layer is named after: the largest that its weight is computed of."""

        def size(name: str) -> tuple[int, int]:
            value = _find(self.graph_module, name)
            return (min(value.dim(), 2), value.numel())

        return max(constants.sources(layer.home), key=size)

    def _name(self, layer: _Layer, path: str) -> str:
        """The name under which a layer is called; it is installed there if it is new."""
        owner, _, last = path.rpartition(".")
        there: Any = _find(self.graph_module, owner) if owner else None
        if type(there) in _PLAIN and _same(there, layer.module):
            return owner
        users_own = _find(self.model, owner) if owner else None
        stands_for_owner = isinstance(users_own, _PLAIN) or (
            isinstance(users_own, nn.Module) and last in ("weight", "running_mean") and not any(users_own.children())
        )
        candidates = [owner] if owner and stands_for_owner and type(there) in (nn.Module, type(None)) else []
        candidates += [] if path not in self.made and self._is_read(path) else [path]
        fresh = f"{path.replace('.', '_')}_{type(layer.module).__name__.lower()}"
        for name in (*candidates, fresh, *(f"{fresh}{i}" for i in range(2, 10_000))):
            if name in self.made and _same(self.made[name], layer.module):
                return name
            if name not in self.made and (name in candidates or _find(self.graph_module, name) is None):
                break
        self._install(name, layer.module)
        for key, origin in layer.origins.items():
            if origin != Origin((f"{name}.{key}",)):
                self.origins[f"{name}.{key}"] = origin
        return name

    def _is_read(self, path: str) -> bool:
        """Whether a node reads a parameter, itself or with a module that is called as a whole."""
        read = {str(n.target) for n in self.graph_module.graph.nodes if n.op in ("get_attr", "call_module")}
        return path in read or any(path[:i] in read - self.made.keys() for i, c in enumerate(path) if c == ".")

    def _install(self, name: str, module: nn.Module) -> None:
        """Put a module into the graph module, with all under that name that other nodes use."""
        old = _find(self.graph_module, name)
        if isinstance(old, nn.Module):
            for key, child in old._modules.items():
                module.add_module(key, child)
            for key, tensor in (*old._parameters.items(), *old._buffers.items()):
                if tensor is not None and self._is_read(f"{name}.{key}") and not hasattr(module, key):
                    setattr(module, key, tensor if isinstance(tensor, nn.Parameter) else nn.Buffer(tensor))
        parent: nn.Module = self.graph_module
        *parts, last = name.split(".")
        for part in parts:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        if old is not None:
            delattr(parent, last)
        parent.add_module(last, module)
        self.made[name] = module

    def _drop_unread(self) -> None:
        """Delete parameters, buffers and modules that no node uses any more."""
        nodes = self.graph_module.graph.nodes
        read = {str(n.target) for n in nodes if n.op == "get_attr"}
        called = {str(n.target) for n in nodes if n.op == "call_module"}
        used = [*read, *called]
        for path, module in reversed(list(self.graph_module.named_modules(remove_duplicate=False))):
            enclosing = [path[:i] for i, c in enumerate(path) if c == "."]
            if path in called or any(name in called and name not in self.made for name in enclosing):
                continue  # Called, or part of what is called.
            if path and not any(name.startswith(f"{path}.") for name in used):
                self.graph_module.delete_submodule(path)
                continue
            for key in (*module._parameters, *module._buffers):
                if (f"{path}.{key}" if path else key) not in read:
                    delattr(module, key)


def _reshape_for_view(graph_module: GraphModule) -> bool:
    """Write `reshape` for `view`, but for a view as another dtype; whether there was one.

    Where a value has one channel, or one pixel, its strides do not say whether it is in channels last. BatchNorm and operations
    in place each take it for one of the two, and so decide how the values after it lie: without them a `view` may fail.
    """
    changed = False
    for node in graph_module.graph.find_nodes(op="call_method", target="view"):
        first = node.args[1] if len(node.args) > 1 else None
        is_asked = isinstance(first, Node) and first.target is getattr and first.args[1] == "dtype"
        if not (is_asked or isinstance(first, torch.dtype) or "dtype" in node.kwargs):
            node.target = "reshape"
            node.kwargs = {"shape": node.kwargs["size"]} if node.kwargs else {}
            changed = True
    for node in graph_module.graph.find_nodes(op="call_method", target="view_as"):
        node.target = "reshape_as"
        changed = True
    return changed


def _convolution_or_linear(a: dict[str, Any], name: str, constants: Constants, _: nn.Module) -> _Layer | None:
    home, bias = a.get("weight"), a.get("bias")
    if not isinstance(a.get("input"), Node) or not _is_node(home, constants):
        return None
    if bias is not None and not _is_node(bias, constants):
        return None
    weight = constants.value(home)
    added = None if bias is None else constants.value(bias)
    if name == "linear":
        if weight.dim() != 2 or (added is not None and added.shape != weight.shape[:1]):
            return None
        module: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=added is not None, device="meta")
    else:
        transposed = name.startswith("conv_transpose") or a.get("transposed") is True
        options = {key: a[key] for key in ("stride", "padding", "dilation", "groups", "output_padding") if key in a}
        if not transposed:
            options.pop("output_padding", None)
        options = {key: _plain_numbers(value, weight.dim() - 2) for key, value in options.items()}
        if any(value is None for value in options.values()):
            return None
        first, second = weight.shape[0], weight.shape[1] * options.get("groups", 1)
        kind_of = (TRANSPOSED_CONVOLUTIONS if transposed else CONVOLUTIONS)[weight.dim() - 3]
        channels = (first, second) if transposed else (second, first)
        module = kind_of(*channels, tuple(weight.shape[2:]), bias=added is not None, device="meta", **options)
    return _filled(module, a["input"], home, bias, constants)


def _product(a: dict[str, Any], name: str, constants: Constants, _: nn.Module) -> _Layer | None:
    x, home = a.get("input"), a.get("other", a.get("mat2"))
    if not isinstance(x, Node) or not _is_node(home, constants):
        return None
    matrix = constants.value(home)
    if not isinstance(matrix, Tensor) or matrix.dim() != 2:
        return None
    return _filled(
        nn.Linear(matrix.shape[0], matrix.shape[1], bias=False, device="meta"),
        x,
        home,
        None,
        constants,
        transposed=True,
    )


def _addmm(a: dict[str, Any], name: str, constants: Constants, _: nn.Module) -> _Layer | None:
    bias, x, home = a.get("input"), a.get("mat1"), a.get("mat2")
    if not isinstance(x, Node) or not _is_node(home, constants) or not _is_node(bias, constants):
        return None
    matrix = constants.value(home)
    if any(a.get(key, 1) != 1 for key in ("alpha", "beta")) or constants.value(bias).shape != matrix.shape[1:]:
        return None
    return _filled(
        nn.Linear(matrix.shape[0], matrix.shape[1], device="meta"), x, home, bias, constants, transposed=True
    )


def _norm(a: dict[str, Any], name: str, constants: Constants, model: nn.Module) -> _Layer | None:
    nodes = {k: a[k] for k in ("running_mean", "running_var", "weight", "bias") if a.get(k) is not None}
    if a.get("training", False) is not False or not isinstance(a.get("input"), Node):
        return None
    complete = {"running_mean", "running_var"} <= nodes.keys() and ("weight" in nodes) == ("bias" in nodes)
    if not complete or not all(map(constants.holds, nodes.values())) or not isinstance(a.get("eps", 1e-5), float):
        return None
    values = {key: constants.value(node) for key, node in nodes.items()}
    kind_of = _norm_class(a["input"], constants.sources(nodes["running_mean"])[0], model)
    if kind_of is None:
        return None
    module = kind_of(values["running_mean"].numel(), eps=a.get("eps", 1e-5), affine="weight" in nodes, device="meta")
    for key, value in values.items():
        setattr(module, key, _parameter(value) if key in ("weight", "bias") else value)
    module.num_batches_tracked = torch.tensor(0, device=values["running_mean"].device)
    found = {key: _origin(node, constants) for key, node in nodes.items()}
    return _Layer(module.eval(), a["input"], nodes["running_mean"], found)


_BUILDERS: dict[str, Callable[[dict[str, Any], str, Constants, nn.Module], _Layer | None]] = {
    **{operation.name: _convolution_or_linear for operation in OPERATIONS if operation.channels == "matrix"},
    "convolution": _convolution_or_linear,
    "matmul": _product,
    "mm": _product,
    "addmm": _addmm,
    "batch_norm": _norm,
}


def _norm_class(x: Node, mean: str, model: nn.Module) -> type[nn.Module] | None:
    """BatchNorm1d, 2d or 3d: by the model's own class, or by the number of dimensions where torch.export knows it."""
    theirs = _find(model, mean.rpartition(".")[0])
    for kind in _NORMS:
        if isinstance(theirs, kind):
            return kind
    value = x.meta.get("val")
    if isinstance(value, Tensor) and 2 <= value.dim() <= 5:
        return _NORMS[max(value.dim() - 3, 0)]
    return None


def _filled(
    module: nn.Module, x: Node, home: Node, bias: Node | None, constants: Constants, *, transposed: bool = False
) -> _Layer | None:
    weight = constants.value(home)
    if not weight.is_floating_point():
        return None
    module.weight = _weight(home, weight, transposed=transposed, constants=constants)
    found = {"weight": _origin(home, constants, transposed=transposed)}
    if bias is not None:
        module.bias = _parameter(constants.value(bias))
        found["bias"] = _origin(bias, constants)
    return _Layer(module.eval(), x, home, found)


def _is_node(value: Any, constants: Constants) -> TypeGuard[Node]:
    """Whether an argument is a constant node."""
    return constants.holds(value)


def _weight(home: Node, value: Tensor, *, transposed: bool, constants: Constants) -> nn.Parameter:
    if not transposed:
        return _parameter(value)
    # x @ w.t() has the weight of an nn.Linear as it is.
    return _parameter(constants.value(home.all_input_nodes[0]) if _is_transpose(home) else value.t())


def _origin(node: Node, constants: Constants, *, transposed: bool = False) -> Origin:
    sources = tuple(constants.sources(node))
    if node.op == "get_attr":
        return Origin(sources, "transposed" if transposed else "same")
    return Origin(sources, "same" if transposed and _is_transpose(node) else "computed")


def _parameter(value: Tensor) -> nn.Parameter:
    return (
        value
        if isinstance(value, nn.Parameter)
        else nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format))
    )


def _plain_numbers(value: Any, dims: int) -> Any:
    """An option of a convolution as nn's classes take it; None if it is computed."""
    if isinstance(value, (list, tuple)):
        numbers = tuple(value) * (dims if len(value) == 1 else 1)
        return numbers if all(isinstance(n, int) for n in numbers) else None
    return value if isinstance(value, (int, str)) else None


def _is_transpose(node: Node) -> bool:
    """Whether a node is the transpose of a parameter, w.t()."""
    source = node.args[0] if node.args else None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name == "getattr":
        name = str(node.args[1])
    return isinstance(source, Node) and source.op == "get_attr" and name in ("t", "T", "mT", "transpose")


def _same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two layers are the same: class, options and values."""
    if type(a) is not type(b) or a.extra_repr() != b.extra_repr():
        return False
    names = _tensor_names(a)
    return names == _tensor_names(b) and all(
        getattr(a, n) is getattr(b, n) or torch.equal(getattr(a, n), getattr(b, n)) for n in names
    )


def _tensor_names(module: nn.Module) -> list[str]:
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return [n for n in names if isinstance(getattr(module, n, None), Tensor)]


def _find(module: nn.Module, path: str) -> Any:
    """The module or tensor at a path, or None."""
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            return None
        found = getattr(found, part)
    return found


def is_layer_call(node: Node) -> bool:
    """Whether a node calls a plain convolution or linear module."""
    return type(module_of(node)) in (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, nn.Linear)
