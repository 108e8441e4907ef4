"""Where a sparse weight can run faster, and where it cannot: rules of the inference engines, as pure functions.

Sources: NVIDIA's TensorRT guide, section "Structured sparsity" (weights of a convolution [K, C, R, S]: C a multiple of
4, and at least two zeros in every four consecutive input channels at each (k, r, s); matrix products likewise along the
reduction axis); the shape tables of `torch.sparse.semi_structured`; TensorRT issues 3849 and 4065, where its developers
say that sparse convolutions win with 256 and more input and output channels. onnxruntime's CPU provider makes sparse
weights dense when it loads a file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.pattern import NMPattern

# Fewest input and output channels at which TensorRT's developers saw sparse kernels win.
GAIN_CHANNELS = 256
# A weight with a smaller share of zeros is called dense.
_FEW_ZEROS = 0.25
# (rows, columns) that torch's kernels need as a unit, for float16 and bfloat16 weights.
SEMI_STRUCTURED_UNITS = {"cuSPARSELt": (16, 16), "CUTLASS": (32, 64)}
CPU_NOTE = (
    "On onnxruntime's CPU provider N:M zeros bring no speed-up, because it has no sparse kernels; smaller dense "
    "layers, as fxprune.low_rank makes them, can."
)

POSSIBLE = "2:4, gain possible"
SMALL = "2:4, small: gain unlikely"
GROUPED = "2:4, grouped: gain unlikely"
SLOW_TYPE = "2:4, {}: gain unlikely"
NO_KERNEL = "not 2:4: no speed-up"
DENSE = "dense"
# What each verdict means, for the foot of a table.
LEGEND = {
    POSSIBLE: "TensorRT (Ampere or later, sparse weights enabled, fp16 or int8) times sparse and dense kernels.",
    SMALL: f"TensorRT accepts it, but sparse kernels rarely win below {GAIN_CHANNELS} input and output channels.",
    GROUPED: "TensorRT accepts it, but a grouped convolution rarely has enough channels for a sparse kernel to win.",
    NO_KERNEL: "it has zeros, but no common engine has kernels for them; they only make the compressed file smaller.",
}


@dataclass(frozen=True)
class Rule:
    """Whether one engine can take a weight as 2:4 sparse, and the reason either way."""

    ok: bool
    reason: str


@dataclass(frozen=True)
class Deployment:
    """What to expect of one layer.

    Attributes:
        verdict: a few words, for a table.
        explanation: the whole reasoning in sentences.
        gain: "possible", "unlikely" or "none"; never a promise, since an engine times its kernels and picks one.
        tensorrt: TensorRT's 2:4 rule.
        torch: the rule of torch's `to_sparse_semi_structured`.
    """

    verdict: str
    explanation: str
    gain: str
    tensorrt: Rule
    torch: Rule


def tensorrt_2to4(weight: Tensor | Sequence[int], *, op: str = "Conv2d") -> Rule:
    """TensorRT's rule for sparse weights.

    Args:
        weight: (R, C/G, *kernel) or (R, C), the reduction axis second; a bare shape checks the shape only.
        op: torch's or ONNX's name of the operation.
    """
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else tuple(weight)
    if "Transpose" in op:
        return Rule(False, "TensorRT's 2:4 rule is for convolutions and matrix products, not transposed convolutions")
    if len(shape) > 4:
        return Rule(False, "TensorRT states its 2:4 rule for 2-D convolutions only")
    if shape[1] == 1:
        return Rule(False, "one input channel (a depthwise convolution has one per group), so there are no groups of 4")
    if shape[1] % 4:
        return Rule(False, f"{shape[1]} input channels are not a multiple of 4")
    if not isinstance(weight, Tensor):
        return Rule(True, f"{shape[1]} input channels are a multiple of 4")
    check = NMPattern(2, 4).check(weight)
    if not check.ok:
        return Rule(False, f"{check.violations} of {check.units} groups of 4 input channels hold fewer than 2 zeros")
    return Rule(True, f"all {check.units} groups of 4 input channels hold at least 2 zeros")


def torch_semi_structured(
    weight: Tensor | Sequence[int], *, op: str = "Conv2d", dtype: torch.dtype = torch.float16
) -> Rule:
    """The rule of `torch.sparse.to_sparse_semi_structured` (CUDA, compute capability 8.0 or later).

    A 1x1 convolution counts as the matrix product that it is. Arguments as for `tensorrt_2to4`.
    """
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else tuple(weight)
    if dtype not in (torch.float16, torch.bfloat16):
        return Rule(False, f"torch's 2:4 kernels take float16 and bfloat16, not {str(dtype).removeprefix('torch.')}")
    if "Transpose" in op or math.prod(shape[2:]) != 1:
        return Rule(False, "torch's 2:4 kernels take Linear layers and 1x1 convolutions only")
    fits = [
        name
        for name, (rows, columns) in SEMI_STRUCTURED_UNITS.items()
        if not shape[0] % rows and not shape[1] % columns
    ]
    if not fits:
        units = " or ".join(f"{rows}x{columns} ({name})" for name, (rows, columns) in SEMI_STRUCTURED_UNITS.items())
        return Rule(False, f"its shape {shape[0]}x{shape[1]} is no multiple of {units}")
    if isinstance(weight, Tensor) and not NMPattern(2, 4).check(weight).ok:
        return Rule(False, "its weight is not 2:4 sparse")
    return Rule(True, f"its shape {shape[0]}x{shape[1]} fits {' and '.join(fits)}")


def assess_deployment(weight: Tensor, *, op: str = "Conv2d", groups: int = 1, precision: str = "fp16") -> Deployment:
    """What a layer's zeros are worth where it runs.

    Args:
        weight: (R, C/G, *kernel) or (R, C), any floating or integer dtype, any device.
        op: torch's or ONNX's name of the operation ("Conv2d", "Linear", "Conv", "Gemm", ...).
        groups: G of a convolution.
        precision: of the engine: "fp32", "fp16", "bf16" or "int8".
    """
    trt = tensorrt_2to4(weight, op=op)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}.get(precision, torch.float32)
    semi = torch_semi_structured(weight, op=op, dtype=dtype)
    if not trt.ok:
        sparsity = 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)
        verdict = DENSE if sparsity < _FEW_ZEROS else NO_KERNEL
        text = f"TensorRT cannot use 2:4 kernels: {trt.reason}. {_torch_note(semi)} {CPU_NOTE}"
        return Deployment(verdict, text, "none", trt, semi)
    verdict, against = _gain(tuple(weight.shape), groups, precision)
    chance = (
        f"A gain is unlikely: {against}."
        if against
        else "A gain is possible, not certain: TensorRT (Ampere or later, built with sparse weights enabled) times its "
        "sparse and dense kernels and picks the faster one."
    )
    text = f"TensorRT can use 2:4 kernels: {trt.reason}. {chance} {_torch_note(semi)} {CPU_NOTE}"
    return Deployment(verdict, text, "unlikely" if against else "possible", trt, semi)


def _gain(shape: tuple[int, ...], groups: int, precision: str) -> tuple[str, str]:
    """(verdict, what speaks against a gain at this size) of a weight that TensorRT can take."""
    if precision not in ("fp16", "bf16", "int8"):
        return SLOW_TYPE.format(precision), f"sparse kernels pay in fp16 and int8, not in {precision}"
    if groups > 1:
        return GROUPED, f"it is split into {groups} groups of {shape[1]} input channels"
    if min(shape[:2]) < GAIN_CHANNELS:
        few = f"it maps {shape[1]} to {shape[0]} channels"
        return SMALL, f"{few}, and sparse kernels were seen to win from about {GAIN_CHANNELS} on both sides"
    return POSSIBLE, ""


def _torch_note(rule: Rule) -> str:
    if rule.ok:
        return f"torch's to_sparse_semi_structured can take it: {rule.reason}; measure before relying on it."
    return f"torch's to_sparse_semi_structured does not take it: {rule.reason}."
