"""What a singular value decomposition keeps of a matrix, and what it drops, in two pictures.

    python examples/svd_pruning_visualization.py                          a matrix by default, a CNN trained on digits
    python examples/svd_pruning_visualization.py --matrix 2 1 0.5 1.5     your own matrix, row by row
    python examples/svd_pruning_visualization.py --layer conv2            a piece of a layer of the network
    python examples/svd_pruning_visualization.py --model resnet20 --weights resnet20.th --data cifar10.npz

1. `svd_pruning_visualization.png`: the unit circle, the ellipse that a 2 x 2 weight matrix makes of it, and the line that the
   best matrix of rank 1 makes of it.
2. `svd_spectra.png`: singular values of a trained network's layers, of the weights alone (plain SVD) and of the outputs they
   give on real images (data-aware), and the ranks that keep 95% of the energy.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

import fxprune
from fxprune.annotations import annotation
from fxprune.data import DataSplits, calibration_loader, load_data, make_loader
from fxprune.experiments.checkpoints import load_weights
from fxprune.experiments.training import train
from fxprune.experiments.training_recipe import TrainingRecipe
from fxprune.geometry import flatten_weight
from fxprune.options import Method
from fxprune.passes import FoldBatchNorm, InsertObservers, RemoveInplace
from fxprune.plots import save_figure
from fxprune.plots.style import FAINT, INK, figure
from fxprune.rank_reduction import low_rank_options
from fxprune.ranks.plan import Survey
from fxprune.ranks.survey import survey
from fxprune.solvers import ADMM, Magnitude
from fxprune.solvers.low_rank import tail_energy
from fxprune.tracing import trace

MATRIX = (1.8, 0.7, 0.5, 1.1)
LONG, SHORT, PLAIN = "#0072B2", "#D55E00", "#7F7F7F"
POINTS, ENERGY, LAYERS = 16, 0.95, 6


def draw_matrix(matrix: Tensor, name: str, stem: Path) -> None:
    """The unit circle, its image under W, and its image under the rank-1 approximation of W."""
    left, sizes, right = torch.linalg.svd(matrix)
    if float(left[0, 0]) < 0:  # Singular vectors may be turned round in pairs; let the long axis point to the right.
        left, right = -left, -right
    rank_one = sizes[0] * torch.outer(left[:, 0], right[0])
    start = math.atan2(float(right[0, 1]), float(right[0, 0]))
    turn = torch.linspace(0, 2 * math.pi, 321, dtype=matrix.dtype) + start
    circle = torch.stack([turn.cos(), turn.sin()])
    reach = 1.3 * max(1.0, float(sizes[0]))
    with figure(5.7, 13.5) as picture:
        panels = picture.subplots(1, 3, sharex=True, sharey=True)
        for axes, image in zip(panels, (circle, matrix @ circle, rank_one @ circle), strict=True):
            axes.plot(*image, color=FAINT, linewidth=1.6, zorder=1)
            points = image[:, :-1:20]
            axes.scatter(*points, c=range(POINTS), cmap="hsv", vmax=POINTS, s=60, zorder=3, edgecolors="white")
            axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        arrow(panels[0], right[0], LONG, "v₁")
        arrow(panels[0], right[1], SHORT, "v₂")
        arrow(panels[1], sizes[0] * left[:, 0], LONG, "σ₁ u₁")
        arrow(panels[1], sizes[1] * left[:, 1], SHORT, "σ₂ u₂")
        arrow(panels[2], sizes[0] * left[:, 0], LONG, "σ₁ u₁")
        panels[2].plot(*(matrix @ circle), color=FAINT, linewidth=1.2, linestyle=":", zorder=0)
        for point in circle[:, :-1:20].T:
            lost = torch.stack([matrix @ point, rank_one @ point]).T
            panels[2].plot(*lost, color=SHORT, linewidth=1.2, alpha=0.7, zorder=0)
        panels[0].set_title("1  All vectors of length 1")
        panels[1].set_title("2  W turns them into an ellipse")
        panels[2].set_title("3  Rank 1 leaves a line")
        below = (
            "v₁ and v₂ will be the axes of the ellipse.\nA vector keeps its colour from here on.",
            f"Its half axes are the singular values:\nσ₁ = {sizes[0]:.3g} and σ₂ = {sizes[1]:.3g}.",
            f"Only σ₁ is kept: {kept(sizes):.1%} of σ₁² + σ₂².\nOrange: what each point loses, at most σ₂.",
        )
        for axes, words in zip(panels, below, strict=True):
            axes.set_xlabel(words, labelpad=8)
        picture.suptitle(f"{name}: what it does to vectors, and what rank 1 keeps", x=0.01, ha="left", weight="bold")
        picture.supxlabel(" ", size=4)  # Room below the words under the panels.
        save_figure(picture, stem, formats=("png",))
    print(f"{name} =\n{matrix.numpy()}\nsingular values {sizes[0]:.4g} and {sizes[1]:.4g}")
    print(
        f"rank 1 keeps {kept(sizes):.1%} of the sum of their squares and errs by {sizes[1]:.4g} at most on a unit vector"
    )


def kept(sizes: Tensor) -> float:
    """Share of the squared singular values that rank 1 keeps."""
    return float(1 - tail_energy(sizes)[1])


def arrow(axes: Axes, tip: Tensor, color: str, label: str) -> None:
    """An arrow from the origin, with its label beyond the tip."""
    x, y = tip.tolist()
    axes.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 2.6}, zorder=2)
    away = 24 / math.hypot(x, y)
    axes.annotate(label, (x, y), (away * x, away * y), textcoords="offset points", ha="center", va="center", color=color,
                  weight="bold", zorder=5, bbox={"boxstyle": "round,pad=0.1", "color": "white", "alpha": 0.8})  # fmt: skip


def piece_of(layer: nn.Module, name: str) -> tuple[Tensor, str]:
    """The two largest rows of a layer's weight at the two columns where these are largest."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2 or min(flatten_weight(weight).shape) < 2:
        raise SystemExit(
            f"{name} ({type(layer).__name__}) has no weight of two rows and columns; name a Conv or Linear"
        )
    matrix = flatten_weight(weight.detach().double())
    rows = matrix.norm(dim=1).topk(2).indices.sort().values
    columns = matrix[rows].norm(dim=0).topk(2).indices.sort().values
    return matrix[rows][:, columns], f"W, rows {rows.tolist()} and columns {columns.tolist()} of {name}"


def look_at_ranks(model: nn.Module, data: DataSplits, images: int) -> dict[str, Survey]:
    """Singular values of every layer, of its weight and of its output."""
    calibration = fxprune.Calibration(list(calibration_loader(data.train, images=images)))
    found = {}
    for name, solver in (("svd", Magnitude()), ("data_aware", ADMM())):
        graph_module = trace(model)
        RemoveInplace()(graph_module)
        FoldBatchNorm()(graph_module)
        InsertObservers(fxprune.Recipe.parse("rank:0.7"))(graph_module)
        layers = [node for node in graph_module.graph.nodes if annotation(node).role == "compress"]
        method = Method(solver, low_rank_options(None, name))
        found[name] = survey(graph_module, layers, calibration, method, splits=("channel",), multiple=1)
    return found


def draw_spectra(found: dict[str, Survey], name: str, stem: Path) -> None:
    """One panel a layer: both spectra, and the rank that each needs to keep 95% of its energy."""
    layers = list(found["svd"].layers)
    step = max(1, len(layers) / LAYERS)
    shown = [layers[int(i * step)] for i in range(min(LAYERS, len(layers)))]
    columns = 2 if len(shown) in (2, 4) else 3
    rows = -(-len(shown) // columns)
    with figure(1.6 + 2.7 * rows, 4 * columns) as picture:
        panels = list(picture.subplots(rows, columns, squeeze=False).flat)
        for axes, layer in zip(panels, shown, strict=False):
            for method, color in (("svd", PLAIN), ("data_aware", LONG)):
                values = torch.tensor(found[method].layers[layer].spectra["channel"], dtype=torch.float64)
                rank = int((tail_energy(values) <= 1 - ENERGY).double().argmax())
                axes.plot(range(1, len(values) + 1), values, color=color)
                axes.plot([rank], [values[rank - 1]], "o", color=color, markersize=10, markeredgecolor="white")
                words = f"{'plain' if method == 'svd' else 'data-aware'}: rank {rank} of {len(values)}"
                axes.annotate(words, (0.97, 0.95 if method == "svd" else 0.83), xycoords="axes fraction",
                              ha="right", va="top", color=color, weight="bold", size=11)  # fmt: skip
                print(f"{layer}: {words}")
            axes.set_title(layer)
            axes.set_ylim(0, 1.08)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for axes in panels[len(shown) :]:
            axes.set_axis_off()
        picture.supylabel("singular value / the largest")
        picture.supxlabel("rank", size=12)
        picture.suptitle(f"{name}: how many directions layers use\n\n", x=0.01, ha="left", weight="bold")
        picture.text(0.01, 1 - 0.42 / (1.6 + 2.7 * rows), f"Dots: the rank that keeps {ENERGY:.0%} of the energy of the "
                     "weight (plain)\nor of the layer's output on real images (data-aware).", va="top", color=INK)  # fmt: skip
        save_figure(picture, stem, formats=("png",))


def network(args: argparse.Namespace) -> tuple[nn.Module, DataSplits]:
    """The network asked for with its weights, or a small one trained on the spot."""
    info = fxprune.models.model_info(args.model)
    data = load_data(args.data, **({} if args.data == "digits" else {"mean": info.mean, "std": info.std}))
    options = {"width": 16} if args.model == "simple_cnn" else {}
    model = fxprune.models.create(args.model, **options)
    if args.weights:
        return load_weights(model, args.weights).eval(), data
    torch.manual_seed(0)
    print(f"Training {args.model} on {args.data}, {args.epochs} epoch(s)")
    train(
        model,
        make_loader(data.train, batch_size=100, shuffle=True),
        make_loader(data.test),
        TrainingRecipe(args.epochs),
    )
    return model.eval(), data


def main() -> None:
    """Draw both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrix", nargs=4, type=float, metavar=("A", "B", "C", "D"), help="[[A, B], [C, D]]")
    parser.add_argument("--layer", help="take the matrix from this layer")
    parser.add_argument("--model", default="simple_cnn", help="a name that fxprune.models knows")
    parser.add_argument("--weights", type=Path, help="of the model; without them it is trained on the spot")
    parser.add_argument("--data", default="digits", help="name or file of a data set")
    parser.add_argument("--epochs", type=int, default=3, help="of that training")
    parser.add_argument("--images", type=int, default=512, help="calibration images for the data-aware spectra")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the pictures go")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    model, data = network(args)
    matrix, name = torch.tensor(args.matrix or MATRIX, dtype=torch.float64).reshape(2, 2), "W"
    if args.layer:
        matrix, name = piece_of(dict(model.named_modules()).get(args.layer, nn.Identity()), args.layer)
    draw_matrix(matrix, name, args.folder / "svd_pruning_visualization")
    draw_spectra(look_at_ranks(model, data, args.images), args.model, args.folder / "svd_spectra")


if __name__ == "__main__":
    main()
