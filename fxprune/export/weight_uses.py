"""Finds every matrix product of an ONNX graph whose weight is stored in the file, whatever the weight is called.

A weight reaches its node directly or through constants: Transpose, Cast, DequantizeLinear, a mask, ... The constant folder
evaluates them, so that the pattern is judged on the numbers that the node reads and along the axis that it sums over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto
from torch import Tensor

from fxprune.export.constant_folding import (
    DEFAULT_DOMAINS,
    MICROSOFT,
    Array,
    Constant,
    Scope,
    attributes,
    nodes_with_constants,
    stored_tensors,
)

# Operation -> input positions that may hold the weight, each with the position of its zero point, if any.
CONVOLUTIONS = {
    "Conv": {1: None}, "FusedConv": {1: None}, "ConvTranspose": {1: None}, "QLinearConv": {3: 5}, "ConvInteger": {1: 3},
    "DeformConv": {1: None},
}  # fmt: skip
PRODUCTS = {
    "Gemm": {0: None, 1: None}, "MatMul": {0: None, 1: None}, "FusedMatMul": {0: None, 1: None},
    "FusedGemm": {0: None, 1: None}, "TransposeMatMul": {0: None, 1: None}, "QGemm": {0: 2, 3: 5},
    "QLinearMatMul": {0: 2, 3: 5}, "MatMulInteger": {0: 2, 1: 3}, "MatMulIntegerToFloat": {0: 4, 1: 5},
    "DynamicQuantizeMatMul": {1: 3}, "MatMulNBits": {1: 3},
}  # fmt: skip
RECURRENT = ("LSTM", "GRU", "RNN")
# Where torch's gates are among ONNX's: input, output, forget, cell to input, forget, cell, output; update, reset, new to reset,
# update, new.
GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
WEIGHT_INPUTS: dict[str, dict[int, int | None]] = {**CONVOLUTIONS, **PRODUCTS}  # type: ignore[dict-item]


@dataclass(frozen=True, eq=False)
class WeightUse:
    """One node that reads a stored weight.

    Attributes:
        node: the node's name.
        op: its operation, such as "Conv" or "Gemm".
        initializer: name of the tensor in the file.
        stored_shape: its shape there.
        axis: the axis of the stored tensor that the node sums over (None if a reshape stands between).
        dtype: stored number type, such as "float32".
        groups: of a convolution.
        weight: oriented as torch's modules store it: (R, C/G, *kernel) for Conv, (R, C) for products (leading batch
            axes of a MatMul joined to R), (C, R/G, *kernel) for ConvTranspose, (gates * H, C) for one direction of a recurrent
            layer, its gates in torch's order; zero points subtracted.
    """

    node: str
    op: str
    initializer: str
    stored_shape: tuple[int, ...]
    axis: int | None
    dtype: str
    groups: int
    weight: Tensor

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - int(torch.count_nonzero(self.weight)) / self.weight.numel() if self.weight.numel() else 0.0

    @property
    def reduction_first(self) -> Tensor:
        """The weight with its input channels on axis 1, as patterns count them (groups of a ConvTranspose joined)."""
        return self.weight.transpose(0, 1) if self.op == "ConvTranspose" else self.weight


@dataclass(frozen=True)
class GraphWeights:
    """What a graph does with its stored tensors.

    Attributes:
        uses: every node that multiplies by a stored weight, in graph order.
        computed: convolutions whose weight is computed or given at run time, as "op node".
        others: stored tensors of two or more dimensions and at least 16 numbers that no such node reads.
        unreadable: damaged tensors, and nodes whose weight does not fit them, each as "name: what is wrong".
    """

    uses: tuple[WeightUse, ...]
    computed: tuple[str, ...]
    others: tuple[tuple[str, tuple[int, ...]], ...]
    unreadable: tuple[str, ...] = ()


def distinct_weights(uses: Iterable[WeightUse]) -> list[Tensor]:
    """Every stored weight once, however many nodes read it; of a recurrent layer one a direction."""
    first: dict[str, str] = {}
    return [use.weight for use in uses if first.setdefault(use.initializer, use.node) == use.node]


def graph_weights(model: ModelProto) -> GraphWeights:
    """Walk a model, subgraphs included; never raises, whatever the model holds."""
    uses: list[WeightUse] = []
    computed: list[str] = []
    unreadable: list[str] = []
    stored: dict[str, Array] = {}
    read: set[str] = set()
    scopes: dict[int, Scope] = {}
    for position, (node, scope) in enumerate(nodes_with_constants(model)):
        scopes[id(scope)] = scope
        name = node.name or f"{node.op_type}_{position}"
        if node.op_type in RECURRENT and node.domain in DEFAULT_DOMAINS:
            for matrices in filter(None, (scope.get(source) for source in node.input[1:3])):
                uses += _recurrent_uses(node, name, matrices)
                read |= matrices.sources
            read |= {
                source for value in map(scope.get, node.input[3:4]) if value is not None for source in value.sources
            }
        if node.op_type not in WEIGHT_INPUTS or node.domain not in (*DEFAULT_DOMAINS, MICROSOFT):
            continue
        found = False
        for index, zero_point in WEIGHT_INPUTS[node.op_type].items():
            constant = scope.get(node.input[index]) if index < len(node.input) else None
            if constant is None or not constant.array.ndim:
                continue
            try:
                use = _use(node, name, scope, constant, index, zero_point)
            except (ValueError, IndexError, TypeError, KeyError, AssertionError) as error:
                shape = "x".join(map(str, constant.array.shape))
                unreadable.append(
                    f"{node.op_type} {name}: its weight {constant.initializer} ({shape}) does not fit: {error}"
                )
                found = True
                continue
            if use is not None:
                uses.append(use)
                read |= constant.sources
                found = True
        if not found and node.op_type in CONVOLUTIONS:
            computed.append(f"{node.op_type} {name}")
    for scope in scopes.values() or [{}]:
        for constant in scope.values():
            if constant is not None and constant.sources == {constant.initializer}:
                stored.setdefault(constant.initializer, constant.stored)
    unreadable += [
        f"{name}: the stored tensor is damaged" for name, array in stored_tensors(model.graph).items() if array is None
    ]
    others = tuple((n, a.shape) for n, a in stored.items() if n not in read and a.ndim > 1 and a.size >= 16)
    return GraphWeights(tuple(uses), tuple(computed), others, tuple(unreadable))


def _use(
    node: NodeProto, name: str, scope: Scope, constant: Constant, index: int, zero_point: int | None
) -> WeightUse | None:
    """How a node reads a weight; None if a number that the weight depends on is given at run time.

    Raises:
        ValueError, IndexError, TypeError, KeyError: the weight does not fit the node.
    """
    array, stated, axes = constant.array, attributes(node), constant.axes
    offset: Array | None = None
    if zero_point is not None and len(node.input) > zero_point and node.input[zero_point]:
        known = scope.get(node.input[zero_point])
        if known is None:
            return None
        offset = known.array
    if node.op_type == "MatMulNBits":
        array, axes, offset = _unpacked(array, offset, stated), None, None
    oriented, reduced = _orient(node.op_type, array, index, stated)
    if offset is not None:
        shifted = array.astype(np.int32) - _zero_points(offset.astype(np.int32), array, node.op_type, reduced)
        oriented, _ = _orient(node.op_type, shifted, index, stated)
    return WeightUse(
        node=name,
        op=node.op_type,
        initializer=constant.initializer,
        stored_shape=constant.stored.shape,
        axis=None if axes is None else axes[reduced],
        dtype=str(constant.stored.dtype),
        groups=max(1, int(stated.get("group", 1))),
        weight=_tensor(oriented),
    )


def _recurrent_uses(node: NodeProto, name: str, constant: Constant) -> list[WeightUse]:
    """How a recurrent layer reads its input or recurrent matrices (directions, gates * H, C): one use a direction."""
    array, order = constant.array, GATES[node.op_type]
    if array.ndim != 3 or array.shape[1] % len(order):
        return []
    size = array.shape[1] // len(order)
    rows = np.concatenate([np.arange(gate * size, (gate + 1) * size) for gate in order])
    axis = None if constant.axes is None else constant.axes[2]
    return [
        WeightUse(
            node=name,
            op=node.op_type,
            initializer=constant.initializer,
            stored_shape=constant.stored.shape,
            axis=axis,
            dtype=str(constant.stored.dtype),
            groups=1,
            weight=_tensor(direction[rows]),
        )
        for direction in array
    ]


def _zero_points(offset: Array, array: Array, op: str, reduced: int) -> Array:
    """In the form in which they broadcast over the weight: one a tensor, or one for each output channel."""
    if offset.size == 1:
        return offset.reshape(())
    if offset.ndim > 1:
        return offset
    channel = 0 if op in CONVOLUTIONS else next(axis for axis in (array.ndim - 1, array.ndim - 2) if axis != reduced)
    return offset.reshape([-1 if axis == channel else 1 for axis in range(array.ndim)])


def _unpacked(packed: Array, zero_points: Array | None, stated: Mapping[str, Any]) -> Array:
    """The weight (K, N) of a MatMulNBits, zero points subtracted, scales left out.

    com.microsoft's contrib operators: B is (N, blocks of K, bytes), lowest bits first; zero points are packed alike, or stored
    as floats, and half the range where there are none.
    """
    k, n, bits, size = (
        int(stated.get(key, default)) for key, default in (("K", 0), ("N", 0), ("bits", 4), ("block_size", 32))
    )
    if bits not in (2, 4, 8):
        raise ValueError(f"{bits} bits are not known")
    blocks = -(-k // size)
    values = _bits(packed.reshape(n, blocks, -1), bits)[:, :, :size].astype(np.int32)
    if zero_points is None:
        offset = np.full((n, blocks), 1 << (bits - 1), np.int32)
    elif zero_points.dtype == np.uint8:
        offset = _bits(zero_points.reshape(n, -1), bits)[:, :blocks].astype(np.int32)
    else:
        offset = zero_points.reshape(n, blocks)
    return np.asarray((values - offset[:, :, None]).reshape(n, -1)[:, :k].T)


def _bits(packed: Array, bits: int) -> Array:
    """Bytes (..., B) as numbers of a few bits (..., B * 8 / bits), lowest first."""
    parts = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(*packed.shape[:-1], -1)


def _orient(op: str, array: Array, index: int, stated: Mapping[str, Any]) -> tuple[Array, int]:
    """The weight as torch stores it, and the axis of `array` that the node sums over."""
    if op in CONVOLUTIONS:
        if array.ndim < 3:
            raise ValueError("a convolution's weight has three dimensions or more")
        return array, 0 if op == "ConvTranspose" else 1
    if array.ndim == 1:
        return array[None], 0
    is_left = index == 0
    transposed = bool(stated.get("transA" if is_left else "transB", 0))
    reduced = array.ndim - 1 if is_left != transposed else array.ndim - 2
    last = np.moveaxis(array, reduced, -1)
    return last.reshape(-1, last.shape[-1]), reduced


def _tensor(array: Array) -> Tensor:
    """As torch tensor; number types that torch lacks (and bfloat16, which numpy lacks) become float32."""
    if array.dtype not in (np.float32, np.float16, np.float64, np.int8, np.uint8, np.int32, np.int64):
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array))
