"""Which builder makes an operator, and what a builder is handed: one node of the file with its values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from onnx import NodeProto

from fxprune.errors import OnnxImportError
from fxprune.onnx_import.graph import TorchGraph
from fxprune.onnx_import.values import Activation, Array, Known, Numbers, Value

DEFAULT, MICROSOFT = "", "com.microsoft"
Builder = Callable[["Operation"], Any]
_BUILDERS: dict[tuple[str, str], Builder] = {}


def operator(*names: str, domain: str = DEFAULT) -> Callable[[Builder], Builder]:
    """Decorator: the function builds these operators. It gives a value, or a list of values, one for each output."""

    def add(builder: Builder) -> Builder:
        _BUILDERS.update({(domain, name): builder for name in names})
        return builder

    return add


def builder_of(node: NodeProto) -> Builder | None:
    """The builder of a node's operator."""
    domain = DEFAULT if node.domain in ("", "ai.onnx") else node.domain
    return _BUILDERS.get((domain, node.op_type))


def known_operators() -> tuple[str, ...]:
    """The names of all operators that have a builder, sorted."""
    return tuple(sorted(name if not domain else f"{domain}.{name}" for domain, name in _BUILDERS))


@dataclass(frozen=True, eq=False)
class Operation:
    """One node of a file, as its builder sees it.

    Attributes:
        node: the node.
        inputs: its values; None for an input that is left out.
        attributes: those that it states.
        opset: version of its operator set.
        graph: where to build.
        readers: how many nodes, and outputs of the file, read a name of the file.
        later: the nodes that read a name.
        known: the constant behind a name of the file, or None.
        skipped: outputs of nodes that are built already, with their values.
    """

    node: NodeProto
    inputs: tuple[Value | None, ...]
    attributes: dict[str, Any]
    opset: int
    graph: TorchGraph
    readers: Callable[[str], int]
    later: Callable[[str], Sequence[NodeProto]]
    known: Callable[[str], Known | None]
    skipped: dict[str, Value]

    @property
    def type(self) -> str:
        """The operator's name."""
        return self.node.op_type

    def fail(self, why: str) -> NoReturn:
        """Refuse the node.

        Raises:
            OnnxImportError: always; the importer adds the file and the node.
        """
        raise OnnxImportError(why)

    def input(self, position: int) -> Value | None:
        """An input as it is; None if it is not given."""
        return self.inputs[position] if position < len(self.inputs) else None

    def tensor(self, position: int = 0) -> Activation:
        """An input as a tensor of the graph."""
        value = self.input(position)
        if value is None:
            self.fail(f"its input {position} is not given")
        return self.graph.tensor(value)

    def constant(self, position: int) -> Array | None:
        """The numbers of a constant input; None if it is not given."""
        value = self.input(position)
        if value is None:
            return None
        if isinstance(value, Numbers) and value.is_known:
            return value.array.astype(value.dtype)
        if not isinstance(value, Known):
            self.fail(
                f"its input {self.node.input[position]!r} is computed when the file runs; only a constant can be taken"
            )
        return value.array

    def numbers(self, name: str, position: int | None = None) -> list[Any] | None:
        """Whole numbers that are an attribute in some operator sets and an input in others; None if they are not given."""
        if name in self.attributes:
            return list(np.atleast_1d(self.attributes[name]).tolist())
        value = None if position is None else self.input(position)
        if value is None:
            return None
        if isinstance(value, Activation):
            self.fail(f"{name} are computed from the numbers in an image, {self.node.input[position or 0]!r}")
        return list(Numbers.of(value).array.reshape(-1))

    def ints(self, name: str, position: int | None = None) -> list[int] | None:
        """Likewise, and known now."""
        found = self.numbers(name, position)
        if found is not None and not all(isinstance(x, (int, float)) for x in found):
            self.fail(f"{name} depend on the size of the input")
        return found

    def attribute(self, name: str, default: Any) -> Any:
        """An attribute as it is stated; text as str."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def scalar(self, position: int) -> Any:
        """A number where an input is a single constant that is part of the program rather than trained; else None."""
        value = self.input(position)
        if isinstance(value, Numbers) and value.array.size == 1 and value.array.ndim <= 1:
            return value.array.reshape(-1)[0]
        if not isinstance(value, Known) or value.array.size != 1 or (value.stored and value.array.ndim):
            return None
        return value.array.reshape(-1)[0].item() if value.array.dtype.kind in "fiub" else None

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function."""
        return self.graph.call(function, *args, **kwargs)

    def method(self, name: str, x: Activation, *args: Any, **kwargs: Any) -> Any:
        """Call a method of a tensor."""
        return self.graph.method(name, x, *args, **kwargs)
