"""What a name of an ONNX graph stands for while it is imported: a constant, a value of the torch graph, or sizes.

A file is followed at up to three sizes of its inputs, the *probes*: its own, another number of images, another height and
width. Tensors are on the meta device there: they have a shape and a type, and no numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

if TYPE_CHECKING:
    from fxprune.onnx_import.graph import TorchGraph

Array = NDArray[Any]
Number = bool | int | float


@dataclass(frozen=True, eq=False)
class Known:
    """A constant.

    Attributes:
        array: its value.
        name: of the stored tensor that it is a form of, or its own.
        stored: whether it is a stored tensor of the file, which was trained perhaps, and not a computed number.
    """

    array: Array
    name: str
    stored: bool = False


@dataclass(frozen=True, eq=False)
class Activation:
    """A tensor that depends on the graph's inputs.

    Attributes:
        node: that computes it.
        probes: the tensor on the meta device, one for each probe.
        outer: how often the images of a batch are gone through along the axis that holds the batch: 1 for (N * i, ...), o for
            (o * N * i, ...).
    """

    node: Node
    probes: tuple[Tensor, ...]
    outer: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """At the file's own size."""
        return tuple(self.probes[0].shape)

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return self.probes[0].dim()

    def axis(self, axis: int) -> int:
        """An axis counted from the front."""
        return axis % self.rank if self.rank else 0


@dataclass(frozen=True, eq=False)
class Size:
    """A number that depends on the sizes of the graph's inputs; arithmetic with it is written into the graph.

    Attributes:
        graph: where it is computed.
        node: that computes it.
        probes: its values.
    """

    graph: TorchGraph
    node: Node
    probes: tuple[Number, ...]

    def _with(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.graph.call(function, *args)

    def __add__(self, other: Any) -> Any:
        return self._with(operator.add, self, other)

    def __radd__(self, other: Any) -> Any:
        return self._with(operator.add, other, self)

    def __sub__(self, other: Any) -> Any:
        return self._with(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return self._with(operator.sub, other, self)

    def __mul__(self, other: Any) -> Any:
        return self._with(operator.mul, self, other)

    def __rmul__(self, other: Any) -> Any:
        return self._with(operator.mul, other, self)

    def __floordiv__(self, other: Any) -> Any:
        return self._with(operator.floordiv, self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._with(operator.floordiv, other, self)

    def __truediv__(self, other: Any) -> Any:
        return self._with(operator.truediv, self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._with(operator.truediv, other, self)

    def __mod__(self, other: Any) -> Any:
        return self._with(operator.mod, self, other)

    def __neg__(self) -> Any:
        return self._with(operator.neg, self)


@dataclass(frozen=True, eq=False)
class Numbers:
    """A small tensor of sizes, as a file computes it to say what it wants reshaped, sliced or resized to.

    Attributes:
        array: of Python numbers and `Size`s, dtype object.
        dtype: its number type in the file.
    """

    array: Array
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, value: Known | Numbers) -> Numbers:
        """A constant as numbers."""
        if isinstance(value, Numbers):
            return value
        items = np.empty(value.array.shape, object)
        items.reshape(-1)[:] = value.array.reshape(-1).tolist()
        return cls(items, value.array.dtype)

    @property
    def is_known(self) -> bool:
        """Whether no number in it depends on sizes."""
        return not any(isinstance(item, Size) for item in self.array.reshape(-1))


Value: TypeAlias = Known | Activation | Numbers


def at(value: Any, probe: int) -> Any:
    """A number, or a tensor, at one probe."""
    return value.probes[probe] if isinstance(value, (Size, Activation)) else value
