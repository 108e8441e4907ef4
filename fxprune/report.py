"""What was done to each layer, as a table for people and as CSV or JSON for programs."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune.tables import Column, as_text, said_once, table, terminal_width

if TYPE_CHECKING:
    from rich.console import RenderableType

COLUMNS = (
    Column("layer"),
    Column("op", leaves=2),
    Column("weight", leaves=3),
    Column("status"),
    Column("zeros", right=True),
    Column("rel. error", right=True, leaves=4),
    Column("s", right=True, leaves=1),
)
SHOWN = 4  # Errors of outputs.
STATUS_STYLE = {
    "pruned": "green", "factored": "green", "narrowed": "green", "reconstructed": "cyan", "kept": "yellow", "unread": "dim"
}  # fmt: skip


@dataclass(frozen=True)
class LayerReport:
    """What was done to one Conv or Linear layer.

    Attributes:
        name: module name (for a functional call, the node's name).
        op: module class, such as "Conv2d".
        shape: weight shape (R, C/G, *kernel); () if it is computed on the way.
        pattern: the pattern that the weight now satisfies, or "" if it was not pruned.
        status: "pruned", "factored" (replaced by two layers), "narrowed" (dense, with fewer channels), "reconstructed" (dense,
            re-fitted to the dense model's output), "kept" (as it was) or "unread" (no output depends on it, so that the
            compiled model does without).
        reason: why the layer was not pruned, or how it was factored or narrowed; of a pruned layer, what is unusual about it,
            or "".
        sparsity: share of zeros in the weight.
        relative_error: ||y_dense - y_pruned||^2 / ||y_dense - mean||^2 on the held-out images, or None if not measured; without
            such images on those that were fitted, a quarter of the patches whose statistics were taken.
        damping: the damping that the factorisation needed, relative to the mean of the Hessian's diagonal.
        correction: share of the correction of earlier layers' errors that the layer's target holds (`Options.shrink`); None if
            it was not chosen.
        logit_scale: by which a classifier's logits were scaled (`Options.temperature`).
        dead_inputs: columns whose input was zero throughout the calibration set.
        dead_outputs: output channels of which all weights have become zero, so that they are constant.
        seconds: time spent in the solver.
        verdict: deployment verdict, in a word or two.
        rank: of a factored layer; 0 for any other.
        macs: of a factored or narrowed layer for one sample, (before, after).
        channels: of a narrowed layer, (input channels before, after, output channels before, after).
    """

    name: str
    op: str
    shape: tuple[int, ...]
    pattern: str = ""
    status: str = "kept"
    reason: str = ""
    sparsity: float = 0.0
    relative_error: float | None = None
    damping: float | None = None
    correction: float | None = None
    logit_scale: float = 1.0
    dead_inputs: int = 0
    dead_outputs: int = 0
    seconds: float = 0.0
    verdict: str = ""
    rank: int = 0
    macs: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()

    @property
    def is_compressed(self) -> bool:
        """Whether it was pruned, factored or narrowed."""
        return self.status in ("pruned", "factored", "narrowed")

    @property
    def is_read(self) -> bool:
        """Whether an output of the model depends on it; if not, it is not in the compiled model."""
        return self.status != "unread"

    @property
    def weights(self) -> int:
        """Number of weights, bias not counted."""
        return math.prod(self.shape) if self.shape else 0


@dataclass(frozen=True)
class PruneReport:
    """All layers of a compiled model, with what the whole run was asked for and what it cost.

    Attributes:
        layers: one LayerReport per Conv or Linear call, in graph order.
        method: solver name.
        pattern: the pattern asked for.
        images: calibration samples whose statistics were taken.
        images_read: samples that the loader gave; more where some are held out, and where each layer has patches enough
            without some of them.
        images_held_out: samples that took no part in the statistics. Errors, agreement and KL are measured on them; if there
            are none, errors are those of the samples that were fitted.
        seconds: wall time of the whole compilation.
        timings: seconds by stage, such as {"stream": ..., "statistics": ..., "solve": ...}.
        peak_memory: bytes of live calibration values held at most.
        agreement: share of the held-out samples on which dense and pruned outputs have the same top class; None without such
            samples, or if the model's output is not a single (N, classes) tensor.
        kl: mean KL(dense || pruned) of the softmax outputs there, in nats, or None likewise.
        output_errors: relative error of each tensor that the model puts out there; () without such samples.
        why_no_classes: why agreement and KL are not shown though they could be measured, as the outputs are no classifier's
            logits; "" where they are.
        macs: of all Conv and Linear modules for one sample, (before, after), where layers were factored or narrowed.
        parameters: of the whole model, (before, after), where layers were narrowed.
        warnings: what is wrong with the images, in sentences.
        notes: what has happened to the model since, such as zeros that were filled in.
        given: what had been done to the model that was given, if fxprune had compressed it before, such as "factored
            (macs:0.7) with data_aware"; "" for any other. It is what everything here is compared with.
    """

    layers: tuple[LayerReport, ...]
    method: str
    pattern: str
    images: int = 0
    images_read: int = 0
    images_held_out: int = 0
    seconds: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    agreement: float | None = None
    kl: float | None = None
    output_errors: tuple[float, ...] = ()
    why_no_classes: str = ""
    macs: tuple[int, ...] = ()
    parameters: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    given: str = ""

    @property
    def sparsity(self) -> float:
        """Share of zeros among all weights of the compiled model; a layer called twice counts once."""
        layers = {layer.name: layer for layer in self.layers if layer.is_read}.values()
        total = sum(layer.weights for layer in layers)
        return sum(layer.sparsity * layer.weights for layer in layers) / total if total else 0.0

    @property
    def done(self) -> str:
        """What was done to the model, in a few words, such as "pruned to 2:4" or "factored (macs:0.7)"."""
        kinds = {layer.status for layer in self.layers}
        kind = next((kind for kind in ("factored", "narrowed") if kind in kinds), "")
        return f"{kind} ({self.pattern})" if kind else f"pruned to {self.pattern}"

    @property
    def unread(self) -> tuple[LayerReport, ...]:
        """What of the user's model no output depends on, and the compiled model so does without."""
        return tuple(layer for layer in self.layers if not layer.is_read)

    def __getitem__(self, name: str) -> LayerReport:
        """The report of the layer called `name`."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer named {name!r}; there are: {', '.join(layer.name for layer in self.layers)}")

    def __str__(self) -> str:
        return self.render()

    def render(self, *, width: int | None = None, color: bool = False) -> str:
        """The table as text of at most `width` columns (None: the terminal's), with ANSI colours if asked for."""
        verdict = said_once([layer.verdict for layer in self.layers])
        once = [f"Every pruned layer: {verdict}."] if verdict else []
        width = terminal_width() if width is None else width
        return as_text(
            self._table(width, without=verdict), "\n".join(["", *once, self.summary]), width=width, color=color
        )

    @property
    def summary(self) -> str:
        """The run in a line or two."""
        done = sum(layer.is_compressed for layer in self.layers)
        if self.macs:
            before, after = self.macs
            pruned = any(layer.status == "pruned" for layer in self.layers)
            kinds = {layer.status for layer in self.layers if layer.is_compressed}
            what = f"{kinds.pop() if len(kinds) == 1 and not pruned else 'compressed'} ({self.pattern}) with {self.method}; "
            what += f"{before / 1e6:.1f} M MACs a sample became {after / 1e6:.1f} M ({before / max(after, 1):.2f} times fewer)"
            if self.parameters:
                what += f", {self.parameters[0]:,} parameters {self.parameters[1]:,}"
            what += f"; {self.sparsity:.1%} of all weights are zero" if pruned else ""
        else:
            recipe = f"by the recipe {self.pattern}" if ": " in self.pattern else f"to {self.pattern}"
            what = f"pruned {recipe} with {self.method}; {self.sparsity:.1%} of all weights are zero"
        images = (
            f"{self.images} of {self.images_read} images" if self.images_read > self.images else f"{self.images} images"
        )
        lines = [f"{done} of {len(self.layers) - len(self.unread)} layers {what}; {images}, {self.seconds:.1f} s."]
        if self.unread:
            weights = sum(layer.weights for layer in self.unread)
            share = weights / max(sum(layer.weights for layer in {x.name: x for x in self.layers}.values()), 1)
            lines.append(
                f"No output depends on {weights:,} further weights ({share:.1%} of the model given), in {len(self.unread)} "
                "layers: the compiled model does without them, and no share here counts them."
            )
        if dead := self._dead_outputs:
            lines.append(dead)
        held_out = f"On {self.images_held_out} images that were held out:"
        compared = f"the model given, which was {self.given} before" if self.given else "the dense model"
        if self.agreement is not None and self.kl is not None and not self.why_no_classes:
            lines.append(f"{held_out} top-1 agreement with {compared} {self.agreement:.1%}, KL {self.kl:.4f}.")
        elif self.output_errors:
            errors = ", ".join(f"{error:.2e}" for error in self.output_errors[:SHOWN])
            more = f" and {len(self.output_errors) - SHOWN} more" if len(self.output_errors) > SHOWN else ""
            several = "s" if len(self.output_errors) > 1 else ""
            lines.append(
                f"{held_out} relative error{several} of the output{several} {errors}{more}, compared with {compared}. "
                f"No agreement and no KL: {self.why_no_classes}."
            )
        elif self.images and not self.images_held_out:
            lines.append("No image was held out: the errors are of images that were fitted, and there is no score.")
        return "\n".join([*lines, *(f"Warning: {warning}." for warning in self.warnings), *self.notes])

    @property
    def _dead_outputs(self) -> str:
        """Where output channels have become zero, in a sentence; "" if there are none."""
        rows = [layer for layer in self.layers if layer.dead_outputs]
        if not rows:
            return ""
        total = sum(layer.dead_outputs for layer in rows)
        worst = max(rows, key=lambda layer: layer.dead_outputs)
        where = (
            f"of {worst.name}"
            if len(rows) == 1
            else f"in {len(rows)} layers, most ({worst.dead_outputs}) of {worst.name}"
        )
        return f"Output channels that have lost all their weights, and give their bias alone: {total} {where}."

    def _table(self, width: int, without: str) -> RenderableType:
        from rich.text import Text

        rows = [
            (
                layer.name,
                layer.op,
                "x".join(map(str, layer.shape)),
                Text(layer.status, style=STATUS_STYLE[layer.status]),
                f"{layer.sparsity:.1%}",
                "" if layer.relative_error is None else f"{layer.relative_error:.2e}",
                f"{layer.seconds:.2f}",
            )
            for layer in self.layers
        ]
        notes = [_note(layer, without) for layer in self.layers]
        title = f"fxprune {self.pattern} ({self.method})"
        return table(COLUMNS, rows, notes, width=width, title=title, note_heading="why / note")

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write one row a layer, with the field names of LayerReport as the header."""
        names = [f.name for f in dataclasses.fields(LayerReport)]
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            for layer in self.layers:
                values = [getattr(layer, name) for name in names]
                writer.writerow(["x".join(map(str, v)) if isinstance(v, tuple) else v for v in values])

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts."""
        return dataclasses.asdict(self) | {"sparsity": self.sparsity}

    def to_json(self, path: str | PathLike[str]) -> None:
        """Write the whole report; a number that is not finite becomes null, as JSON has no word for it."""
        Path(path).write_text(json.dumps(_finite(self.to_dict()), indent=2) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """Nested lists and dicts with None in place of infinite and NaN floats."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _note(layer: LayerReport, without: str) -> str:
    """Rank, reason, dead channels and verdict in one sentence, the verdict only if it is not `without`."""
    notes = [layer.reason, "" if layer.verdict == without else layer.verdict]
    if layer.rank and layer.macs:
        before, after = layer.macs
        notes.insert(0, f"rank {layer.rank}, {after / before:.0%} of its MACs")
    if layer.dead_inputs:
        notes.append(f"{layer.dead_inputs} dead input{'s' if layer.dead_inputs > 1 else ''}")
    if layer.dead_outputs:
        notes.append(f"{layer.dead_outputs} output channel{'s' if layer.dead_outputs > 1 else ''} all zero")
    return "; ".join(note for note in notes if note)
