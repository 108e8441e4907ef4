"""Looks into any ONNX file, ours or not: which weights are sparse, in which N:M pattern, along which axis."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch import Tensor

from fxprune.export.onnx_file import FileSize, measure_size, read_onnx
from fxprune.export.onnx_report import axis_name, common_verdict, size_line, verdict_legend
from fxprune.export.weight_uses import WeightUse, distinct_weights, graph_weights
from fxprune.layers.deployment import assess_deployment
from fxprune.pattern import NMPattern
from fxprune.tables import Column, as_text, table, terminal_width

COLUMNS = (
    Column("weight"),
    Column("op", leaves=3),
    Column("shape", leaves=4),
    Column("type", leaves=2),
    Column("axis", right=True, leaves=1),
    Column("zeros", right=True),
    Column("N:M"),
)
PATTERNS = tuple(NMPattern(n, m) for m in (2, 4, 8, 16) for n in (1, 2, 3, 4, 8) if n < m)


@dataclass(frozen=True)
class InspectedLayer:
    """One stored weight and the operation that reads it.

    Attributes:
        node: name of the node.
        op: its operation, such as "Conv".
        initializer: name of the tensor.
        shape: its shape in the file.
        dtype: its number type.
        groups: of a convolution.
        axis: the axis that the operation sums over; None if the weight is reshaped on the way.
        sparsity: share of zeros.
        patterns: N:M patterns that hold along the input channels (`axis`), which engines can use; the strictest ones:
            1:4 implies 2:4.
        other_patterns: as "2:4 along output channels": those that hold only along the output channels, or only in
            storage order (C, kh, kw), which engines cannot use.
        verdict: deployment verdict in a few words.
        explanation: the reasoning behind it.
        dead_outputs: output channels of which all weights are zero.
    """

    node: str
    op: str
    initializer: str
    shape: tuple[int, ...]
    dtype: str
    groups: int
    axis: int | None
    sparsity: float
    patterns: tuple[str, ...]
    other_patterns: tuple[str, ...]
    verdict: str
    explanation: str
    dead_outputs: int = 0


@dataclass(frozen=True)
class Inspection:
    """What an ONNX file holds.

    Attributes:
        path: the file.
        opset: version of its operator set.
        inputs: its inputs as "name: dtype (sizes)".
        outputs: likewise.
        metadata: its metadata_props.
        layers: one per weight and operation that reads it, in graph order.
        size: bytes and zeros.
        sparse_initializers: names of the tensors stored sparsely.
        computed: convolutions whose weight is not stored but computed, as "op node".
        others: further stored tensors of two or more dimensions, as (name, shape): embeddings, recurrent weights, ...
        complaint: what onnx.checker says against the file, "" if nothing.
        unreadable: damaged tensors, and weights that do not fit their nodes, each as "name: what is wrong".
    """

    path: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    metadata: dict[str, str]
    layers: tuple[InspectedLayer, ...]
    size: FileSize
    sparse_initializers: tuple[str, ...]
    computed: tuple[str, ...]
    others: tuple[tuple[str, tuple[int, ...]], ...]
    complaint: str = ""
    unreadable: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Share of zeros among all weights."""
        return self.size.sparsity

    def __getitem__(self, initializer: str) -> InspectedLayer:
        """The first layer that reads the tensor called `initializer`."""
        for layer in self.layers:
            if layer.initializer == initializer:
                return layer
        raise KeyError(f"no layer reads {initializer!r}; there are: {', '.join(x.initializer for x in self.layers)}")

    def __str__(self) -> str:
        return self.render()

    def render(self, *, width: int | None = None, color: bool = False) -> str:
        """The table as text of at most `width` columns (None: the terminal's), with ANSI colours if asked for."""
        width = terminal_width() if width is None else width
        once = common_verdict([layer.verdict for layer in self.layers])
        rows = []
        for layer in self.layers:
            held = Text(", ".join(layer.patterns), style="green")
            if layer.other_patterns:
                held.append(("; " if layer.patterns else "") + "; ".join(layer.other_patterns), style="yellow")
            shape = "x".join(map(str, layer.shape))
            axis, zeros = axis_name(layer.axis), f"{layer.sparsity:.1%}"
            rows.append((layer.initializer, layer.op, shape, layer.dtype, axis, zeros, held))
        verdicts = ["" if layer.verdict == once else layer.verdict for layer in self.layers]
        title = f"{Path(self.path).name}: ONNX opset {self.opset}"
        drawn = table(COLUMNS, rows, verdicts, width=width, title=title, note_heading="verdict")
        return as_text(drawn, "\n" + self.summary, width=width, color=color)

    @property
    def summary(self) -> str:
        """Everything but the layers, in a few lines."""
        lines = [f"inputs  {'; '.join(self.inputs)}", f"outputs {'; '.join(self.outputs)}"]
        lines.append(size_line(self.size))
        about = {
            key.removeprefix("fxprune."): value for key, value in self.metadata.items() if key.startswith("fxprune.")
        }
        if about:
            pruned = f", pruned to {about['pattern']} with {about.get('method', '?')}" if about.get("pattern") else ""
            lines.append(f"Written by fxprune {about.get('version', '?')}{pruned}.")
        if dead := {layer.initializer: layer.dead_outputs for layer in self.layers if layer.dead_outputs}:
            worst = max(dead, key=dead.__getitem__)
            most = f"{len(dead)} weights, most ({dead[worst]}) of {worst}" if len(dead) > 1 else worst
            lines.append(f"Output channels whose weights are all zero: {sum(dead.values())} of {most}.")
        if self.sparse_initializers:
            lines.append(f"Stored sparsely: {', '.join(self.sparse_initializers)}.")
        if self.complaint:
            lines.append(f"onnx.checker finds fault with this file: {self.complaint}.")
        lines += [f"Not inspected: {text}." for text in self.unreadable]
        if self.computed:
            lines.append(f"Weight computed at run time, not inspected: {', '.join(self.computed)}.")
        if self.others:
            names = ", ".join(f"{name} ({'x'.join(map(str, shape))})" for name, shape in self.others)
            lines.append(f"Stored tensors that no convolution or matrix product reads: {names}.")
        return "\n".join([*lines, *verdict_legend([layer.verdict for layer in self.layers])])

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts."""
        return dataclasses.asdict(self) | {"sparsity": self.sparsity}

    def to_json(self, path: str | PathLike[str]) -> None:
        """Write the whole inspection."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def inspect_onnx(path: str | Path) -> Inspection:
    """Read an ONNX file from any source.

    Raises:
        ValidationError: the file is missing or not a complete ONNX file. What onnx.checker says against a complete file
            is only noted in the result.
    """
    file = read_onnx(path, strict=False)
    found = graph_weights(file.model)
    stored = distinct_weights(found.uses)
    size = measure_size(file.path)
    return Inspection(
        path=str(path),
        opset=file.opset,
        inputs=tuple(map(str, file.inputs)),
        outputs=tuple(map(str, file.outputs)),
        metadata=file.metadata,
        layers=tuple(_layer(use) for use in found.uses),
        size=dataclasses.replace(
            size,
            weights=sum(weight.numel() for weight in stored),
            zeros=sum(weight.numel() - int(torch.count_nonzero(weight)) for weight in stored),
        ),
        sparse_initializers=file.sparse,
        computed=found.computed,
        others=found.others,
        complaint=file.complaint,
        unreadable=found.unreadable,
    )


def held_patterns(weight: Tensor) -> tuple[NMPattern, ...]:
    """The strictest of `PATTERNS` that hold along axis 1 of a weight (R, C, ...); none if it is all zero."""
    nonzero = (weight != 0).to(torch.uint8)
    if not 0 < int(torch.count_nonzero(nonzero)) < weight.numel():
        return ()
    counts = nonzero.movedim(1, -1).contiguous()
    most = {1: 1}  # M -> most non-zeros in any group of M; each M from the sums of M / 2
    while counts.shape[-1] % 2 == 0 and max(most) < PATTERNS[-1].m:
        counts = counts[..., 0::2] + counts[..., 1::2]
        most[2 * max(most)] = int(counts.max())
    held = [pattern for pattern in PATTERNS if pattern.m in most and most[pattern.m] <= pattern.n]
    return tuple(p for p in held if not any(_implies(q, p) for q in held if q != p))


def _implies(strict: NMPattern, loose: NMPattern) -> bool:
    """Whether every weight that satisfies `strict` satisfies `loose`."""
    if loose.m % strict.m == 0:
        return strict.n * (loose.m // strict.m) <= loose.n
    return strict.m % loose.m == 0 and strict.n <= loose.n


def _layer(use: WeightUse) -> InspectedLayer:
    weight = use.reduction_first
    held = held_patterns(weight)
    others = [f"{p} along output channels" for p in held_patterns(weight.transpose(0, 1)) if p not in held]
    if weight.dim() > 2 and not held:
        others += [f"{p} in storage order" for p in held_patterns(weight.flatten(1))]
    advice = assess_deployment(weight, op=use.op, groups=use.groups)
    return InspectedLayer(
        node=use.node,
        op=use.op,
        initializer=use.initializer,
        shape=use.stored_shape,
        dtype=use.dtype,
        groups=use.groups,
        axis=use.axis,
        sparsity=use.sparsity,
        patterns=tuple(map(str, held)),
        other_patterns=tuple(others),
        verdict=advice.verdict,
        explanation=advice.explanation,
        dead_outputs=int((use.reduction_first.movedim(0, -1) == 0).flatten(0, -2).all(0).sum()),
    )
