"""Draws benchmarks/accuracy.csv and writes its tables.

python -m benchmarks.accuracy_report
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
METHOD_STYLE = {
    "magnitude": ("#999999", "s"),
    "sparsegpt": ("#0072b2", "^"),
    "exact_obs": ("#cc79a7", "v"),
    "exact_obs + BatchNorm": ("#e69f00", "D"),
    "ours without permutation": ("#56b4e9", "o"),
    "ours": ("#d55e00", "o"),
    "ours + budget": ("#009e73", "P"),
    "ours + polish": ("#000000", "*"),
}
PATTERNS = ("", "2:4", "1:4", "4:8", "0.5", "0.7", "0.8", "0.9", "0.95")
METHODS = (
    "dense", "magnitude", "modelopt", "sparsegpt", "exact_obs", "exact_obs + BatchNorm", "admm with its own target",
    "+ dense target", "+ bias", "+ skip target", "ours without permutation", "ours", "ours + all patches", "ours + budget",
    "ours + polish",
)  # fmt: skip
# Defaults that have changed since a row was made: its machine's words end in one of these.
BEFORE = {
    "; patches=64, small steps of rho": (
        "*",
        'half as many patches in the statistics ("all patches" apart) and ADMM\'s rho from 0.1 on in smaller steps',
    ),
    "; corrections from 64 patches, order from 128 images": (
        "†",
        "statistics from 128 patches for each column, no least number of them, the correction for a ReLU at every pattern and "
        "from half of the patches, the order of channels chosen on twice as many images, and ADMM's rho from 0.1 on; p "
        "compares with ours as it was then",
    ),
}
MOBILE = {  # CSV: heading
    "photographs": "## EfficientNet-Lite1, on photographs\n\nImageNet weights, 250 test images; `photographs.md`.",
    "mobile": "## MobileNetV2, on CIFAR-10\n\nA short training on a CPU, 10,000 JPEG-coded test images; `mobile.md`.",
}
HEADING = """# Accuracy

One-shot pruning of trained CIFAR-10 ResNets, {images} calibration images, first convolution dense, no retraining. Accuracy
on the 846 lossless test images and on all 10,000 JPEG test images; top-1 agreement with the dense model and mean KL(dense
|| pruned) on the first 3,000 JPEG test images. One run each. An accuracy on 846 images has a 95% interval of +-1.9 points, so
only agreement, KL and the 10,000 images rank close methods; p is McNemar's, two-sided, against "ours" on the 10,000 images.
Other calibration images move KL by about 4%.

Seconds are processor seconds of the compilation, with other rows beside it: read them as an order of magnitude; `speed.md` has
the timings. {machines} Rows with a mark are also from before logits were scaled below 1: their KL is the larger for it.

"ours" is `fxprune.compile(model, batches, pattern)` as it comes, "ours + polish" the same with `Options(polish=8,
flip=True)`. `sparsegpt` is as published, run on the pruned prefix; `exact_obs` likewise as published: statistics of the
dense model, BatchNorm not folded. `modelopt` is NVIDIA modelopt 0.47's "sparsegpt" mode with its own settings. Rows
from "admm with its own target" on add one ingredient each; "ours without permutation" adds ReLU-aware targets to the
last of them (by default at patterns that keep less than half of the weights), and "ours" the permutation; "ours + all
patches" is `Options(patches=0)`.

    python -m benchmarks.accuracy_table --data ../shared/data                               all rows, on a CPU: hours
    python -m benchmarks.accuracy_table --data ../shared/data --device cuda --workers 15    on a GPU: ten minutes
    python -m benchmarks.accuracy --models MODEL --patterns PATTERNS --methods METHODS      some rows
    python -m benchmarks.accuracy_report                                                    tables and plot once more

![accuracy and KL against sparsity](accuracy.png)
"""


def main() -> None:
    """Read the CSV, write accuracy.png and accuracy.md beside it."""
    with (HERE / "accuracy.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    draw(rows, HERE / "accuracy.png")
    rows.sort(key=lambda row: (row["model"], _place(row["pattern"], PATTERNS), _place(row["method"], METHODS)))
    with (HERE / "accuracy_significance.csv").open(newline="", encoding="utf-8") as file:
        p_values = {
            (row["model"], row["pattern"], row["method"]): row["p_against_ours"] for row in csv.DictReader(file)
        }
    machines = "; ".join(f"{count} of them `{name}`" for name, count in Counter(row["machine"] for row in rows).items())
    present = {mark for row in rows if (mark := _mark(row))}
    marked = "".join(
        f"Rows marked {mark} were made with {words} (in accuracy.csv: `{suffix.removeprefix('; ')}`). "
        for suffix, (mark, words) in BEFORE.items()
        if mark in present
    )
    lines = [
        HEADING.format(
            images=rows[0]["images"], machines=f"{marked}accuracy.csv names the machine of each row: {machines}."
        )
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        dense = next(row for row in rows if row["model"] == model and row["method"] == "dense")
        lines.append(
            f"\n## {model}\n\nDense: {float(dense['accuracy']):.2f}% / {float(dense['accuracy_jpeg']):.2f}%.\n"
        )
        lines.append("| pattern | method | accuracy (846) | accuracy (10,000) | p | agreement | KL | seconds |")
        lines.append("|---|---|---|---|---|---|---|---|")
        for row in rows:
            if row["model"] == model and row is not dense:
                figures = [f"{float(row[k]):.2f}" for k in ("accuracy", "accuracy_jpeg", "agreement")]
                figures.insert(2, p_values.get((model, row["pattern"], row["method"]), ""))
                figures += [f"{float(row['kl']):.4f}", f"{float(row['seconds']):.0f}"]
                method = f"{row['method']} {_mark(row)}".strip()
                lines.append(f"| {row['pattern']} | {method} | {' | '.join(figures)} |")
    lines += mobile_tables()
    (HERE / "accuracy.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def mobile_tables() -> list[str]:
    """The two mobile networks, from the tables of their own benchmarks, which say more."""
    lines = []
    for name, what in MOBILE.items():
        with (HERE / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["pattern"] in ("2:4", "1:4")]
        lines.append(f"\n{what}\n\nDense: {float(rows[0]['dense_accuracy']):.1f}%.\n")
        lines.append("| pattern | images | method | accuracy | agreement | KL |")
        lines.append("|---|---|---|---|---|---|")
        lines += [
            f"| {row['pattern']} | {row['images']} | {row['method']} | {float(row['accuracy']):.1f} "
            f"| {float(row['agreement']):.1f} | {float(row['kl']):.3f} |"
            for row in rows
        ]
    return lines


def _mark(row: dict[str, str]) -> str:
    """The sign of a row that was made with a default that has changed since, or nothing."""
    return next((mark for suffix, (mark, _) in BEFORE.items() if row["machine"].endswith(suffix)), "")


def _place(name: str, order: tuple[str, ...]) -> int:
    return order.index(name) if name in order else len(order)


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Accuracy on the JPEG images and KL against sparsity, a line a method for ResNet-20; N:M as hollow markers."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.1), constrained_layout=True)
    series: dict[str, list[tuple[float, float, float, str]]] = defaultdict(list)
    for row in rows:
        if row["model"] == "resnet20" and row["pattern"] and row["method"] in METHOD_STYLE:
            point = (float(row["sparsity"]), float(row["accuracy_jpeg"]), float(row["kl"]), row["pattern"])
            series[row["method"]].append(point)
    for method, points in series.items():
        color, marker = METHOD_STYLE[method]
        for axis, column in zip(axes, (1, 2), strict=True):
            line = sorted(p for p in points if ":" not in p[3])
            grouped = [p for p in points if ":" in p[3]]
            if line:
                axis.plot([p[0] for p in line], [p[column] for p in line], color=color, marker=marker, label=method)
            axis.plot(
                [p[0] for p in grouped],
                [p[column] for p in grouped],
                marker=marker,
                color=color,
                mfc="white",
                ls="",
                ms=9,
                mew=1.8,
                label=None if line else method,
            )
    dense = next(row for row in rows if row["model"] == "resnet20" and row["method"] == "dense")
    axes[0].axhline(float(dense["accuracy_jpeg"]), color="black", lw=1, ls=":")
    axes[0].set(xlabel="sparsity", ylabel="accuracy, 10,000 JPEG images (%)", title="ResNet-20 (dotted: dense)")
    axes[1].set(
        xlabel="sparsity", ylabel="KL(dense || pruned)", yscale="log", title="hollow: N:M, filled: unstructured"
    )
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
