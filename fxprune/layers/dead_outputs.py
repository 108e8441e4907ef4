"""Output channels of which pruning has left no weight: they are constant, and a pattern by itself does not say so."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fxprune.geometry import LayerGeometry
from fxprune.report import LayerReport

MANY = 0.25  # Of a layer's output channels.


def dead_outputs(geometry: LayerGeometry, weight: Tensor) -> Tensor:
    """Which output channels of a layer have zero weights only, (R,) bool."""
    dead = (geometry.to_matrix(weight.detach()) == 0).all(-1)
    return dead.reshape(-1, geometry.blocks, geometry.rows).all(1).flatten()


def new_dead_outputs(geometry: LayerGeometry, weight: Tensor, dense: Tensor | None = None) -> int:
    """How many of them there are now that were not in the dense weight; None, or another shape, had none."""
    dead = dead_outputs(geometry, weight)
    if dense is not None and dense.shape == weight.shape:
        dead &= ~dead_outputs(geometry, dense)
    return int(dead.sum())


def many_dead_outputs(rows: Sequence[LayerReport]) -> str:
    """A warning, if some layer has lost a quarter of its output channels without their having been removed; else ""."""
    hit = [row for row in rows if row.dead_outputs and row.dead_outputs >= MANY * _outputs(row)]
    if not hit:
        return ""
    worst = max(hit, key=lambda row: row.dead_outputs / _outputs(row))
    others = f", and {len(hit) - 1} layers more have lost a quarter or more" if len(hit) > 1 else ""
    return (
        f"{worst.dead_outputs} of {_outputs(worst)} output channels of {worst.name} have lost all their weights{others}: the "
        "recipe asks for much there. A lower sparsity for such layers, 'mixed:...' or Options(global_budget=True) spread it "
        "otherwise; 'channels:...' removes channels and makes the network smaller"
    )


def _outputs(row: LayerReport) -> int:
    """Output channels of a layer, or at least as many."""
    return max(1, row.shape[0] if "Transpose" not in row.op else max(row.shape[:2]))
