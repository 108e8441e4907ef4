"""The torch graph while it grows: nodes are added, and their values followed at every probe."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from fxprune.errors import OnnxImportError
from fxprune.graph.code_names import allow_any_name
from fxprune.onnx_import.names import Names, node_name
from fxprune.onnx_import.values import Activation, Array, Known, Numbers, Size

FILE, BATCH, SIZE = "file", "batch", "size"


class ProbeError(Exception):
    """An operation does not take a value at one of the probes.

    Attributes:
        kind: of the probe.
        cause: what torch says.
    """

    def __init__(self, kind: str, cause: Exception | str) -> None:
        super().__init__(str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__)
        self.kind = kind


@dataclass
class Choices:
    """Where a fixed batch size leaves it open which axis the batch is in, one reading is tried after the other.

    Attributes:
        taken: the number of the reading taken, choice after choice.
        among: how many readings each has.
    """

    taken: list[int] = field(default_factory=list)
    among: list[int] = field(default_factory=list)
    _made: int = 0

    def choose(self, options: Sequence[Any]) -> Any:
        """One of several readings, the likeliest first."""
        if len(options) == 1:
            return options[0]
        if self._made == len(self.taken):
            self.taken.append(0)
            self.among.append(len(options))
        self._made += 1
        return options[self.taken[self._made - 1]]

    def next(self) -> bool:
        """Go on to the next combination, the last choice first; False if there is none."""
        while self.taken and self.taken[-1] + 1 >= self.among[-1]:
            self.taken.pop()
            self.among.pop()
        if self.taken:
            self.taken[-1] += 1
        self._made = 0
        return bool(self.taken)


@dataclass
class TorchGraph:
    """A graph of torch.fx with the modules and weights that it calls.

    Attributes:
        kinds: of the probes: FILE first, then BATCH and SIZE where the graph is to hold for other such sizes.
        choices: see there.
        batch: the file's own number of images.
        names: of modules and weights.
        graph: the graph.
        root: holds modules; their weights are on the meta device until `finish`.
        hint: what the next nodes are called.
    """

    kinds: tuple[str, ...]
    choices: Choices
    batch: int
    names: Names
    graph: Graph = field(default_factory=Graph)
    root: nn.Module = field(default_factory=nn.Module)
    hint: str = ""
    _weights: list[tuple[nn.Module, str, Array, str, bool]] = field(default_factory=list)
    _layers: dict[Any, str] = field(default_factory=dict)
    _read: dict[Any, Activation] = field(default_factory=dict)
    _first: Activation | None = None
    _sizes: dict[tuple[Node, int], Any] = field(default_factory=dict)

    @property
    def probes(self) -> range:
        """Numbers of the probes."""
        return range(len(self.kinds))

    def probe(self, kind: str) -> int | None:
        """The number of a probe; None if there is none of the kind."""
        return self.kinds.index(kind) if kind in self.kinds else None

    def placeholder(self, name: str, probes: Sequence[Tensor]) -> Activation:
        """An input."""
        made = Activation(self.graph.placeholder(name), tuple(probes))
        self._first = self._first or made
        return made

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of torch or operator: a tensor, several, or a number."""
        return self._add("call_function", function, function, args, kwargs)

    def method(self, name: str, x: Activation, *args: Any, **kwargs: Any) -> Any:
        """Call a method of a tensor."""
        return self._add("call_method", name, lambda t, *a, **k: getattr(t, name)(*a, **k), (x, *args), kwargs)

    def module(
        self,
        key: Any,
        names: Sequence[str],
        module: nn.Module,
        weights: dict[str, tuple[Array, str, bool]],
        *args: Any,
    ) -> Any:
        """Call a module, which is installed unless one with the same key is there already.

        Args:
            key: modules with equal keys are the same layer.
            names: for it, the best first.
            module: with its parameters and buffers on the meta device.
            weights: what to put there: an array, a name that is the same for the same numbers, and whether it is a parameter.
            args: of the call.
        """
        module.eval()
        taken = self._layers.get(key)
        if taken is None:
            taken = self._layers[key] = self.names.layer(names, type(module).__name__)
            _install(self.root, taken, module)
            self._weights += [(module, name, *rest) for name, rest in weights.items()]
        return self._add("call_module", taken, module, args, {}, name=node_name(taken))

    def size(self, x: Activation, axis: int) -> Any:
        """The size of an axis: a number where it is the same at all probes."""
        sizes = tuple(probe.shape[axis] for probe in x.probes)
        if len(set(sizes)) == 1:
            return sizes[0]
        if (x.node, axis) not in self._sizes:
            self._sizes[x.node, axis] = self.method("size", x, axis)
        return self._sizes[x.node, axis]

    def tensor(self, value: Known | Activation | Numbers) -> Activation:
        """A value as a tensor of the graph; a constant as a parameter if it is a stored one of floats, else as a buffer."""
        if isinstance(value, Activation):
            return value
        if isinstance(value, Numbers):
            dtype = torch_dtype(value.dtype)
            parts = [self.filled((1,), number, dtype) for number in value.array.reshape(-1)]
            made: Activation = self.method("reshape", self.call(torch.cat, parts, 0), value.array.shape)
            return made
        key = (value.name, value.array.shape, str(value.array.dtype), id(value.array))
        if key not in self._read:
            tensor = as_tensor(value.array)
            path = self.names.weight(value.name)
            owner, name = _owner(self.root, path)
            is_parameter = value.stored and tensor.is_floating_point()
            meta = tensor.to("meta")
            setattr(owner, name, nn.Parameter(meta) if is_parameter else nn.Buffer(meta))
            self._weights.append((owner, name, value.array, value.name, is_parameter))
            self._read[key] = Activation(self.graph.get_attr(path), (meta,) * len(self.kinds))
        return self._read[key]

    def filled(self, shape: tuple[Any, ...], number: Any, dtype: torch.dtype) -> Activation:
        """A tensor of one number, on the device of the first input."""
        assert self._first is not None
        made: Activation = self.method("new_full", self._first, shape, number, dtype=dtype)
        return made

    def finish(self, outputs: Any) -> GraphModule:
        """The graph with its weights, in eval mode; what nobody reads is left out."""
        self.graph.output(map_aggregate(outputs, lambda x: x.node if isinstance(x, (Activation, Size)) else x))
        made: dict[tuple[str, tuple[int, ...], torch.dtype], nn.Parameter] = {}
        for owner, name, array, source, is_parameter in self._weights:
            tensor = as_tensor(array)
            if not is_parameter:
                setattr(owner, name, nn.Buffer(tensor))
                continue
            key = (source, tuple(tensor.shape), tensor.dtype)
            before = made.get(key)
            shared = before is not None and torch.equal(before, tensor)
            parameter = before if shared else nn.Parameter(tensor)
            assert parameter is not None
            made[key] = parameter
            setattr(owner, name, parameter)
        for node in reversed(self.graph.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)
        graph_module = GraphModule(self.root, allow_any_name(self.graph), "OnnxModel")
        return graph_module.eval()

    def _add(
        self,
        op: str,
        target: Any,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        name: str | None = None,
    ) -> Any:
        results = [self._evaluated(function, args, kwargs, i) for i in self.probes]
        if isinstance(results[0], (bool, int, float)) and len(set(results)) == 1:
            return results[0]
        given: Any = map_aggregate(args, _node)
        named: Any = map_aggregate(kwargs, _node)
        name = name or node_name(self.hint) or None
        node = self.graph.create_node(op, target, given, named, name)
        return self._values(node, results, _outer(args))

    def _evaluated(self, function: Callable[..., Any], args: Any, kwargs: Any, probe: int) -> Any:
        def value(x: Any) -> Any:
            return x.probes[probe] if isinstance(x, (Activation, Size)) else x

        given, named = map_aggregate(args, value), map_aggregate(kwargs, value)
        try:
            with torch.no_grad():
                return function(*given, **named)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError, ZeroDivisionError) as error:
            raise ProbeError(self.kinds[probe], error) from error

    def _values(self, node: Node, results: list[Any], outer: int) -> Any:
        if isinstance(results[0], Tensor):
            return Activation(node, tuple(results), outer)
        if isinstance(results[0], (tuple, list)):
            items = [self.graph.call_function(operator.getitem, (node, i)) for i in range(len(results[0]))]
            return [self._values(item, [r[i] for r in results], outer) for i, item in enumerate(items)]
        return Size(self, node, tuple(results))


def _node(x: Any) -> Any:
    return x.node if isinstance(x, (Activation, Size)) else x


def _outer(args: tuple[Any, ...]) -> int:
    return next((x.outer for x in args if isinstance(x, Activation)), 1)


def _install(root: nn.Module, path: str, module: nn.Module) -> None:
    owner, name = _owner(root, path)
    owner.add_module(name, module)


def _owner(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    *parts, last = path.split(".")
    for part in parts:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root, last


def as_tensor(array: Array) -> Tensor:
    """An array as a tensor of its own memory; bfloat16, which numpy lacks, as such.

    Raises:
        OnnxImportError: torch has no such number type.
    """
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    try:
        return torch.from_numpy(np.array(array))
    except TypeError as error:
        raise OnnxImportError(
            f"the file stores numbers of type {array.dtype}, which torch does not compute with"
        ) from error


def torch_dtype(dtype: Any) -> torch.dtype:
    """The number type of torch for one of numpy's, or its name.

    Raises:
        OnnxImportError: there is none.
    """
    name = np.dtype(dtype).name if not isinstance(dtype, str) else dtype
    found = getattr(torch, {"bool": "bool"}.get(name, name), None)
    if not isinstance(found, torch.dtype):
        raise OnnxImportError(f"the file uses the number type {name}, which torch does not compute with")
    return found
