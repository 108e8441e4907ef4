"""The seed table as Markdown and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.seed_table_rows import Row
from fxprune.files import atomic
from fxprune.plots.style import figure, mark, save_figure

HEADINGS = (
    "model, data", "method", "dense", "2:4", "drop", "agrees with dense", "KL", "zeros", "onnxruntime", "compile s",
)  # fmt: skip


def write_markdown(path: Path, rows: Sequence[Row], note: str = "") -> None:
    """Write the table, what the bars are, and what it was measured on."""
    lines = [
        "# 2:4 in one shot: trained, pruned, exported",
        "",
        "Made by `python -m benchmarks.seed_table`. Accuracies in percent on all test images; 1024 training images to "
        "calibrate; no retraining. Each ONNX file was kept only after onnxruntime computed on every test image what the "
        "graph does (largest relative difference 1e-4 allowed) and every pruned weight in it was 2:4. The CIFAR-10 images "
        "are JPEG re-encodings, which costs all models some points.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---|---|" + "---:|" * (len(HEADINGS) - 2),
    ]
    for row in rows:
        cells = (
            row.name, row.method, f"{row.dense_accuracy:.2f}", f"{row.accuracy:.2f}", f"{row.drop:+.2f}",
            f"{row.agreement:.2f}%", f"{row.kl:.4f}", f"{100 * row.sparsity:.1f}%", f"{row.onnx_accuracy:.2f}",
            f"{row.compile_seconds:.1f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "`admm` is the default method.", ""]
    for row in rows:
        if row.allowed_drop is not None:
            met = "met" if row.drop <= row.allowed_drop else "NOT met"
            lines.append(
                f"- {row.name}, {row.method}: drop {row.drop:.2f} points, at most {row.allowed_drop:g} allowed: {met}."
            )
    trained = {row.name: row for row in rows}.values()
    lines += [
        "",
        *(f"- {r.name}: {r.epochs} epochs on {r.train_images} images, {r.train_seconds:.0f} s." for r in trained),
    ]
    lines += ["", *([note, ""] if note else []), f"Machine: {'; '.join(sorted({row.machine for row in rows}))}."]
    with atomic(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_plot(stem: Path, rows: Sequence[Row]) -> None:
    """Write <stem>.png: each model's drop for each method."""
    names = list(dict.fromkeys(row.name for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    with figure(1.0 + 1.1 * len(names), width=7.6) as picture:
        axes = picture.add_subplot()
        height = 0.8 / len(methods)
        for number, method in enumerate(methods):
            drop = {row.name: row.drop for row in rows if row.method == method}
            drops = [drop.get(name, math.nan) for name in names]
            places = [i + (number - (len(methods) - 1) / 2) * height for i in range(len(names))]
            axes.barh(places, drops, height * 0.9, color=mark(method, methods).color, label=method)
            for place, lost in zip(places, drops, strict=True):
                if math.isnan(lost):
                    continue  # Not run yet.
                axes.annotate(
                    f"{lost:.2f}", (max(lost, 0), place), xytext=(4, 0), textcoords="offset points", va="center"
                )
        axes.set_yticks(range(len(names)), [name.replace(" (", "\n(") for name in names])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("accuracy lost at 2:4, in points")
        axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
        save_figure(picture, stem, ("png",))
