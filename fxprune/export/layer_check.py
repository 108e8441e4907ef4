"""Compares every layer's weight in an ONNX file with the model's, and checks its sparsity pattern there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fxprune.errors import ValidationError
from fxprune.export.model_layers import ModelLayer
from fxprune.export.onnx_report import LayerCheck
from fxprune.export.weight_uses import WeightUse
from fxprune.layers.deployment import assess_deployment
from fxprune.pattern import NMPattern, Pattern

TRANSPOSED = "_transposed"  # what the exporter's folded Linear weights are called: fc.weight_transposed
FOLDED = "BatchNorm folded in by the exporter"
UNREAD = "not in the file: nothing reads what it gives"
CONSTANT = "not in the file: what it gives does not depend on the images, and was computed at the export"
STALE = (
    "The model's own weight breaks it too, so it was changed after fxprune.compile: put its zeros back with "
    "fxprune.restore_zeros(compiled) and export it again"
)
# Share of a weight's norm within which a weight found by its values alone counts as the layer's.
_LIKENESS = 0.5
_SHOWN = 5


def check_layers(
    layers: list[ModelLayer],
    uses: tuple[WeightUse, ...],
    path: Path,
    dtype: str,
    why_absent: Callable[[str], str] = lambda name: "",
) -> tuple[LayerCheck, ...]:
    """Find every layer in the file and compare it.

    Args:
        layers: from `model_layers`.
        uses: weights that the file's nodes read.
        path: the file, for messages.
        dtype: number type of the file's weights.
        why_absent: why the file need not hold a layer, such as UNREAD, or ""; asked for layers that it does not hold.

    Raises:
        ValidationError: names every layer that is missing, has another weight, or breaks its pattern.
    """
    checks: list[LayerCheck] = []
    problems: list[str] = []
    foreign = 0
    for layer in layers:
        found = find_uses(layer, uses)
        if all(_compare(layer, use)[1] for use in found) and (note := why_absent(layer.name)):
            checks.append(_absent(layer, note))
            continue
        if not found:
            foreign += 1
            problems.append(
                f"layer {layer.name!r}: no node of the file reads a weight of shape {_x(layer.weight)} like its own"
            )
        for use in found:
            note, problem = _compare(layer, use)
            foreign += bool(problem)
            if broken := _broken_pattern(layer, use):
                problem = f"{broken}. {problem or STALE}"
            if problem:
                problems.append(
                    f"layer {layer.name!r} ({use.op} {use.node!r}, initializer {use.initializer!r}): {problem}"
                )
            checks.append(_layer_check(layer, use, note, dtype))
    if problems:
        shown = "\n  ".join(problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        advice = "export the model again; something changed the file after its export"
        if foreign > max(1, len(layers) // 2):
            count = f"{foreign} of {len(layers)} layers are not the model's"
            advice = f"{count}: this is the file of another model or another run, give the one that belongs to it"
        raise ValidationError(f"{path} does not hold the model's weights:\n  {shown}{more}\nWhat to do: {advice}.")
    return tuple(checks)


def find_uses(layer: ModelLayer, uses: tuple[WeightUse, ...]) -> list[WeightUse]:
    """The distinct tensors of the file that are this layer's weight: by name, else equal, else the one most alike.

    The exporter transposes the weight of a Linear on (N, ..., C) inputs, merges equal tensors under one name, and other
    exporters rename freely; a file therefore need not have the parameter's name.
    """
    names = {f"{name}{suffix}" for name in layer.parameters for suffix in ("", TRANSPOSED)}
    found = [use for use in uses if use.initializer in names]
    alike = [] if found else [use for use in uses if use.weight.shape == layer.weight.shape]
    found = found or [use for use in alike if _equal(use.weight, layer.weight)]
    if not found and alike:
        distance = [_distance(use.weight, layer.weight) for use in alike]
        nearest = min(range(len(alike)), key=distance.__getitem__)
        found = [alike[nearest]] if distance[nearest] < _LIKENESS else []
    return list({use.initializer: use for use in found}.values())


def _equal(found: Tensor, wanted: Tensor) -> bool:
    """Equal after rounding to the file's number type."""
    return found.shape == wanted.shape and torch.equal(found, wanted.to(found.dtype))


def _distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def _compare(layer: ModelLayer, use: WeightUse) -> tuple[str, str]:
    """(note, problem): whether the file's weight is the model's, exactly or with a factor for each output channel."""
    if _equal(use.weight, layer.weight):
        return "", ""
    wanted, found = layer.weight.double(), use.weight.double()
    if wanted.shape != found.shape:
        swapped = wanted.dim() >= 2 and found.shape == wanted.transpose(0, 1).shape
        hint = ": its first two axes are swapped" if swapped else ""
        return "", f"it is {_x(found)} as the node reads it, the model's is {_x(wanted)}{hint}"
    rounding = {"float16": 2**-10, "bfloat16": 2**-7}.get(use.dtype, 2**-22)
    smallest = 2**-24 if use.dtype == "float16" else 0.0  # float16's subnormals are this far apart
    if _close(found, wanted, rounding, smallest):
        return "", ""
    channel = 1 if use.op == "ConvTranspose" else 0
    by_channel = [t.movedim(channel, 0).flatten(1) for t in (wanted, found)]
    factor = (by_channel[0] * by_channel[1]).sum(1) / by_channel[0].square().sum(1).clamp_min(1e-30)
    if _close(by_channel[1], by_channel[0] * factor[:, None], 16 * rounding, smallest):
        return FOLDED, ""
    if wanted.shape[0] == wanted.shape[1] and _close(found.transpose(0, 1), wanted, rounding, smallest):
        return "", "its first two axes are swapped"
    if (
        wanted.dim() == 4
        and wanted.shape[2] == wanted.shape[3]
        and _close(found.transpose(2, 3), wanted, rounding, smallest)
    ):
        return "", "its kernel axes are swapped"
    differing = (found - wanted).abs() > rounding * wanted.abs().clamp_min(smallest)
    count = int(differing.sum())
    first = tuple(differing.nonzero()[0].tolist()) if count else (0,) * wanted.dim()
    return "", (
        f"{count} of {wanted.numel()} weights are not the model's; the first, at {first}, is {float(found[first]):.6g} "
        f"in the file and {float(wanted[first]) + 0.0:.6g} in the model"
    )


def _close(found: Tensor, wanted: Tensor, rounding: float, smallest: float) -> bool:
    """Equal up to rounding, and zero exactly where wanted (a number too small for the file's type may become zero)."""
    kept_zeros = bool((found[wanted == 0] == 0).all())
    return kept_zeros and bool(((found - wanted).abs() <= rounding * wanted.abs() + smallest).all())


def _broken_pattern(layer: ModelLayer, use: WeightUse) -> str:
    """What is wrong with the pattern in the file, "" if nothing."""
    if not layer.pattern:
        return ""
    pattern = Pattern.parse(layer.pattern)
    weight = use.reduction_first
    if isinstance(pattern, NMPattern) and weight.shape[1] % pattern.m:
        return f"pattern {pattern} does not fit the {weight.shape[1]} numbers along axis {use.axis}"
    check = pattern.check(weight)
    if check.ok:
        return ""
    if not isinstance(pattern, NMPattern):
        return f"{check.sparsity:.2%} of its weights are zero, fewer than pattern {pattern} asks for"
    broken = f"{check.violations} of {check.units} groups of {pattern.m} along axis {use.axis}"
    where = f"pattern {pattern} is broken in {broken}"
    if holds(pattern, weight.transpose(0, 1)):
        return f"{where}, and holds along the output channels instead: the axes are swapped"
    groups = (weight != 0).movedim(1, -1).unflatten(-1, (-1, pattern.m)).sum(-1)
    first = [int(i) for i in (groups > pattern.n).nonzero()[0]]
    kernel = f", kernel position {tuple(first[1:-1])}" if len(first) > 2 else ""
    start = first[-1] * pattern.m
    nonzero = int(groups[tuple(first)])
    return (
        f"{where}; the first: output channel {first[0]}{kernel}, input channels {start} to {start + pattern.m - 1} "
        f"hold {nonzero} non-zeros"
    )


def holds(pattern: NMPattern, weight: Tensor) -> bool:
    """Whether the pattern fits a weight (R, C, ...) and holds along C."""
    return weight.shape[1] % pattern.m == 0 and pattern.check(weight).ok


def _x(weight: Tensor) -> str:
    return "x".join(map(str, weight.shape))


def _absent(layer: ModelLayer, note: str) -> LayerCheck:
    """A layer that the file does not hold, and rightly."""
    return LayerCheck(
        name=layer.name,
        initializer="",
        op=layer.op,
        shape=tuple(layer.weight.shape),
        axis=None,
        pattern="",
        ok=None,
        sparsity=1 - int(torch.count_nonzero(layer.weight)) / max(layer.weight.numel(), 1),
        verdict="",
        note=note,
    )


def _layer_check(layer: ModelLayer, use: WeightUse, note: str, dtype: str) -> LayerCheck:
    advice = assess_deployment(use.reduction_first, op=use.op, groups=use.groups)
    notes = [note] if note else []
    if use.dtype != dtype:
        notes.append(f"stored as {use.dtype}")
    if use.dtype == "float16" and (lost := int(torch.count_nonzero(layer.weight) - torch.count_nonzero(use.weight))):
        notes.append(f"{lost} weights too small for float16 became zero")
    return LayerCheck(
        name=layer.name,
        initializer=use.initializer,
        op=use.op,
        shape=use.stored_shape,
        axis=use.axis,
        pattern=layer.pattern,
        ok=True if layer.pattern else None,
        sparsity=use.sparsity,
        verdict=advice.verdict,
        explanation=advice.explanation,
        note="; ".join(notes),
    )
