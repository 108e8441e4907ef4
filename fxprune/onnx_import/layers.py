"""Layers with weights: convolutions, matrix products, normalisation, recurrent layers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fxprune.geometry import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from fxprune.onnx_import.graph import torch_dtype
from fxprune.onnx_import.names import layer_names
from fxprune.onnx_import.padding import Sides, cropped, padded, same_sides, stated_sides
from fxprune.onnx_import.table import Operation, operator
from fxprune.onnx_import.values import Activation, Array, Known

_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE_NORMS = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)


@operator("Conv")
def conv(op: Operation) -> Activation:
    """Convolution; padding that differs at both ends becomes a pad before it."""
    x, weight = op.tensor(), op.input(1)
    dims = x.rank - 2
    kernel = _kernel(op, dims)
    stride = tuple(op.attribute("strides", [1] * dims))
    dilation = tuple(op.attribute("dilations", [1] * dims))
    groups = op.attribute("group", 1)
    sides = _sides(op, x, kernel, stride, dilation)
    if all(before == after for before, after in sides):
        padding = tuple(before for before, _ in sides)
    else:
        x, padding = padded(op, x, sides), (0,) * dims
    bias = op.input(2)
    if not isinstance(weight, Known) or not (bias is None or isinstance(bias, Known)) or dims > 3:
        if dims > 3:
            op.fail(f"a convolution over {dims} dimensions")
        third = None if bias is None else op.tensor(2)
        result: Activation = op.call(_CONVOLVE[dims - 1], x, op.tensor(1), third, stride, padding, dilation, groups)
        return result
    added, output = (bias, None) if bias is not None else _added_later(op, weight.array.shape[0], x.rank)
    kind: Any = CONVOLUTIONS[dims - 1]
    module = kind(
        weight.array.shape[1] * groups, weight.array.shape[0], kernel, stride, padding, dilation, groups,
        bias=added is not None, **_on_meta(weight.array),
    )  # fmt: skip
    return _layer(op, module, weight, weight.array, "same", added, x, output)


@operator("ConvTranspose")
def conv_transpose(op: Operation) -> Activation:
    """Transposed convolution; what is cut off its output at one end only is cut off behind it."""
    x, weight, bias = op.tensor(), op.input(1), op.input(2)
    dims = x.rank - 2
    kernel = _kernel(op, dims)
    stride = list(op.attribute("strides", [1] * dims))
    dilation = list(op.attribute("dilations", [1] * dims))
    more = list(op.attribute("output_padding", [0] * dims))
    groups = op.attribute("group", 1)
    if not isinstance(weight, Known) or not (bias is None or isinstance(bias, Known)):
        op.fail("its weight is computed when the file runs")
    wanted, auto = op.attribute("output_shape", None), op.attribute("auto_pad", "NOTSET")
    sides = stated_sides(op.attribute("pads", None), dims)
    if wanted is not None or auto in ("SAME_UPPER", "SAME_LOWER"):
        sides = []
        for i in range(dims):
            size = op.graph.size(x, i + 2)
            length = list(wanted)[-dims:][i] if wanted is not None else size * stride[i]
            total = stride[i] * (size - 1) + more[i] + dilation[i] * (kernel[i] - 1) + 1 - length
            if not isinstance(total, int):
                op.fail("its padding depends on the size of the input")
            if total < 0:
                more[i], total = more[i] - total, 0
            half = total // 2
            sides.append((total - half, half) if auto == "SAME_LOWER" or auto == "NOTSET" else (half, total - half))
    elif auto == "VALID":
        sides = [(0, 0)] * dims
    padding = tuple(min(pair) for pair in sides)
    crop = [(before - p, after - p) for (before, after), p in zip(sides, padding, strict=True)]
    kind: Any = TRANSPOSED_CONVOLUTIONS[dims - 1]
    module = kind(
        weight.array.shape[0], weight.array.shape[1] * groups, kernel, tuple(stride), padding, tuple(more), groups,
        bias is not None, tuple(dilation), **_on_meta(weight.array),
    )  # fmt: skip
    made = _layer(op, module, weight, weight.array, "same", bias, x)
    return cropped(op, made, crop)


@operator("Gemm")
def gemm(op: Operation) -> Activation:
    """Alpha A B + beta C, a linear layer where B is constant."""
    a, b, c = op.tensor(), op.input(1), op.input(2)
    alpha, beta = op.attribute("alpha", 1.0), op.attribute("beta", 1.0)
    if op.attribute("transA", 0):
        a = op.method("transpose", a, 0, 1)
    if isinstance(b, Known):
        weight = b.array if op.attribute("transB", 0) else b.array.T
        turned = "same" if op.attribute("transB", 0) else "transposed"
        if alpha != 1:
            weight, turned = (weight * weight.dtype.type(alpha)), f"{turned} times {alpha}"
        added = None
        if isinstance(c, Known) and (c.array.size in (1, weight.shape[0]) and c.array.shape[:-1] in ((), (1,))):
            array = np.broadcast_to(c.array.reshape(-1), weight.shape[:1]) * c.array.dtype.type(beta)
            added, c = Known(array, c.name), None
        made = _linear(op, b, weight, turned, added, a)
    else:
        second = op.tensor(1)
        made = op.call(torch.matmul, a, op.method("transpose", second, 0, 1) if op.attribute("transB", 0) else second)
        made = made if alpha == 1 else op.call(torch.mul, made, alpha)
    if c is None:
        return made
    third = op.tensor(2)
    result: Activation = op.call(torch.add, made, third if beta == 1 else op.call(torch.mul, third, beta))
    return result


@operator("MatMul")
def matmul(op: Operation) -> Activation:
    """A product; a linear layer where one factor is a constant matrix. A bias that is added behind it joins it."""
    left, right = op.input(0), op.input(1)
    if isinstance(right, Known) and not isinstance(left, Known):
        x, matrix = op.tensor(), right.array
        while matrix.ndim > 2 and matrix.shape[0] == 1 and matrix.ndim <= x.rank:
            matrix = matrix[0]
        if matrix.ndim == 2 and matrix.dtype.kind == "f":
            added, output = _added_later(op, matrix.shape[1], None)
            return _linear(op, right, matrix.T, "transposed", added, x, output)
    if isinstance(left, Known) and not isinstance(right, Known):
        x, matrix = op.tensor(1), left.array
        while matrix.ndim > 2 and matrix.shape[0] == 1 and matrix.ndim <= x.rank:
            matrix = matrix[0]
        if matrix.ndim == 2 and x.rank >= 2 and matrix.dtype.kind == "f":
            made = _linear(op, left, matrix, "same", None, op.method("transpose", x, -2, -1))
            turned: Activation = op.method("transpose", made, -2, -1)
            return turned
    result: Activation = op.call(torch.matmul, op.tensor(0), op.tensor(1))
    return result


@operator("Einsum")
def einsum(op: Operation) -> Activation:
    """As torch's."""
    operands = [op.tensor(i) for i in range(len(op.inputs))]
    result: Activation = op.call(torch.einsum, op.attribute("equation", ""), *operands)
    return result


@operator("BatchNormalization")
def batch_norm(op: Operation) -> Activation:
    """In inference; a file made for training is refused."""
    if op.attribute("training_mode", 0) or len([name for name in op.node.output if name]) > 1:
        op.fail("it is in training mode; export the model in eval mode")
    if not op.attribute("spatial", 1):
        op.fail("it has a mean for each position (spatial=0)")
    x = op.tensor()
    if not all(isinstance(value, Known) for value in op.inputs[1:5]):
        op.fail("its statistics are computed when the file runs")
    weight, bias, mean, var = (np.asarray(op.constant(i)) for i in range(1, 5))
    kind = _BATCH_NORMS.get(x.rank)
    if kind is None or mean.ndim != 1:
        op.fail(f"its input has {x.rank} dimensions, its mean {mean.ndim}")
    module = kind(len(mean), eps=op.attribute("epsilon", 1e-5), **_on_meta(mean))
    weights = _named(op, {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var})
    weights["num_batches_tracked"] = (np.array(0), f"{op.node.input[3]} counted", False)
    scale = op.inputs[1]
    assert isinstance(scale, Known)
    # torch's BatchNorm computes in the type of its input, whatever that of its statistics.
    result: Activation = op.graph.module(
        (op.type, *op.node.input[1:], op.attribute("epsilon", 1e-5), x.rank),
        layer_names(op.node, scale.name),
        module,
        weights,
        x,
    )
    return result


@operator("InstanceNormalization")
def instance_norm(op: Operation) -> Activation:
    """Each channel of each image by itself."""
    x, scale, bias = op.tensor(), op.input(1), op.input(2)
    eps = op.attribute("epsilon", 1e-5)
    kind = _INSTANCE_NORMS.get(x.rank)
    if kind is None or not isinstance(scale, Known) or not isinstance(bias, Known):
        result: Activation = op.call(F.instance_norm, x, weight=op.tensor(1), bias=op.tensor(2), eps=eps)
        return result
    module = kind(len(scale.array), eps=eps, affine=True, **_on_meta(scale.array))
    weights = _named(op, {"weight": scale.array, "bias": bias.array})
    result = op.graph.module(
        (op.type, *op.node.input[1:], eps, x.rank), layer_names(op.node, scale.name), module, weights, x
    )
    return result


@operator("LayerNormalization")
def layer_norm(op: Operation) -> Activation:
    """Over the last axes."""
    if any(op.node.output[1:]):
        op.fail("its mean and deviation are read; only its first output can be taken")
    x, scale, bias = op.tensor(), op.input(1), op.input(2)
    eps, axis = op.attribute("epsilon", 1e-5), x.axis(op.attribute("axis", -1))
    shape = [op.graph.size(x, i) for i in range(axis, x.rank)]
    if not all(isinstance(size, int) for size in shape):
        op.fail("it normalises over an axis whose size is open")
    known = isinstance(scale, Known) and (bias is None or isinstance(bias, Known))
    if known and isinstance(scale, Known) and scale.array.size == math.prod(shape):
        module = nn.LayerNorm(shape, eps=eps, bias=bias is not None, **_on_meta(scale.array))
        arrays = {"weight": scale.array.reshape(shape)}
        if isinstance(bias, Known):
            arrays["bias"] = np.broadcast_to(bias.array, shape)
        key = (op.type, *op.node.input[1:], eps, tuple(shape))
        result: Activation = op.graph.module(key, layer_names(op.node, scale.name), module, _named(op, arrays), x)
        return result
    result = op.call(F.layer_norm, x, shape, None, None, eps)
    result = op.call(torch.mul, result, op.tensor(1))
    return result if bias is None else op.call(torch.add, result, op.tensor(2))


@operator("GroupNormalization")
def group_norm(op: Operation) -> Activation:
    """Over groups of channels; up to operator set 20 with a scale for each group, then for each channel."""
    x, scale, bias = op.tensor(), op.input(1), op.input(2)
    groups, eps = op.attribute("num_groups", 1), op.attribute("epsilon", 1e-5)
    channels = op.graph.size(x, 1)
    if not isinstance(scale, Known) or not isinstance(bias, Known) or not isinstance(channels, int):
        op.fail("its scale and bias are computed when the file runs")
    arrays = {"weight": scale.array, "bias": bias.array}
    if op.opset < 21:
        arrays = {name: np.repeat(array, channels // groups) for name, array in arrays.items()}
    module = nn.GroupNorm(groups, channels, eps=eps, **_on_meta(scale.array))
    key = (op.type, *op.node.input[1:], eps, groups)
    result: Activation = op.graph.module(key, layer_names(op.node, scale.name), module, _named(op, arrays), x)
    return result


@operator("LRN")
def local_response_norm(op: Operation) -> Activation:
    """Over neighbouring channels; of an odd number of them."""
    size = op.attribute("size", 1)
    if size % 2 == 0:
        op.fail(f"a window of {size} channels is not symmetric; torch has it for odd numbers only")
    alpha, beta, k = op.attribute("alpha", 1e-4), op.attribute("beta", 0.75), op.attribute("bias", 1.0)
    result: Activation = op.call(F.local_response_norm, op.tensor(), size, alpha, beta, k)
    return result


@operator("LpNormalization")
def lp_normalize(op: Operation) -> Activation:
    """Divide by the norm along an axis."""
    x = op.tensor()
    result: Activation = op.call(F.normalize, x, float(op.attribute("p", 2)), x.axis(op.attribute("axis", -1)))
    return result


def _kernel(op: Operation, dims: int) -> tuple[int, ...]:
    value = op.input(1)
    if value is None:
        op.fail("it has no weight")
    shape = op.tensor(1).shape if not isinstance(value, Known) else value.array.shape
    if len(shape) != dims + 2:
        op.fail(f"its weight has {len(shape)} dimensions and its input {dims + 2}")
    return tuple(shape[2:])


def _sides(op: Operation, x: Activation, kernel: Any, stride: Any, dilation: Any) -> Sides:
    auto = op.attribute("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        return same_sides(op, x, kernel, stride, dilation, lower=auto == "SAME_LOWER")
    return stated_sides(op.attribute("pads", None) if auto == "NOTSET" else None, len(kernel))


def _added_later(op: Operation, channels: int, rank: int | None) -> tuple[Known | None, str | None]:
    """A constant that the next node adds to each output channel, and that node's output; it is built then.

    Args:
        op: a layer without a bias.
        channels: of its output.
        rank: of its output, whose channels are on axis 1; None if they are on the last axis.
    """
    output = op.node.output[0]
    later = op.later(output)
    if op.readers(output) != 1 or len(later) != 1 or later[0].op_type != "Add" or later[0].attribute:
        return None, None
    other = next((name for name in later[0].input if name != output), "")
    added = op.known(other)
    if added is None or added.array.size != channels or added.array.dtype.kind != "f":
        return None, None
    shape = added.array.shape
    wanted = (channels,) if rank is None else (channels, *[1] * (rank - 2))
    fits = shape == wanted or (
        shape[-len(wanted) :] == wanted and set(shape[: -len(wanted)]) <= {1} and len(shape) <= (rank or 2)
    )
    if not fits:
        return None, None
    return Known(added.array.reshape(-1), added.name, added.stored), later[0].output[0]


def _linear(
    op: Operation,
    weight: Known,
    array: Array,
    turned: str,
    bias: Known | None,
    x: Activation,
    output: str | None = None,
) -> Activation:
    module = nn.Linear(array.shape[1], array.shape[0], bias=bias is not None, **_on_meta(array))
    return _layer(op, module, weight, array, turned, bias, x, output)


def _layer(
    op: Operation,
    module: nn.Module,
    weight: Known,
    array: Array,
    turned: str,
    bias: Known | None,
    x: Activation,
    output: str | None = None,
) -> Activation:
    """Call a layer; one that another node has made with the same weight and settings is called again."""
    weights = {"weight": (array, f"{weight.name} {turned}", True)}
    if bias is not None:
        weights["bias"] = (bias.array, f"{op.node.output[0]} bias", True)
    settings = repr(module)
    same_bias = None if bias is None else bias.array.tobytes()
    key = (settings, weight.name, weight.array.shape, turned, same_bias)
    names = layer_names(op.node, weight.name, "" if bias is None else bias.name)
    made: Activation = op.graph.module(key, names, module, weights, x)
    if output is not None:
        op.skipped[output] = made
    return made


def _named(op: Operation, arrays: dict[str, Array]) -> dict[str, tuple[Array, str, bool]]:
    source = op.node.output[0]
    return {name: (array, f"{source} {name}", not name.startswith("running_")) for name, array in arrays.items()}


def _on_meta(array: Array) -> dict[str, Any]:
    return {"device": "meta", "dtype": torch_dtype(array.dtype)}
