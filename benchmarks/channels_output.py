"""The table of `benchmarks.channels` as a page and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fxprune.experiments.csv_rows import read_lines
from fxprune.plots import save_figure
from fxprune.plots.style import FAINT, RECIPES, figure

NAMES = {"resnet20": "ResNet-20", "resnet56": "ResNet-56", "efficientnet_lite1": "EfficientNet-Lite1"}
OTHERS = ("low rank", "low rank + polish")  # What ours is compared with at equal latency.
OURS, BOTH = ("ours", "ours by time"), ("channels + rank",)
WORST = 3.0  # KL that the picture shows.

Table = Sequence[dict[str, str]]


def label(row: dict[str, str]) -> str:
    """The method, with the multiple where that is not the least."""
    return row["method"] + (f", multiples of {row['multiple']}" if int(row["multiple"]) > 1 else "")


def lines_of(rows: Table, model: str) -> dict[str, list[dict[str, str]]]:
    """The timed rows of a network by their label, each in the order of latency; without the dense one."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in sorted((row for row in rows if row["model"] == model and row["ms"]), key=lambda row: float(row["ms"])):
        if row["method"] != "dense":
            found.setdefault(label(row), []).append(row)
    return found


def frontier(lines: dict[str, list[dict[str, str]]], family: Sequence[str], ms: float) -> dict[str, str] | None:
    """Of all rows of a family of methods that are at least as fast, the one with the least KL."""
    fast = [row for line in lines.values() for row in line if row["method"] in family and float(row["ms"]) <= ms]
    return min(fast, key=lambda row: float(row["kl"]), default=None)


def write_page(table: Path) -> None:
    """All rows, and what is best at equal latency."""
    rows = read_lines(table)
    lines = [
        "# Fewer channels",
        "",
        "Made by `python -m benchmarks.channels`, several times with other options. The CIFAR-10 ResNets are calibrated on "
        "1,024 training images, and have accuracy on 846 test images, agreement and KL(dense || narrowed) on 3,000 JPEG test "
        "images; EfficientNet-Lite1 has 250 photographs to calibrate and 250 others to test, for all three columns. No method "
        "is fine-tuned, and none reads a label. `docs/channels.md` says what follows from it.",
        "",
        "Latency: one image, one thread of onnxruntime, all files of a network in turn; medians, quartiles in brackets.",
        "",
        f"![KL and accuracy against latency]({table.stem}.png)",
        "",
        f"Rows of a KL above {WORST:g} are not in the picture.",
    ]
    for words in sorted({row["machine"] for row in rows}):
        lines += ["", f"Machine: {words}."]
    lines += [line for model in NAMES for line in _equal_latency(rows, model)]
    for model, name in NAMES.items():
        own = [row for row in rows if row["model"] == model]
        if own:
            lines += ["", f"## {name}", "", *_table(own)]
    table.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _table(rows: Table) -> list[str]:
    lines = [
        "| share asked for | method | multiples of | MACs | accuracy | agreement | KL | ms | times faster | CPU s |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: (-float(row["share"]), float(row["kl"]))):
        share = f"{float(row['share']):g}x" if float(row["share"]) > 1 else f"{float(row['share']):.0%}"
        times, faster = "", ""
        if row["ms"]:
            times = f"{float(row['ms']):.3g} ({float(row['low_ms']):.3g} to {float(row['high_ms']):.3g})"
            faster = f"{float(row['dense_ms']) / float(row['ms']):.2f}"
        cells = [
            share, row["method"], row["multiple"], f"{float(row['macs']):.1%}", f"{float(row['accuracy']):.2f}",
            f"{float(row['agreement']):.2f}", f"{float(row['kl']):.3f}", times, faster, f"{float(row['seconds']):.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _equal_latency(rows: Table, model: str) -> list[str]:
    """For each row of low rank: the best of ours that is at least as fast, with and without ranks after it."""
    lines = lines_of(rows, model)
    others = [row for line in lines.values() for row in line if row["method"] in OTHERS]
    if not others:
        return []
    found = [
        "", f"## {NAMES[model]} at equal latency", "",
        "Each row of low rank beside the rows of least KL that are at least as fast:", "",
        "| low rank | ms | KL | ours | ms | KL | channels + rank | ms | KL |", "|---|---:|---:|---|---:|---:|---|---:|---:|",
    ]  # fmt: skip
    for row in sorted(others, key=lambda row: float(row["ms"])):
        cells = [f"{label(row)}, {float(row['share']):g}", f"{float(row['ms']):.3g}", f"{float(row['kl']):.3f}"]
        for family in (OURS, BOTH):
            best = frontier(lines, family, float(row["ms"]))
            if best is None:
                cells += ["none as fast", "", ""]
            else:
                words = f"{label(best)}, {float(best['share']):g}"
                cells += [words, f"{float(best['ms']):.3g}", f"{float(best['kl']):.3f}"]
        found.append(f"| {' | '.join(cells)} |")
    return found


def write_plot(table: Path) -> None:
    """For each network KL and accuracy against latency, a line a method."""
    rows = read_lines(table)
    models = [model for model in NAMES if lines_of(rows, model)]
    if not models:
        return
    drawn = {model: lines_of([row for row in rows if float(row["kl"]) <= WORST], model) for model in models}
    methods = list(dict.fromkeys(line[0]["method"] for lines in drawn.values() for line in lines.values()))
    with figure(4.6 * len(models) + 1.2, 13) as picture:
        grid = picture.subplots(len(models), 2, squeeze=False)
        for (left, right), model in zip(grid, models, strict=True):
            dense = next(row for row in rows if row["model"] == model and row["method"] == "dense")
            for name, line in drawn[model].items():
                style, dashes = (
                    RECIPES[methods.index(line[0]["method"]) % len(RECIPES)],
                    "-" if int(line[0]["multiple"]) == 1 else "--",
                )
                for axes, column in ((left, "kl"), (right, "accuracy")):
                    x, y = [float(row["ms"]) for row in line], [float(row[column]) for row in line]
                    axes.plot(x, y, dashes, color=style.color, marker=style.marker, label=name)
            for axes in (left, right):
                axes.axvline(float(dense["ms"]), color=FAINT, linestyle=":")
                axes.set_xlabel("ms for one image, one thread (dotted: dense)")
                axes.set_title(NAMES[model])
            left.set(yscale="log", ylabel="KL(dense || narrowed)")
            right.axhline(float(dense["accuracy"]), color=FAINT, linestyle=":")
            right.set(ylabel="accuracy (%)", ylim=(float(dense["accuracy"]) - 25, float(dense["accuracy"]) + 1.5))
        handles = {
            text: line for axes in grid.flat for line, text in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        picture.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
        save_figure(picture, table.with_suffix(""), formats=("png",))
