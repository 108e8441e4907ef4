"""What a check of an ONNX file found: outputs, every layer's weight in the file, sizes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from fxprune.export.onnx_file import FileSize
from fxprune.export.parity import Parity
from fxprune.layers.deployment import CPU_NOTE, DENSE, LEGEND
from fxprune.tables import Column, as_text, said_once, table, terminal_width

COLUMNS = (
    Column("layer"),
    Column("initializer", leaves=2),
    Column("op", leaves=4),
    Column("shape", leaves=3),
    Column("axis", right=True, leaves=1),
    Column("pattern"),
    Column("zeros", right=True),
)


@dataclass(frozen=True)
class LayerCheck:
    """One layer of the model, as the file holds it.

    Attributes:
        name: module name.
        initializer: name of the tensor in the file, "" if the file does not hold it, as nothing reads what the layer gives.
        op: ONNX operation that reads it.
        shape: shape of the tensor in the file.
        axis: axis of that tensor along which the operation sums, and the pattern runs.
        pattern: the pattern that it was pruned to, "" if it was not.
        ok: whether the pattern holds in the file; None if there is none.
        sparsity: share of zeros in the file.
        verdict: deployment verdict in a few words.
        explanation: the reasoning behind the verdict.
        note: what was found beside that, such as a BatchNorm folded in by the exporter.
    """

    name: str
    initializer: str
    op: str
    shape: tuple[int, ...]
    axis: int | None
    pattern: str
    ok: bool | None
    sparsity: float
    verdict: str
    explanation: str = ""
    note: str = ""


@dataclass(frozen=True)
class OnnxReport:
    """A file that passed: `export_onnx` and `validate_onnx` raise for one that did not.

    Attributes:
        path: the file.
        opset: version of its operator set.
        precision: "fp32", "fp16" or another number type, of the weights.
        inputs: its inputs as "name: dtype (sizes)".
        outputs: likewise.
        parity: outputs in onnxruntime against the model's.
        layers: one per layer of the model that has a weight.
        size: bytes and zeros.
        pattern: the pattern that the model was pruned to, or "".
        method: the method, or "".
        sparse_initializers: names of the tensors stored sparsely.
        notes: what else the reader should know.
    """

    path: str
    opset: int
    precision: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parity: Parity
    layers: tuple[LayerCheck, ...]
    size: FileSize
    pattern: str = ""
    method: str = ""
    sparse_initializers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Share of zeros among the weights in the file."""
        return self.size.sparsity

    def __getitem__(self, name: str) -> LayerCheck:
        """The check of the layer called `name`."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer named {name!r}; there are: {', '.join(layer.name for layer in self.layers)}")

    def __str__(self) -> str:
        return self.render()

    def render(self, *, width: int | None = None, color: bool = False) -> str:
        """The tables as text of at most `width` columns (None: the terminal's), with ANSI colours if asked for."""
        title = f"{Path(self.path).name}: ONNX opset {self.opset}, {self.precision}"
        if self.pattern:
            title += f", pruned to {self.pattern}" + (f" with {self.method}" if self.method else "")
        width = terminal_width() if width is None else width
        layers = _layer_table(title, self.layers, width)
        return as_text(layers, "", size_line(self.size), self.summary, width=width, color=color)

    @property
    def summary(self) -> str:
        """What onnxruntime said, in a few lines."""
        parity = self.parity
        sizes = ", ".join(map(str, parity.batch_sizes))
        lines = [
            f"onnxruntime agrees with the model on {parity.samples} samples (batches of {sizes}): "
            f"largest difference {parity.max_abs:.2e}, relative {parity.max_rel:.1e} ({parity.tolerance:g} allowed)."
        ]
        if parity.agreement is not None:
            lines.append(f"Top-1 agreement {parity.agreement:.2%}; largest difference at sample {parity.worst_sample}.")
        if parity.accuracy_model is not None and parity.accuracy_onnx is not None:
            lines.append(f"Accuracy: model {parity.accuracy_model:.2f}%, file {parity.accuracy_onnx:.2f}%.")
        if self.sparse_initializers:
            lines.append(f"Stored sparsely: {', '.join(self.sparse_initializers)}.")
        return "\n".join([*lines, *self.notes, *verdict_legend([layer.verdict for layer in self.layers])])

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts."""
        return dataclasses.asdict(self) | {"sparsity": self.sparsity}

    def to_json(self, path: str | PathLike[str]) -> None:
        """Write the whole report."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def axis_name(axis: int | None) -> str:
    """The axis for a table cell."""
    return "" if axis is None else str(axis)


def verdict_legend(verdicts: Sequence[str]) -> list[str]:
    """What the verdicts in a table mean, and what zeros do not bring."""
    once = common_verdict(verdicts)
    lines = [
        f"{verdict}{' (every layer with zeros)' if verdict == once else ''}: {LEGEND[verdict]}"
        for verdict in LEGEND
        if verdict in verdicts
    ]
    if once and once not in LEGEND:
        lines.append(f"Every layer with zeros: {once}.")
    return [*lines, CPU_NOTE] if lines else []


def common_verdict(verdicts: Sequence[str]) -> str:
    """The verdict that all layers with zeros have in common, which is then said once under the table; else ""."""
    return said_once([verdict for verdict in verdicts if verdict != DENSE])


def size_line(size: FileSize) -> str:
    """Bytes, and zeros among the weights."""
    return (
        f"{size.file:,} bytes, {size.compressed:,} compressed with zlib ({size.compressed / max(size.file, 1):.0%}); "
        f"{size.zeros:,} of {size.weights:,} weights are zero ({size.sparsity:.1%})."
    )


def _layer_table(title: str, layers: tuple[LayerCheck, ...], width: int) -> RenderableType:
    once = common_verdict([layer.verdict for layer in layers])
    rows = [
        (
            layer.name,
            ".weight" if layer.initializer == f"{layer.name}.weight" else layer.initializer,
            layer.op,
            "x".join(map(str, layer.shape)),
            axis_name(layer.axis),
            Text(f"{layer.pattern} ok" if layer.pattern else "", style="green"),
            f"{layer.sparsity:.1%}",
        )
        for layer in layers
    ]
    notes = ["; ".join(note for note in (layer.verdict, layer.note) if note and note != once) for layer in layers]
    return table(COLUMNS, rows, notes, width=width, title=title, note_heading="verdict")
