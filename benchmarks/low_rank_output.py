"""The tables of `benchmarks.low_rank` on disk, and their picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from fxprune.plots import save_figure
from fxprune.plots.style import FAINT, figure

HERE = Path(__file__).resolve().parent
NETWORKS, LAYERS, PICTURE = HERE / "low_rank.csv", HERE / "low_rank_layers.csv", HERE / "low_rank"
PAGE = HERE / "low_rank.md"
DATA_AWARE, PLAIN, CHANNEL = "#0072B2", "#7F7F7F", "#D55E00"

Table = list[dict[str, str]]


def write_page(networks: Table, layers: Table) -> None:
    """Both tables in words, beside the picture."""
    less = sum(float(row["error_data_aware"]) < float(row["error_svd"]) for row in layers)
    lines = [
        "# Low rank: accuracy, and latency in onnxruntime",
        "",
        "Made by `python -m benchmarks.low_rank`. Trained networks: the CIFAR-10 ResNets, calibrated on 1,024 training "
        "images; accuracy on 846 test images, agreement and KL(dense || factored) on 3,000 JPEG test images. Random "
        "weights: torchvision's networks at 224 x 224, for latency alone. Latency: one image, one thread, both files run "
        "in turn; medians, quartiles of the factored network in brackets.",
        "",
        f"One layer at a time, at the same rank, on held-out images: data-aware SVD loses less than plain SVD in {less} of "
        f"{len(layers)} cases.",
        "",
        "![Layer errors, agreement against MACs, latency](low_rank.png)",
        "",
    ]
    lines += [f"Machine: {words}." for words in sorted({row["machine"] for row in networks})]
    columns = ("network", "weights", "method", "split", "ranks by", "of", "MACs", "accuracy, dense", "accuracy",
               "agreement", "KL", "dense ms", "ms", "times faster")  # fmt: skip
    lines += ["", f"| {' | '.join(columns)} |", "|---|---|---|---|---|" + "---:|" * (len(columns) - 5)]
    for row in sorted(networks, key=lambda row: (row["weights"], row["model"], int(row["multiple"]))):
        fewer = int(row["macs_dense"]) / int(row["macs"])
        scores = [f"{float(row[k]):.2f}" if row[k] else "" for k in ("accuracy_dense", "accuracy", "agreement")]
        times = [f"{float(row[k]):.3g}" for k in ("dense_ms", "ms", "low", "high")]
        cells = [
            row["model"], row["weights"], row["method"], row["split"], row["rank"], row["multiple"], f"1/{fewer:.2f}", *scores,
            f"{float(row['kl']):.3f}" if row["kl"] else "", times[0], f"{times[1]} ({times[2]} to {times[3]})",
            f"{float(row['speedup']):.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_plot(networks: Table, layers: Table) -> None:
    """Three panels: layer errors, agreement against MACs, latency."""
    with figure(4.8, 14) as picture:
        panels = picture.subplots(1, 3)
        _errors(panels[0], layers)
        _agreement(panels[1], [row for row in networks if row["weights"] == "trained" and row["multiple"] == "4"])
        _latency(panels[2], networks)
        save_figure(picture, PICTURE, formats=("png",))


def _errors(axes: Axes, layers: Table) -> None:
    """Every layer a dot: error of plain SVD against that of data-aware SVD, at the same rank."""
    for split, color, marker in (("channel", CHANNEL, "o"), ("spatial", DATA_AWARE, "s")):
        rows = [row for row in layers if row["split"] == split]
        x, y = ([100 * float(row[f"error_{method}"]) for row in rows] for method in ("svd", "data_aware"))
        axes.scatter(x, y, color=color, marker=marker, s=22, alpha=0.7, label=f"{split} split", linewidths=0)
    ends = [0.1, 100]
    axes.plot(ends, ends, color=FAINT, linewidth=1.4)
    axes.annotate("equal", (50, 50), xytext=(-4, 4), textcoords="offset points", ha="right", color=FAINT)
    axes.set(xscale="log", yscale="log", xlabel="plain SVD: % of the layer's output lost", ylabel="data-aware SVD")
    axes.set_title("One layer at a time, same rank")
    axes.legend(loc="lower right", frameon=False)


def _agreement(axes: Axes, rows: Table) -> None:
    """How close whole networks stay to dense at fewer MACs."""
    kinds = (("data_aware", "auto", DATA_AWARE, "data-aware"), ("data_aware", "channel", CHANNEL, "channel split only"),
             ("svd", "auto", PLAIN, "plain SVD"))  # fmt: skip
    for model, style, marker in (("resnet56", "-", "o"), ("resnet20", "--", "s")):
        for method, split, color, words in kinds:
            own = [r for r in rows if (r["model"], r["method"], r["split"]) == (model, method, split)]
            own.sort(key=lambda row: int(row["macs"]))
            fewer = [int(row["macs_dense"]) / int(row["macs"]) for row in own]
            label = f"{words}, ResNet-{model[6:]}" if own else None
            agreements = [float(row["agreement"]) for row in own]
            axes.plot(fewer, agreements, style, marker=marker, color=color, label=label)
    axes.set(xlabel="times fewer MACs", ylabel="% agreement with dense, top-1")
    axes.set_title("Trained CIFAR-10 networks")
    axes.legend(loc="lower right", frameon=False, fontsize=10, handlelength=3)


def _latency(axes: Axes, networks: Table) -> None:
    """Median speed-up in onnxruntime, with the quartiles of the factored network's times."""
    rows = [row for row in networks if row["multiple"] == "16"]
    names = []
    for place, row in enumerate(reversed(rows)):
        dense, bar = float(row["dense_ms"]), FAINT if row["weights"] == "random" else DATA_AWARE
        axes.barh([place], [float(row["speedup"])], color=bar, height=0.65)
        ends = [dense / float(row["high"]), dense / float(row["low"])]
        axes.plot(ends, [place, place], color="black", linewidth=1.6)
        times = f"{float(row['ms']):.3g} ms for {dense:.3g}"
        axes.annotate(times, (0.05, place), va="center", color="white", weight="bold", size=10)
        fewer = int(row["macs_dense"]) / int(row["macs"])
        size = 224 if row["weights"] == "random" else 32
        names.append(f"ResNet-{row['model'][6:]}, {size}²\n{fewer:.2f}x fewer")
    axes.set_yticks(range(len(names)), names, size=9)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xlabel="times faster than dense in onnxruntime")
    axes.set_title("Latency, one image")
