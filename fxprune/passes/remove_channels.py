"""RemoveChannels: takes the channels out of the graph that its later layers miss least, until few enough MACs are left.

Layers that share channels decide together, so this is settled before layers are solved. The graph that comes out is a smaller
one: no masks, and whatever comes after sees a model like any other. Layers that read channels that are gone are fitted again
at once, each to its own dense output. `SolveLayers` then fits all layers in one stream to what the model computed before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.annotations import (
    Narrowing,
    Removal,
    annotate,
    annotate_graph,
    annotation,
    changed_modules,
    graph_annotation,
)
from fxprune.calibration.batches import tensors_in
from fxprune.calibration.calibration import Calibration
from fxprune.calibration.dense_twin import DenseTwin
from fxprune.calibration.macs import macs_per_sample
from fxprune.calibration.shapes import Example
from fxprune.calibration.stream import checked_dense_statistics
from fxprune.channels import Channels as Analysis
from fxprune.channels import analyse_channels
from fxprune.channels.remove import remove_channels
from fxprune.constraints.channels import Channels
from fxprune.errors import GraphError, OptionsError
from fxprune.geometry import LayerGeometry, is_matrix_layer, laid_out_like
from fxprune.graph import module_of
from fxprune.layers.problem import layer_of
from fxprune.options import Method
from fxprune.passes.base import CalibratedPass
from fxprune.passes.insert_observers import MAX_COLUMNS, InsertObservers
from fxprune.recipe import Recipe
from fxprune.runtime.precision import full_precision
from fxprune.runtime.processes import of_first, on_first
from fxprune.widths.network import LayerSize, Width, columns_of, find_widths, layer_sizes
from fxprune.widths.plan import least_cost, within_budget
from fxprune.widths.speedup import counts_for_speedup, measured_speed, with_times
from fxprune.widths.survey import Readers, SurveyedWidth, by_size, survey


@dataclass(frozen=True)
class _Found:
    """What is known of a graph when its channels are to be chosen: see `fxprune.widths` for each."""

    channels: Analysis
    widths: list[Width]
    reasons: dict[Node, str]
    sizes: dict[Node, LayerSize]
    example: Example
    observed: GraphModule  # A copy with observers.


class RemoveChannels(CalibratedPass):
    """Removes channels under the recipe's budgets ("channels:0.6"); to be run before InsertObservers.

    1. Channels that an add, a concatenation or a product ties go together everywhere: those of residual streams, of
       depthwise convolutions, whole groups of grouped ones (`fxprune.channels`). What is not understood keeps its channels.
    2. Which go is group OBS on all layers that read them; how many, the least sum of errors within the budget
       (`fxprune.widths`). Methods that see no images go by the size of the weights.
    3. Rows, columns, biases, parameters of channels and numbers in the graph that count channels are cut.
    4. The graph as it was is kept as the dense model for what comes after (`Calibration.dense`).

    A budget is a share of the MACs of those layers for which the recipe has it. Their input channels can go; outputs of others
    go where all layers that read them have it.

    Args:
        recipe: which layers have which budget.
        method: solver and options.
        exclude: module names or fnmatch patterns of layers to leave exactly as they are.

    Raises:
        GraphError: the graph is observed already.
        OptionsError: a budget is out of reach.
    """

    def __init__(self, recipe: Recipe, method: Method, *, exclude: Sequence[str] = ()) -> None:
        self.recipe = recipe
        self.method = method
        self.exclude = tuple(exclude)

    def requires(self, graph_module: GraphModule) -> None:  # noqa: D102 - documented on Pass
        if any(annotation(node).role for node in graph_module.graph.nodes):
            raise GraphError("RemoveChannels has to run before InsertObservers")

    def calibrate(self, graph_module: GraphModule, calibration: Calibration) -> PassResult:  # noqa: D102
        asked = {node: c for node in graph_module.graph.nodes if (c := self._asked_of(node)) is not None}
        if not asked or graph_annotation(graph_module).removal is not None:
            return PassResult(graph_module, False)
        calibration.hold()
        if calibration.dense is None:
            calibration.dense = DenseTwin(copy.deepcopy(graph_module))
        with torch.no_grad(), full_precision():
            before = _counts(graph_module, calibration)
            narrowed = {node: _widths_of(node) for node in graph_module.graph.nodes if is_matrix_layer(module_of(node))}
            macs = macs_per_sample(calibration.example(graph_module))
            reasons: dict[Node, str] = {}
            rules = []
            for constraint in dict.fromkeys(asked.values()):
                layers = [node for node, own in asked.items() if own == constraint]
                rules.append(self._narrow(graph_module, constraint, layers, macs, calibration, reasons))
            after = macs_per_sample(calibration.example(graph_module))
            for node, (inputs, outputs) in narrowed.items():
                left = _widths_of(node)
                reason = "" if left[0] < inputs else reasons.get(node, "")
                change = Narrowing((inputs, left[0]), (outputs, left[1]), (macs[node], after[node]), reason)
                annotate(node, narrowing=change)
                self._tell(graph_module, node, change)
        totals = tuple(zip(before, _counts(graph_module, calibration), strict=True))
        annotate_graph(graph_module, removal=Removal("; ".join(rules), *totals))
        return PassResult(graph_module, any(a.lost_any for n in narrowed if (a := annotation(n).narrowing) is not None))

    def _asked_of(self, node: Node) -> Channels | None:
        if not is_matrix_layer(module_of(node)):
            return None
        chain = self.recipe.chain(str(node.target)) or ()
        return next((constraint for constraint in chain if isinstance(constraint, Channels)), None)

    def _tell(self, graph_module: GraphModule, node: Node, change: Narrowing) -> None:
        if change.lost_any:
            self.record(graph_module, "narrowed", node, reason=str(change))
        else:
            self.record(graph_module, "kept", node, reason=change.reason or "its channels are worth their MACs")

    def _narrow(
        self,
        graph_module: GraphModule,
        constraint: Channels,
        layers: Sequence[Node],
        macs: Mapping[Node, int],
        calibration: Calibration,
        reasons: dict[Node, str],
    ) -> str:
        """Choose and remove under one budget; gives the rule in words."""
        found = self._find(graph_module, constraint, calibration)
        reasons.update(found.reasons)
        whole, sizes = sum(macs[node] for node in layers), {node: found.sizes[node] for node in layers}
        with ExitStack() as stack:
            readers = self._readers(found, calibration, stack)
            multiple = self.method.options.channel_multiple
            if readers is None:
                surveyed = by_size(found.channels, found.widths, multiple=multiple)
            else:
                surveyed = survey(graph_module, found.channels, found.widths, readers, calibration, multiple=multiple)
            surveyed = of_first(surveyed)
            curves = [width.curve for width in surveyed]
            if constraint.speedup:
                calibration.on_layer("measuring", 0)
                example = list(tensors_in(calibration.images(graph_module, 1)))
                factor = constraint.speedup

                def measured() -> tuple[list[int], float]:
                    shapes, timed = found.example.shapes, with_times(sizes, curves, found.example)
                    with measured_speed(graph_module, found.channels, shapes, found.widths, example) as speed:
                        return counts_for_speedup(curves, timed, factor, speed)

                counts, reached = on_first(measured)
            else:
                budget, of_layers = constraint.share * whole, [*sizes.values()]
                if (least := least_cost(curves, of_layers)) > budget:
                    raise OptionsError(_out_of_reach(constraint, least, whole, found, multiple))
                counts, reached = within_budget(curves, of_layers, budget), 0.0
            self._remove(graph_module, found, surveyed, counts, readers, calibration)
        return f"{constraint}, measured {reached:.2f}" if reached else str(constraint)

    def _find(self, graph_module: GraphModule, constraint: Channels, calibration: Calibration) -> _Found:
        example = calibration.example(graph_module)
        fixed = (*self.exclude, *changed_modules(graph_module))
        channels = analyse_channels(graph_module, example.shapes, exclude=fixed)
        observed = copy.deepcopy(graph_module)
        InsertObservers(Recipe.parse("dense"), exclude=fixed, observe=self.method.solver.needs_statistics)(observed)
        twins = {node.name: node for node in observed.graph.nodes}

        def allowed(node: Node) -> str:
            if self._asked_of(node) != constraint:
                return f"the recipe does not ask {str(node.target)!r} for {constraint}"
            columns = LayerGeometry.of(layer_of(node)).columns
            if annotation(twins[node.name]).geometry is not None:
                return ""
            many = columns > MAX_COLUMNS and self.method.solver.needs_statistics
            return (
                f"its {columns:,} columns are too many to choose among" if many else annotation(twins[node.name]).reason
            )

        widths, reasons = find_widths(channels, allowed)
        sizes = layer_sizes(channels, widths, example)
        return _Found(channels, widths, reasons, sizes, example, observed)

    def _readers(self, found: _Found, calibration: Calibration, stack: ExitStack) -> Readers | None:
        """The problems of the layers that read channels; None if no images are seen."""
        if not self.method.solver.needs_statistics or not found.widths:
            return None
        twins = {node.name: node for node in found.observed.graph.nodes}
        wanted = {reader: twins[reader.name] for width in found.widths for reader in width.readers}
        calibration.on_layer("choosing channels", 0)
        twins_wanted = list(dict.fromkeys(wanted.values()))
        of_twins, checks = stack.enter_context(
            checked_dense_statistics(found.observed, calibration, self.method.options, twins_wanted)
        )
        return Readers(
            {node: of_twins[twin] for node, twin in wanted.items()},
            {node: checks[twin] for node, twin in wanted.items() if twin in checks},
            self.method.options,
        )

    def _remove(
        self,
        graph_module: GraphModule,
        found: _Found,
        surveyed: Sequence[SurveyedWidth],
        counts: Sequence[int],
        readers: Readers | None,
        calibration: Calibration,
    ) -> None:
        """Fit the readers without what goes, and cut."""
        gone: list[int] = []
        left: dict[Node, torch.Tensor] = {}
        for width, of, count in zip(found.widths, surveyed, counts, strict=True):
            numbers = of.gone(count)
            gone += [c for number in numbers for c in found.channels.units[width.units[number]].tolist()]
            for node in width.readers if numbers and readers is not None else ():
                geometry = LayerGeometry.of(layer_of(node))
                stay = left.setdefault(node, torch.ones(geometry.columns, dtype=torch.bool))
                stay[columns_of(found.channels, width, node)[numbers].flatten()] = False
        for node, stay in left.items():
            assert readers is not None
            module = layer_of(node)
            matrix, shift = readers.fitted(node, stay.nonzero()[:, 0].to(module.weight.device))
            weight = LayerGeometry.of(module).to_weight(matrix[None]).to(module.weight)
            module.weight.data = laid_out_like(module.weight, weight)
            if shift is not None:
                shift = shift.to(module.weight)
                bias = shift if module.bias is None else module.bias.detach() + shift
                module.bias = nn.Parameter(bias, requires_grad=module.weight.requires_grad)
        kept = remove_channels(graph_module, found.channels, np.array(gone, dtype=np.int64), found.example.shapes)
        assert calibration.dense is not None
        calibration.dense.moved(kept)


def _out_of_reach(constraint: Channels, least: float, whole: int, found: _Found, multiple: int) -> str:
    told = "; ".join(list(dict.fromkeys(f"{node.target!r}: {why}" for node, why in found.reasons.items()))[:3])
    why = f". Some channels have to stay: {told}" if told else ""
    remedy = "ask for more" if multiple == 1 else f"ask for more, or for a smaller Options(channel_multiple={multiple})"
    return f"{constraint} is out of reach: at least {least / whole:.2%} of {whole / 1e6:.1f} M MACs stay; {remedy}{why}"


def _counts(graph_module: GraphModule, calibration: Calibration) -> tuple[int, int]:
    """MACs of all layers for one sample, and parameters."""
    macs = sum(macs_per_sample(calibration.example(graph_module)).values())
    return macs, sum(parameter.numel() for parameter in graph_module.parameters())


def _widths_of(node: Node) -> tuple[int, int]:
    geometry = LayerGeometry.of(layer_of(node))
    return geometry.in_channels, geometry.out_channels
