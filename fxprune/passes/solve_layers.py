"""SolveLayers: walks the observed layers in graph order, gathers each one's statistics and replaces its weights.

The statistics of a layer come from the prefix that is already compressed, so every layer makes up for the ones before it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.annotations import (
    Annotation,
    Narrowing,
    Removal,
    annotate,
    annotate_graph,
    annotation,
    graph_annotation,
    report_of,
)
from fxprune.calibration.calibration import Calibration
from fxprune.calibration.macs import macs_per_sample
from fxprune.calibration.stream import CalibrationStream, Outcome, StreamedLayer
from fxprune.constraints import keep_possible
from fxprune.constraints.rank import Rank
from fxprune.consumers import skip_operands
from fxprune.errors import FxPruneError, GraphError, SolverError
from fxprune.geometry import LayerGeometry, is_matrix_layer
from fxprune.graph import module_of
from fxprune.intake.totals import little, uncovered
from fxprune.layers.checkpoint import LayerCheckpoint
from fxprune.layers.dead_outputs import many_dead_outputs, new_dead_outputs
from fxprune.layers.kept import kept_layer, layers_inside, zeros
from fxprune.layers.problem import layer_of
from fxprune.layers.recurrent import has_place_for_bias
from fxprune.layers.shared import Calls, weight_calls
from fxprune.layers.solve import SolvedLayer, SolvedPart, solve_layer
from fxprune.layers.splits import split_call
from fxprune.options import Method
from fxprune.passes.base import CalibratedPass
from fxprune.pattern import Pattern
from fxprune.ranks.plan import RankPlan
from fxprune.recipe import Recipe
from fxprune.report import LayerReport, PruneReport
from fxprune.runtime.precision import full_precision
from fxprune.runtime.processes import from_process


class SolveLayers(CalibratedPass):
    """Solves every layer with an observer under its constraints; leaves a LayerReport on every layer.

    1. In graph order each layer is solved against its target and replaced, as the calibration set streams by.
    2. Layers to be re-fitted that nothing compressed feeds keep their weights: these are the answer.
    3. A layer that became two is called as `name.0` and `name.1`.

    Args:
        recipe: what was asked for, for the report.
        method: solver and options.
    """

    def __init__(self, recipe: Recipe, method: Method) -> None:
        self.recipe = recipe
        self.method = method

    def calibrate(self, graph_module: GraphModule, calibration: Calibration) -> PassResult:  # noqa: D102
        roles = {
            n: a
            for n in graph_module.graph.nodes
            if (a := annotation(n)).role not in ("", "repeat") and a.report is None
        }
        if not roles and report_of(graph_module) is not None:
            return PassResult(graph_module, False)
        if roles:
            self._require_something(roles)
        removal = graph_annotation(graph_module).removal
        before = _macs(graph_module, calibration) if _has_ranks(roles) else 0
        with torch.no_grad(), full_precision():
            found, outcome = self._solve_all(graph_module, roles, calibration)
        for node, decided in roles.items():
            annotate(
                node, report=_with_channels(found.get(node) or kept_layer(node, decided.reason), decided.narrowing)
            )
        for node in roles:
            if isinstance(module_of(node), nn.Sequential):
                self._split(graph_module, node)
        layers: list[LayerReport] = []
        for node in graph_module.graph.nodes:
            done = annotation(node).report
            layers += [done] if done is not None else layers_inside(node)
        layers += uncovered(graph_module, layers)
        self._tell_of_little(graph_module, layers, calibration)
        if dead := many_dead_outputs(layers):
            calibration.warn(dead)
        report = PruneReport(
            layers=tuple(layers),
            method=self.method.name,
            pattern=self._asked_for(roles, removal),
            images=outcome.source.images,
            images_read=outcome.source.images_read,
            images_held_out=outcome.source.held_out,
            timings=dict(calibration.stopwatch.seconds),
            peak_memory=outcome.peak_bytes,
            agreement=outcome.agreement,
            kl=outcome.kl,
            output_errors=outcome.output_errors,
            why_no_classes=outcome.why_no_classes,
            macs=(removal.macs[0] if removal else before, _macs(graph_module, calibration))
            if before or removal
            else (),
            parameters=(removal.parameters[0], _parameters(graph_module)) if removal else (),
        )
        annotate_graph(graph_module, report=report)
        return PassResult(graph_module, any(layer.status != "kept" for layer in layers))

    def _require_something(self, roles: Mapping[Node, Annotation]) -> None:
        """Raise GraphError, before any work, if the recipe asks for something and no layer can take it."""
        asks = any(chain for _, chain in self.recipe.entries)
        reasons = Counter(decided.reason for decided in roles.values())
        by_the_user = {"excluded", *(decided.changed for decided in roles.values() if decided.changed)}  # Hooks, too.
        if not asks or any(decided.role == "compress" for decided in roles.values()) or set(reasons) <= by_the_user:
            return
        if any(decided.reason == "excluded" and self._could_take(node) for node, decided in roles.items()):
            return  # What could have been compressed, the user has excluded.
        told = "; ".join(
            f"{reason} ({count} layer{'s' if count > 1 else ''})" for reason, count in reasons.most_common(3)
        )
        raise GraphError(
            f"nothing can be compressed to {self.recipe}: of {len(roles)} layers none can take it. Why: {told}. "
            f"{self._remedy(roles)}"
        )

    def _could_take(self, node: Node) -> bool:
        """Whether a layer could hold something of what the recipe asks of it."""
        module = module_of(node)
        chain = self.recipe.chain(str(node.target)) or ()
        return is_matrix_layer(module) and bool(keep_possible(chain, LayerGeometry.of(module))[0])

    def _remedy(self, roles: Mapping[Node, Annotation]) -> str:
        """What to do where no layer can take the recipe."""
        for node, decided in roles.items():
            module = module_of(node)
            if not is_matrix_layer(module):
                continue
            geometry, chain = LayerGeometry.of(module), self.recipe.chain(str(node.target)) or ()
            by_recipe = decided.reason == keep_possible(chain, geometry)[1]
            if by_recipe and Pattern.parse("0.5").decline(geometry) is None:
                return "Choose another pattern, such as '0.5', which any layer with 4 input channels or more can hold"
        return "No other pattern would help: choose other layers, or leave this model dense"

    def _tell_of_little(self, graph_module: GraphModule, rows: Sequence[LayerReport], calibration: Calibration) -> None:
        """Warn if less than half of the weights were compressed, though the recipe is one for all layers."""
        done = any(row.is_compressed for row in rows)
        # A budget of MACs is kept or refused, and may well leave whole what holds the weights.
        within_budget = all(
            constraint.is_of_graph or (constraint.changes_geometry and constraint.is_shared(self.method))
            for _, chain in self.recipe.entries
            for constraint in chain
        )
        if calibration.is_part or (done and within_budget):
            return  # It is the whole that counts, and the budget.
        if self.recipe.is_uniform and (done or any(annotation(node).changed for node in graph_module.graph.nodes)):
            if message := little(graph_module, rows, str(self.recipe)):
                calibration.warn(message)

    def _solve_all(
        self, graph_module: GraphModule, roles: Mapping[Node, Annotation], calibration: Calibration
    ) -> tuple[dict[Node, LayerReport], Outcome]:
        """Solve layer after layer as the calibration set streams by."""
        calls = weight_calls(graph_module)
        exact = unaffected(graph_module, roles, calls)
        to_solve = [n for n, a in roles.items() if a.role in ("compress", "reconstruct") and n not in exact]
        checkpoint = LayerCheckpoint.open(calibration.checkpoint_dir, graph_module, self.method)
        fit = self.method.needs_statistics
        dense = calibration.dense if graph_annotation(graph_module).removal else None
        options = self.method.options
        mix = bool(options.temperature)
        stream = CalibrationStream.of(graph_module, calibration, options, fit=fit, mix=mix, dense=dense)

        def report(node: Node, layer: SolvedLayer) -> LayerReport:
            return self._report(graph_module, node, roles[node], layer, len(calls[node]))

        found = {node: report(node, SolvedLayer((_as_it_is(node),))) for node in exact}
        for layer in stream.layers(to_solve, gather=lambda node: not checkpoint.has(str(node.target))):
            name = str(layer.node.target)
            calibration.on_layer(name, len(to_solve) + 1)
            checkpoint.check_data(stream.source.fingerprint)
            solved = checkpoint.load(name)
            if solved is None:
                started = time.perf_counter()
                # The same bits in all processes, whatever rounding has made of each one's.
                solved = from_process(0, self._solve(layer, roles[layer.node], stream))
                solved = replace(solved, seconds=time.perf_counter() - started)
                checkpoint.save(name, solved)
            found[layer.node] = report(layer.node, solved)
            layer.replace(solved)
            if layer.node is to_solve[-1]:
                calibration.on_layer("output", len(to_solve) + 1)
        for node, row in found.items():
            error = 0.0 if node in exact else stream.outcome.errors[node]
            found[node] = replace(row, relative_error=error)
        return found, stream.outcome

    def _solve(self, layer: StreamedLayer, decided: Annotation, stream: CalibrationStream) -> SolvedLayer:
        inputs = layer.inputs if self.method.needs_statistics else None
        module, method = layer_of(layer.node), self.method
        if not has_place_for_bias(stream.graph_module, str(layer.node.target)):
            method = replace(method, options=replace(method.options, bias_correction=False))
        try:
            with stream.stopwatch.measure("solve"):
                return solve_layer(
                    module,
                    layer.geometry,
                    decided.chain,
                    method,
                    inputs,
                    layer.cross,
                    layer.relu_aware,
                    layer.check,
                    layer.logits,
                )
        except FxPruneError as error:
            raise SolverError(f"layer {layer.node.target!r}: {error}") from error

    def _report(
        self, graph_module: GraphModule, node: Node, decided: Annotation, layer: SolvedLayer, calls: int
    ) -> LayerReport:
        """What is being done to a layer of so many calls, written down and as the layer's row."""
        module, parts = layer_of(node), layer.parts
        rank = next((c for c in decided.chain if isinstance(c, Rank)), None)
        pattern = next((part.pattern for part in parts if part.pattern), "")
        factored = len(parts) > 1
        status = "factored" if factored else "pruned" if decided.chain else "reconstructed"
        geometry = parts[0].geometry
        unusual = [f"one weight at {calls} places"] if calls > 1 else []
        if geometry.blocks > 1:
            unusual.append(f"in {geometry.blocks} blocks of {geometry.columns:,} columns")
        reason = "; ".join([decided.reason, *unusual] if decided.reason else unusual)
        if rank is not None and rank.choice is not None and factored:
            reason = f"{rank.choice.split} split"
        elif decided.chain or decided.narrowing is None or not decided.narrowing.lost_any:
            self.record(graph_module, status, node, reason=reason)
        numel = sum(part.weight.numel() for part in parts)
        return LayerReport(
            name=str(node.target),
            op=type(module).__name__,
            shape=tuple(module.weight.shape),
            pattern=pattern,
            status=status,
            reason=reason,
            sparsity=sum(zeros(part.weight) * part.weight.numel() for part in parts) / numel,
            dead_outputs=sum(new_dead_outputs(part.geometry, part.weight, module.weight) for part in parts),
            damping=layer.damping,
            correction=layer.correction,
            logit_scale=layer.logit_scale,
            dead_inputs=layer.dead_inputs,
            seconds=layer.seconds,
            rank=rank.choice.rank if rank is not None and rank.choice is not None and factored else 0,
            macs=rank.macs if rank is not None and factored else (),
        )

    def _asked_for(self, roles: Mapping[Node, Annotation], removal: Removal | None) -> str:
        """The recipe in words; where all layers share one rule for ranks or channels, with what came of it."""
        rules = {
            c.rule.rule for a in roles.values() for c in a.chain if isinstance(c, Rank) and isinstance(c.rule, RankPlan)
        }
        if not self.recipe.is_uniform or not (len(rules) == 1 or removal):
            return str(self.recipe)
        rule = next(iter(rules)) if len(rules) == 1 else ""
        of_graph = removal.rule if removal else ""
        return "+".join(
            rule if rule and isinstance(c, Rank) else of_graph if of_graph and c.is_of_graph else str(c)
            for c in self.recipe.entries[0][1]
        )

    def _split(self, graph_module: GraphModule, node: Node) -> None:
        """Turn the call of an nn.Sequential of two layers into two calls, each with its own row where it is masked."""
        layer = annotation(node).report
        assert layer is not None
        second = split_call(node)
        self.record(graph_module, "replaced", node, into=second.name, reason=f"rank {layer.rank}, {layer.reason}")
        first = second.all_input_nodes[0]
        graph_module.graph.erase_node(node)
        if not layer.pattern:
            annotate(second, report=layer)
            return
        for call, whole in ((first, False), (second, True)):
            module = layer_of(call)
            masked = bool((module.weight == 0).any())
            row = replace(
                layer,
                name=str(call.target),
                shape=tuple(module.weight.shape),
                pattern=layer.pattern if masked else "",
                status="pruned" if masked else "factored",
                reason=f"{'second' if whole else 'first'} factor of {layer.name!r}, {layer.reason}",
                sparsity=zeros(module.weight),
                dead_outputs=new_dead_outputs(LayerGeometry.of(module), module.weight),
                relative_error=layer.relative_error if whole else None,
                seconds=layer.seconds if whole else 0.0,
                macs=layer.macs if whole else (),
            )
            annotate(call, report=row)


def unaffected(graph_module: GraphModule, roles: Mapping[Node, Annotation], calls: Calls) -> list[Node]:
    """The layers to be re-fitted that keep their weights: nothing compressed feeds them, or what they are added to."""
    changed: set[Node] = set()
    found = []
    for node in graph_module.graph.nodes:
        decided = roles.get(node)
        sources = {*node.all_input_nodes}
        if decided is not None and decided.role == "reconstruct":
            if changed.isdisjoint({*sources, *skip_operands(node)}):
                found.append(node)
            else:
                changed.add(node)
        elif decided is not None and decided.role == "compress":
            changed.update(calls[node])
        elif not changed.isdisjoint(sources):
            changed.add(node)
    return found


def _with_channels(row: LayerReport, narrowing: Narrowing | None) -> LayerReport:
    """A layer's row with what the removal of channels has done to it."""
    if narrowing is None or not narrowing.lost_any:
        return row
    status = "narrowed" if row.status in ("reconstructed", "kept") else row.status
    after = row.macs[1] if row.macs else narrowing.macs[1]
    return replace(
        row,
        status=status,
        reason="; ".join(filter(None, (str(narrowing), row.reason))),
        channels=(*narrowing.inputs, *narrowing.outputs),
        macs=(narrowing.macs[0], after),
    )


def _as_it_is(node: Node) -> SolvedPart:
    module = layer_of(node)
    bias: Tensor | None = module.bias
    return SolvedPart(LayerGeometry.of(module), module.weight.detach(), None if bias is None else bias.detach())


def _has_ranks(roles: Mapping[Node, Annotation]) -> bool:
    return any(isinstance(constraint, Rank) for decided in roles.values() for constraint in decided.chain)


def _parameters(graph_module: GraphModule) -> int:
    return sum(parameter.numel() for parameter in graph_module.parameters())


def _macs(graph_module: GraphModule, calibration: Calibration) -> int:
    """Of all Conv and Linear modules for one sample."""
    return sum(macs_per_sample(calibration.example(graph_module)).values())
