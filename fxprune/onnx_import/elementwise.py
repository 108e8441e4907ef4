"""Arithmetic, comparisons and activations: what is done to each number by itself."""

from __future__ import annotations

import operator as operators
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from onnx import helper
from torch import nn

from fxprune.onnx_import.batch import expanded
from fxprune.onnx_import.graph import torch_dtype
from fxprune.onnx_import.names import layer_names
from fxprune.onnx_import.table import MICROSOFT, Operation, operator
from fxprune.onnx_import.values import Activation, Known

_UNARY: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh, "Atan": torch.atan,
    "Atanh": torch.atanh, "BitwiseNot": torch.bitwise_not, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh,
    "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "HardSwish": F.hardswish, "IsNaN": torch.isnan,
    "Log": torch.log, "Mish": F.mish, "Neg": torch.neg, "Not": torch.logical_not, "Reciprocal": torch.reciprocal,
    "Relu": F.relu, "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin,
    "Sinh": torch.sinh, "Softsign": F.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
}  # fmt: skip
_BINARY: dict[str, Callable[..., Any]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "And": torch.logical_and, "Or": torch.logical_or,
    "Xor": torch.logical_xor, "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Less": torch.lt,
    "LessOrEqual": torch.le, "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor,
}  # fmt: skip
_REVERSED: dict[str, Callable[..., Any]] = {
    "Sub": operators.sub, "Greater": operators.gt, "GreaterOrEqual": operators.ge, "Less": operators.lt,
    "LessOrEqual": operators.le,
}  # fmt: skip
_LARGEST: dict[str, Callable[..., Any]] = {"Max": torch.maximum, "Min": torch.minimum, "Sum": torch.add}


@operator(*_UNARY)
def unary(op: Operation) -> Activation:
    """One function of torch's for each."""
    x = op.tensor()
    if not x.probes[0].is_floating_point() and op.type in ("Ceil", "Floor", "Round"):
        return x
    return _called(op, _UNARY[op.type], x)


@operator(*_BINARY)
def binary(op: Operation) -> Activation:
    """A single constant stands in the call as a number."""
    first, second = _operands(op)
    if isinstance(first, Activation):
        return _called(op, _BINARY[op.type], first, second)
    if op.type in ("Add", "Mul", "Equal"):
        return _called(op, _BINARY[op.type], second, first)
    # torch's functions take a tensor first; Python's operators take a number there too.
    found = _REVERSED.get(op.type)
    return _called(op, _BINARY[op.type], op.tensor(0), second) if found is None else _called(op, found, first, second)


@operator("Div")
def div(op: Operation) -> Activation:
    """Of whole numbers without the rest."""
    a, b = _operands(op)
    like = a if isinstance(a, Activation) else b
    if like.probes[0].is_floating_point():
        return _called(op, torch.div if like is a else operators.truediv, a, b)
    result: Activation = op.call(torch.div, op.tensor(0), b, rounding_mode="trunc")
    return result


@operator("Mod")
def mod(op: Operation) -> Activation:
    """With the sign of the divisor, or with `fmod` of the dividend."""
    return _called(op, torch.fmod if op.attribute("fmod", 0) else torch.remainder, op.tensor(0), _operands(op)[1])


@operator("Pow")
def power(op: Operation) -> Activation:
    """In the type of the base."""
    x = op.tensor()
    exponent = op.scalar(1)
    if exponent is not None:
        made = _called(op, torch.pow, x, exponent)
    else:
        made = _called(op, torch.pow, x, op.tensor(1))
    dtype = x.probes[0].dtype
    return made if made.probes[0].dtype == dtype else op.method("to", made, dtype)


@operator(*_LARGEST, "Mean")
def variadic(op: Operation) -> Activation:
    """Of any number of tensors."""
    result = op.tensor(0)
    for i in range(1, len(op.inputs)):
        result = _called(op, _LARGEST.get(op.type, torch.add), result, op.tensor(i))
    return op.call(torch.div, result, len(op.inputs)) if op.type == "Mean" and len(op.inputs) > 1 else result


@operator("Where")
def where(op: Operation) -> Activation:
    """As torch's."""
    return _called(op, torch.where, op.tensor(0), op.tensor(1), op.tensor(2))


@operator("IsInf")
def is_inf(op: Operation) -> Activation:
    """Of both signs, or one."""
    x = op.tensor()
    both = op.attribute("detect_positive", 1) and op.attribute("detect_negative", 1)
    if both:
        return _called(op, torch.isinf, x)
    sign = "inf" if op.attribute("detect_positive", 1) else "-inf"
    return _called(op, torch.eq, x, float(sign))


@operator("Identity", "Dropout")
def identity(op: Operation) -> Any:
    """The input itself; dropout does nothing in inference."""
    if op.type == "Dropout" and len(op.node.output) > 1 and op.readers(op.node.output[1]):
        op.fail("its mask is read; only the values can be taken")
    return [op.inputs[0], *[None] * (len(op.node.output) - 1)]


@operator("Cast", "CastLike")
def cast(op: Operation) -> Activation:
    """To another number type."""
    x = op.tensor()
    if op.type == "CastLike":
        dtype = op.tensor(1).probes[0].dtype
    else:
        dtype = torch_dtype(helper.tensor_dtype_to_np_dtype(op.attribute("to", 1)).name)
    return x if x.probes[0].dtype == dtype else op.method("to", x, dtype)


@operator("Clip")
def clip(op: Operation) -> Activation:
    """Bounds are attributes in old operator sets; ReLU and ReLU6 where they are these."""
    x = op.tensor()
    bounds = [op.attributes.get(name) for name in ("min", "max")]
    for i, position in enumerate((1, 2)):
        if op.input(position) is not None:
            bounds[i] = op.scalar(position) if op.scalar(position) is not None else _single(op, position)
    low, high = bounds
    if x.probes[0].is_floating_point():
        low = None if isinstance(low, float) and low <= -3.4e38 else low
        high = None if isinstance(high, float) and high >= 3.4e38 else high
    if isinstance(low, float) and low == 0 and high is None:
        return _called(op, F.relu, x)
    if isinstance(low, float) and low == 0 and high == 6:
        return _called(op, F.relu6, x)
    return x if low is None and high is None else _called(op, torch.clamp, x, low, high)


def _single(op: Operation, position: int) -> Any:
    array = op.constant(position)
    return None if array is None or not array.size else array.reshape(-1)[0].item()


@operator("LeakyRelu")
def leaky_relu(op: Operation) -> Activation:
    """Slope `alpha` below zero."""
    return _called(op, F.leaky_relu, op.tensor(), op.attribute("alpha", 0.01))


@operator("Elu", "Celu", "Selu", "ThresholdedRelu", "Shrink")
def bent(op: Operation) -> Activation:
    """Units with one or two settings."""
    x = op.tensor()
    if op.type == "Elu":
        return _called(op, F.elu, x, op.attribute("alpha", 1.0))
    if op.type == "Celu":
        return _called(op, F.celu, x, op.attribute("alpha", 1.0))
    if op.type == "ThresholdedRelu":
        return _called(op, F.threshold, x, op.attribute("alpha", 1.0), 0.0)
    if op.type == "Shrink":
        lambd, bias = op.attribute("lambd", 0.5), op.attribute("bias", 0.0)
        if bias not in (0.0, lambd):
            op.fail(f"a bias of {bias} with a lambd of {lambd} is neither hard nor soft shrinkage")
        return _called(op, F.softshrink if bias else F.hardshrink, x, lambd)
    alpha, gamma = op.attribute("alpha", 1.6732632423543772), op.attribute("gamma", 1.0507009873554805)
    if abs(alpha - 1.6732632) < 1e-5 and abs(gamma - 1.050701) < 1e-5:
        return _called(op, F.selu, x)
    return _called(op, torch.mul, _called(op, F.elu, x, alpha), gamma)


@operator("HardSigmoid")
def hard_sigmoid(op: Operation) -> Activation:
    """clamp(alpha x + beta, 0, 1); torch's own for 1/6 and 1/2."""
    x = op.tensor()
    alpha, beta = op.attribute("alpha", 0.2), op.attribute("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return _called(op, F.hardsigmoid, x)
    return _called(op, torch.clamp, _called(op, torch.add, _called(op, torch.mul, x, alpha), beta), 0.0, 1.0)


@operator("Softplus")
def softplus(op: Operation) -> Activation:
    """log(1 + exp x)."""
    return _called(op, F.softplus, op.tensor())


@operator("Gelu")
@operator("Gelu", domain=MICROSOFT)
def gelu(op: Operation) -> Activation:
    """Exact, or with tanh."""
    x, kind = op.tensor(), op.attribute("approximate", "none")
    result: Activation = op.call(F.gelu, x, approximate=kind) if kind != "none" else op.call(F.gelu, x)
    return result


@operator("PRelu")
def prelu(op: Operation) -> Activation:
    """A module where there is one slope, or one for each channel."""
    x, slope = op.tensor(), op.input(1)
    if isinstance(slope, Known) and slope.array.dtype.kind == "f":
        array = slope.array
        channels = x.shape[1] if x.rank > 1 else 1
        by_channel = array.shape[-(x.rank - 1) :] == (channels, *[1] * (x.rank - 2)) and array.size == channels
        if array.size == 1 or (by_channel and x.rank > 1):
            flat = array.reshape(-1)
            module = nn.PReLU(len(flat), device="meta", dtype=torch_dtype(flat.dtype))
            weights = {"weight": (flat, slope.name, True)}
            key = (op.type, slope.name, flat.shape)
            result: Activation = op.graph.module(key, layer_names(op.node, slope.name), module, weights, x)
            return result
    below = op.call(torch.mul, op.call(torch.clamp, x, None, 0.0), op.tensor(1))
    result = op.call(torch.add, op.call(F.relu, x), below)
    return result


@operator("Softmax", "LogSoftmax", "Hardmax")
def softmax(op: Operation) -> Activation:
    """Along an axis; up to operator set 12 over all numbers from an axis on."""
    x = op.tensor()
    axis = x.axis(op.attribute("axis", 1 if op.opset < 13 else -1))
    function = {"Softmax": torch.softmax, "LogSoftmax": torch.log_softmax}.get(op.type)
    if function is None:
        op.fail("torch has no such function")
    behind = [op.graph.size(x, i) for i in range(axis + 1, x.rank)]
    if op.opset >= 13 or all(isinstance(size, int) and size == 1 for size in behind):
        return _called(op, function, x, axis)
    flat = _called(op, function, op.call(torch.flatten, x, axis), axis)
    sizes = [op.graph.size(x, i) for i in range(axis, x.rank)]
    result: Activation = op.method("unflatten", flat, axis, sizes)
    return result


def _operands(op: Operation) -> tuple[Any, Any]:
    """Both inputs, a constant that is a single number as such."""
    if "axis" in op.attributes and op.attribute("broadcast", 0):
        return _aligned(op)
    a, b = op.scalar(0), op.scalar(1)
    is_tensor = [value is None for value in (a, b)]
    if not any(is_tensor):
        is_tensor[0] = True
    first, second = (op.tensor(i) if is_tensor[i] else (a, b)[i] for i in (0, 1))
    if isinstance(first, Activation) and isinstance(second, Activation):
        first, second = _as_many(op, first, second), _as_many(op, second, first)
    return _dimensions_kept(op, 0, first, second), _dimensions_kept(op, 1, second, first)


def _aligned(op: Operation) -> tuple[Activation, Activation]:
    """Both inputs where, before operator set 7, an attribute says which axis the second one begins at."""
    first, second = op.tensor(0), op.tensor(1)
    for _ in range(first.rank - first.axis(op.attribute("axis", 0)) - second.rank):
        second = op.call(torch.unsqueeze, second, -1)
    return first, second


def _as_many(op: Operation, x: Activation, other: Activation) -> Activation:
    """A constant made for several images, as often as there are images."""
    value = next((v for v in op.inputs if isinstance(v, Known) and op.graph.tensor(v) is x), None)
    if value is None or op.graph.batch == 1 or x.rank != other.rank:
        return x
    return expanded(op.graph, value, [other], -1)


def _dimensions_kept(op: Operation, position: int, x: Any, other: Any) -> Any:
    """A number as the tensor it is, where it has more dimensions than what it is combined with."""
    value = op.input(position)
    if isinstance(x, Activation) or not isinstance(other, Activation) or not isinstance(value, Known):
        return x
    return op.tensor(position) if value.array.ndim > other.rank else x


def _called(op: Operation, function: Callable[..., Any], *args: Any) -> Activation:
    result: Activation = op.call(function, *args)
    return result
