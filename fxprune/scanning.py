"""scan(): what each layer would cost at the output under each of several recipes, before anything is compressed."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxprune import solvers
from fxprune.annotations import annotation
from fxprune.calibration.calibration import Calibration
from fxprune.calibration.macs import macs_per_sample
from fxprune.compiler import checked_memory, traced
from fxprune.constraints import Chain, Constraint, parse_chain
from fxprune.constraints.mask import Mask
from fxprune.constraints.rank import Rank
from fxprune.constraints.sensitivity import sensitivities
from fxprune.errors import OptionsError, PatternError
from fxprune.options import Method, Options, given_options
from fxprune.passes import CheckHooks, CheckImages, FoldBatchNorm, InsertObservers, RemoveInplace, UnrollRecurrent
from fxprune.ranks.plan import RankRule
from fxprune.recipe import Recipe
from fxprune.runtime.devices import default_device
from fxprune.runtime.processes import together, world
from fxprune.runtime.progress import layer_progress
from fxprune.runtime.surroundings import undisturbed
from fxprune.solvers import Solver
from fxprune.tables import Column, as_text, table, terminal_width


@dataclass(frozen=True)
class ScannedLayer:
    """One layer under one recipe.

    Attributes:
        name: of the layer.
        recipe: the constraints, in words.
        cost: ||y_dense - y||^2 / ||y_dense - mean||^2 of the model's outputs with only this layer compressed; NaN where the
            layer cannot keep the recipe.
        error: the same of the layer's own output, the mean not removed; NaN likewise.
        sparsity: share of zeros among its weights then.
        weights: number of weights of the layer as it is.
        macs: of the layer as it is, for one sample.
        reason: why it cannot keep the recipe, or "".
    """

    name: str
    recipe: str
    cost: float
    error: float
    sparsity: float
    weights: int
    macs: int
    reason: str = ""


@dataclass(frozen=True)
class Scan:
    """Every layer under every recipe, layers in graph order, and the recipes of each in the order in which they were given."""

    layers: tuple[ScannedLayer, ...]

    @property
    def recipes(self) -> tuple[str, ...]:
        """In the order in which they were given."""
        return tuple(dict.fromkeys(row.recipe for row in self.layers))

    def __getitem__(self, key: tuple[str, str]) -> ScannedLayer:
        """The row of a layer and a recipe, `scan["conv1", "2:4"]`."""
        for row in self.layers:
            if (row.name, row.recipe) == key:
                return row
        raise KeyError(f"no row for {key}; layers: {', '.join(dict.fromkeys(row.name for row in self.layers))}")

    def __str__(self) -> str:
        return self.render()

    def render(self, *, width: int | None = None, color: bool = False) -> str:
        """The table as text of at most `width` columns (None: the terminal's), with ANSI colours if asked for."""
        columns = [
            Column("layer"), Column("weights", right=True, leaves=1), Column("MACs", right=True, leaves=2),
            *(Column(recipe, right=True) for recipe in self.recipes),
        ]  # fmt: skip
        by_name: dict[str, list[ScannedLayer]] = {}
        for row in self.layers:
            by_name.setdefault(row.name, []).append(row)
        rows, notes = [], []
        for name, of in by_name.items():
            costs = ["" if math.isnan(row.cost) else f"{row.cost:.2e}" for row in of]
            rows.append([name, f"{of[0].weights:,}", f"{of[0].macs:,}", *costs])
            notes.append("; ".join(dict.fromkeys(row.reason for row in of if row.reason)))
        title = "Relative error at the output with one layer compressed"
        width = terminal_width() if width is None else width
        drawn = table(columns, rows, notes, width=width, title=title, note_heading="why not")
        return as_text(drawn, width=width, color=color)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write one row a layer and recipe, with the field names of ScannedLayer as the header."""
        names = list(ScannedLayer.__dataclass_fields__)
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            writer.writerows([getattr(row, name) for name in names] for row in self.layers)


@together()
@undisturbed
def scan(
    model: nn.Module | str | PathLike[str],
    calib_loader: Iterable[Any],
    recipes: Sequence[str] = ("2:4", "1:4"),
    *,
    method: str | Solver = "admm",
    exclude: Sequence[str] = (),
    options: Options | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    memory_limit: int | None = None,
) -> Scan:
    """Measure, for each layer and recipe, what it costs at the model's output to compress that layer alone.

    Each layer is solved on the dense model's statistics and put in place by itself; the model is not changed. The same figures
    are what "mixed:0.6" and `Options(global_budget=True)` go by.

    Args:
        model: trained model, or an ONNX file.
        calib_loader: as for `compile`; read once and held in memory.
        recipes: chains, such as "2:4", "0.9", "rank:0.5" (half of the layer's own MACs), "rank:0.5+2:4".
        method: solver, by name or as an object.
        exclude: module names or fnmatch patterns of layers to leave out.
        options: as for `compile`.
        device: where to compute; None takes CUDA if there is one.
        progress: show a progress bar.
        memory_limit: as for `compile`.

    Raises:
        FxPruneError: a subclass that names what is wrong, and the remedy.
    """
    chains = [_by_layer(parse_chain(recipe)) for recipe in recipes]
    if of_graph := [str(constraint) for chain in chains for constraint in chain if constraint.is_of_graph]:
        raise PatternError(
            f"{of_graph[0]} is decided over the whole network, since layers share channels: it has no price for one layer "
            "alone; leave it out, or use fxprune.compile"
        )
    solver = solvers.get(method)
    together = Recipe(tuple((f"recipe {i}", chain) for i, chain in enumerate(chains)))
    how = Method(solver, replace(given_options(options).resolved(solver, together), global_budget=False))
    calibration = Calibration(
        calib_loader,
        device=default_device(device),
        holdout=how.options.holdout,
        seed=how.options.seed,
        memory_limit=checked_memory(memory_limit),
    )
    with layer_progress(progress and world().is_first) as calibration.on_layer:
        graph_module = traced(model, calibration, exclude=exclude)
        graph_module.to(calibration.device)
        CheckHooks()(graph_module, calibration)
        CheckImages()(graph_module, calibration)
        RemoveInplace()(graph_module)
        if how.options.fold_batchnorm:
            FoldBatchNorm(exclude=exclude)(graph_module)
        UnrollRecurrent(exclude=exclude)(graph_module, calibration)
        InsertObservers(Recipe((("*", ()),)), exclude=exclude)(graph_module)
        layers = [node for node in graph_module.graph.nodes if annotation(node).geometry is not None]
        given = [_allocated(graph_module, layers, chain, calibration, how) for chain in chains]
        by_layer = {node: [own for own, _ in (of[node] for of in given)] for node in layers}
        found = sensitivities(graph_module, by_layer, calibration, how, probe_every=1)
        macs = macs_per_sample(calibration.example(graph_module))
    rows = []
    for node in layers:
        of = found[node]
        for i, recipe in enumerate(recipes):
            reason = given[i][node][1]
            figures = (of.costs[i], of.errors[i], of.sparsities[i])
            rows.append(ScannedLayer(str(node.target), recipe, *figures, of.weights, macs[node], reason))
    return Scan(tuple(rows))


def _by_layer(chain: Chain) -> Chain:
    """The chain with budgets of the network made the layer's own.

    Raises:
        OptionsError: it holds a choice over layers, which one layer alone does not have.
    """
    own: list[Constraint] = []
    for constraint in chain:
        if isinstance(constraint, Mask) and "mixed" in str(constraint):
            raise OptionsError(f"{constraint} is a choice over layers; scan what it chooses from, '2:4' and '1:4'")
        if isinstance(constraint, Rank) and isinstance(constraint.rule, RankRule):
            if constraint.rule.kind == "speedup":
                raise OptionsError(f"{constraint} is measured on the whole network; scan 'rank:0.5' or the like")
            if constraint.rule.kind == "macs":
                constraint = replace(constraint, rule=RankRule("ratio", constraint.rule.value))
        own.append(constraint)
    return tuple(own)


def _allocated(
    graph_module: GraphModule, layers: Sequence[Node], chain: Chain, calibration: Calibration, method: Method
) -> dict[Node, tuple[Chain | None, str]]:
    """For each layer the chain as it would be solved, or None with the reason why it cannot keep it."""
    found: dict[Node, tuple[Chain | None, str]] = {}
    for node in layers:
        geometry = annotation(node).geometry
        assert geometry is not None
        reason = chain[0].decline(geometry) if chain else None
        found[node] = (None, reason) if reason is not None else (chain, "")
    for constraint in chain:
        if isinstance(constraint, Rank):
            able = [node for node, (own, _) in found.items() if own is not None]
            for node, own in constraint.allocate(graph_module, able, calibration, method).items():
                if isinstance(own, str):
                    found[node] = (None, own)
                else:
                    found[node] = (tuple(own if c == constraint else c for c in chain), "")
    return found
