"""Symbolic tracing with an example value behind every proxy, for models that ask about shapes.

`if x.shape[1] != 3: raise`, `len(features)`, `for y in x.chunk(2)`, `range(n)`: Python needs an answer at once, and here the
first batch gives it. The answer is frozen into the graph, so the graph is checked on batches of other sizes afterwards;
what was frozen, and where, is noted. An answer that depends on what the images show, not on their size, is refused.
"""

from __future__ import annotations

import builtins
import math
import operator
import traceback
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import Attribute

from fxprune.calibration.batches import inputs_of, map_tensors, tensors_in
from fxprune.graph import arguments_of
from fxprune.intake.item_assignment import is_block, with_item, writes_in_place, written
from fxprune.intake.symbolic import INPLACE, InplaceProxy, PathTracer, users_line
from fxprune.operations import AUGMENTED

# What can be asked of a tensor without looking at its numbers.
_ABOUT_SHAPE = frozenset(
    "shape size dim ndim ndimension numel nelement stride dtype device layout requires_grad element_size itemsize".split()
)
_FACTORIES = (
    torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.linspace, torch.eye, torch.rand, torch.randn,
    torch.tensor, torch.as_tensor, torch.meshgrid, torch.broadcast_tensors, torch.tril_indices, torch.triu_indices,
)  # fmt: skip


HELD_BYTES = 2**29  # Of values from which on those that nobody can read any more are looked for.


@dataclass(frozen=True)
class Frozen:
    """An answer that the example gave where Python asked.

    Attributes:
        line: of the user's code, as "file:line (text)".
        answer: what Python was told.
    """

    line: str
    answer: Any


class ValueTracer(PathTracer):
    """Records a graph, and computes every node's value on the way.

    Args:
        batch: as a calibration loader gives it, of few images.
        device: where the model is.
        leaves: modules to call as a whole.
        given: arguments of `forward` that are inputs even if they have a default.
        into: classes of torch.nn to trace into rather than to call as a whole.
    """

    def __init__(
        self,
        batch: Any,
        device: torch.device,
        leaves: Collection[str] = (),
        given: Collection[str] = (),
        into: tuple[type[nn.Module], ...] = (),
    ) -> None:
        super().__init__(leaves, given, into)
        self.batch = batch
        self.device = device
        self.values: dict[Node, Any] = {}
        self.from_data: set[Node] = set()  # Numbers that depend on what the images show.
        self.frozen: list[Frozen] = []
        self.running = False
        self._proxies: list[weakref.ref[Proxy]] = []
        self._held_bytes, self._most_bytes = 0, HELD_BYTES
        self._autowrap_function_ids |= set(map(id, _FACTORIES))
        self._autowrap_search.append(torch)

    def trace(self, root: Any, concrete_args: Any = None) -> Graph:
        """As torch.fx; the length of a tensor is recorded as its size."""
        length = builtins.len

        def recorded(value: Any) -> Any:
            if isinstance(value, ValueProxy) and not self.running and isinstance(self.value_of(value), Tensor):
                return self.create_proxy("call_method", "size", (value, 0), {})
            return length(value)

        builtins.len = recorded  # Python insists on a number from __len__.
        try:
            return super().trace(root, concrete_args)
        finally:
            builtins.len = length

    def value_of(self, proxy: Proxy) -> Any:
        """The example value behind a proxy."""
        return self._value(proxy.node)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """As torch.fx, and the batch's values for the placeholders."""
        root_fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        placeholders = [arg.node for arg in args if isinstance(arg, Proxy)]
        for node, value in inputs_of(self.batch, placeholders).items():
            self.values[node] = map_tensors(value, lambda x: x.to(self.device).clone())
        return root_fn, args

    def proxy(self, node: Node) -> Proxy:
        """A proxy for a node."""
        proxy = ValueProxy(node, self)
        self._proxies.append(weakref.ref(proxy))
        return proxy

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Proxy:
        """A node, its value, and a proxy."""
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if kind not in ("placeholder", "output"):
            self._run(proxy.node)
        return proxy

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call of a module by the code that is traced; not one inside a node that is being computed."""
        return forward(*args, **kwargs) if self.running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter as a proxy for the code that is traced; as it is inside a node that is being computed."""
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: Proxy) -> bool:
        """The truth of a value."""
        return bool(self.ask(obj, bool))

    def iter(self, obj: Proxy) -> Iterator[Any]:
        """The items of a value, as proxies."""
        value = self._value(obj.node)
        if isinstance(value, dict):
            return iter(list(value))
        length = self.ask(obj, len)
        return iter([obj[i] for i in range(length)])  # type: ignore[index]

    def keys(self, obj: Proxy) -> Any:
        """The keys of a dict."""
        value = self._value(obj.node)
        return list(value) if isinstance(value, dict) else super().keys(obj)

    def ask(self, proxy: Proxy, question: Callable[[Any], Any]) -> Any:
        """Python's question about a value, answered by the example and noted.

        Raises:
            TypeError: if the answer would depend on what the images show.
        """
        node = proxy.node
        value = self._value(node)
        shape_only = question is len
        if node in self.from_data or (isinstance(value, Tensor) and not shape_only):
            raise TypeError("the line asks for the value of a tensor, which depends on what the images show")
        answer = question(value)
        if isinstance(value, Tensor) or not shape_only:
            self.frozen.append(Frozen(users_line(traceback.extract_stack()), answer))
        return answer

    def tidy(self) -> None:
        """Take out what was only computed to answer a question."""
        for node in reversed(list(self.graph.nodes)):
            value = self.values.get(node)
            if node.target in _FACTORIES:
                node.meta.pop("is_wrapped", None)  # torch.fx would write a line for it that fails at the next trace.
            if not node.users and node.op not in ("placeholder", "output") and _is_plain(value):
                self.graph.erase_node(node)

    @torch.no_grad()
    def _run(self, node: Node) -> None:
        args, kwargs = arguments_of(node, self._value)
        target: Any = node.target
        self.running = True
        try:
            if node.op == "get_attr":
                value: Any = self.root
                for part in target.split("."):
                    value = getattr(value, part)
            elif node.op == "call_module":
                value = self.root.get_submodule(target)(*args, **kwargs)
            elif node.op == "call_method":
                value = getattr(args[0], target)(*args[1:], **kwargs)
            else:
                value = target(*args, **kwargs)
        finally:
            self.running = False
        self.values[node] = value
        self._held_bytes += sum(x.nbytes for x in tensors_in([value]))
        if self._held_bytes > self._most_bytes:
            self._let_go()
        if isinstance(value, (bool, int, float, complex, str, list)) and self._is_from_data(node):
            self.from_data.add(node)

    def _let_go(self) -> None:
        """Drop the tensors that the code which is traced holds no more, such as what earlier blocks have computed."""
        alive = [(proxy, ref) for ref in self._proxies if (proxy := ref()) is not None]
        self._proxies = [ref for _, ref in alive]
        read = {proxy.node for proxy, _ in alive}
        for node, value in list(self.values.items()):
            if (
                node not in read
                and node.op not in ("placeholder", "get_attr")
                and next(tensors_in([value]), None) is not None
            ):
                del self.values[node]  # Should it be read after all, `_value` computes it again.
        self._held_bytes = sum(x.nbytes for value in self.values.values() for x in tensors_in([value]))
        self._most_bytes = max(HELD_BYTES, 2 * self._held_bytes)

    def _value(self, node: Any) -> Any:
        if not isinstance(node, Node):
            return node
        if node not in self.values:  # A buffer, or a tensor that forward has made.
            self._run(node)
        return self.values[node]

    def _is_from_data(self, node: Node) -> bool:
        if any(source in self.from_data for source in node.all_input_nodes):
            return True
        if node.op == "call_function" and node.target is getattr:
            return isinstance(self._value(node.args[0]), Tensor) and not _is_about_shape(node.args[1])
        reads_tensor = any(isinstance(self._value(source), Tensor) for source in node.all_input_nodes)
        about_shape = _is_about_shape(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
        holds_tensors = isinstance(self.values[node], list) and any(isinstance(x, Tensor) for x in self.values[node])
        return reads_tensor and not about_shape and not holds_tensors and node.target is not len


class ValueProxy(InplaceProxy):
    """A proxy that answers Python's questions by its example value."""

    tracer: ValueTracer
    part_of: tuple[ValueProxy, Any] | None = None  # The tensor that it is a view into, and the index.

    def __getattr__(self, k: str) -> Any:
        return ValueAttribute(self, k)

    def __getitem__(self, index: Any) -> Any:
        item = self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})
        if self.node.op != "get_attr" and isinstance(self.tracer.value_of(self), Tensor) and is_block(index):
            item.part_of = self, index  # type: ignore[attr-defined]
        return item

    def __bool__(self) -> bool:
        return self.tracer.to_bool(self)

    def __len__(self) -> int:
        return int(self.tracer.ask(self, len))

    def __iter__(self) -> Iterator[Any]:
        return self.tracer.iter(self)

    def __index__(self) -> int:
        return int(self.tracer.ask(self, _index))

    def __int__(self) -> int:
        return int(self.tracer.ask(self, int))

    def __float__(self) -> float:
        return float(self.tracer.ask(self, float))

    def __setitem__(self, index: Any, value: Any) -> None:
        """The variable is bound to a new tensor; that other names of the old one see no change shows in the comparison."""
        if isinstance(value, ValueProxy) and value.part_of is not None:
            whole, place = value.part_of
            if whole is self and place is index:
                return  # x[1:3] += y: it is in its place already.
        self.become(with_item(self, index, value, self.tracer.value_of(self).dim()))

    def become(self, value: Any) -> None:
        """Bind the variable to a new value, and the tensor that it is a view into to one with that value in its place."""
        self.node = value.node
        if self.part_of is not None:
            whole, index = self.part_of
            whole[index] = value

    def __format__(self, spec: str) -> str:
        return format(self.tracer.value_of(self), spec)

    def __ceil__(self) -> Proxy:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})

    def __floor__(self) -> Proxy:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})

    def __round__(self, digits: Any = None) -> Proxy:
        return self.tracer.create_proxy("call_function", round, (self,) if digits is None else (self, digits), {})


def _write_into_views(function: Callable[[Any, Any], Any]) -> None:
    """`view += y` is an assignment to the items of the tensor that it is a view into; elsewhere it is what it is."""
    name = f"__{function.__name__}__"
    record = getattr(InplaceProxy, name)

    def augmented(self: ValueProxy, other: Any) -> Any:
        if self.part_of is None:
            return record(self, other)
        self.become(AUGMENTED[function](self, other))
        return self

    setattr(ValueProxy, name, augmented)


for _function in INPLACE:
    _write_into_views(_function)


class ValueAttribute(Attribute, ValueProxy):
    """An attribute of a proxy, such as its shape; a node of the graph once it is used."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A call of a method; one that writes into a view, `x[1:3].zero_()`, is an assignment to items of `x`."""
        viewed = self.root
        if viewed.part_of is None or not writes_in_place(self.attr):
            return super().__call__(*args, **kwargs)
        viewed.become(written(viewed, self.attr, *args, **kwargs))
        return viewed


def _is_about_shape(name: Any) -> bool:
    return name in _ABOUT_SHAPE or (str(name).startswith("is_") and name not in ("is_nonzero", "is_same_size"))


def _is_plain(value: Any) -> bool:
    """Whether a value is made of numbers, as a shape is."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout))


def _index(value: Any) -> int:
    return int(value.__index__())
