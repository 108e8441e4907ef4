"""survey(): in which order the units of each width go, and what the network loses, from one run of the dense model.

The order is that of group OBS (`fxprune/solvers/channel_elimination.py`) on all layers that read the units: each error relative
to the variance of what that layer's output is added into. What a whole width costs is then measured at the model's output, with
only this width narrowed and its readers fitted again, at a few points of the curve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxprune.calibration.calibration import Calibration
from fxprune.calibration.observers import observers_off
from fxprune.calibration.output_error import OutputError, channel_dim
from fxprune.channels.layout import Channels
from fxprune.constraints.sensitivity import outputs_of, probe_of
from fxprune.consumers import consumers
from fxprune.geometry import LayerGeometry, laid_out_like
from fxprune.graph import Runner
from fxprune.layers.problem import layer_of, mean_product
from fxprune.options import Options
from fxprune.solvers.channel_elimination import Elimination, ReadUnits, eliminate
from fxprune.solvers.problem import LayerProblem
from fxprune.statistics import InputStatistics
from fxprune.widths.network import Width, columns_of, rows_of
from fxprune.widths.plan import Curve

PROBES = (0.25, 0.5, 0.75)  # Shares of a width's units that are gone where the model's output is measured.


@dataclass(frozen=True)
class SurveyedWidth:
    """What a survey found out about one width.

    Attributes:
        order: (n,) numbers of its units within the width, the first to go first; those that stay in any case last.
        curve: what it costs.
    """

    order: Tensor
    curve: Curve

    def gone(self, left: int) -> list[int]:
        """Numbers of the units that are not among the `left` best."""
        gone: list[int] = self.order[: len(self.order) - left].tolist()
        return gone


class Readers:
    """The least-squares problems of the layers that read channels, posed when they are asked for, on the dense model.

    Args:
        statistics: of the inputs of the layers.
        options: resolved.
    """

    def __init__(self, statistics: Mapping[Node, InputStatistics], options: Options) -> None:
        self.statistics = statistics
        self.options = options
        self._known: dict[Node, tuple[LayerProblem, Tensor]] = {}

    def problem(self, node: Node) -> LayerProblem:
        """What the layer's own dense output asks of it, (D, D) and (R, D)."""
        return self._of(node)[0]

    def inverse(self, node: Node) -> Tensor:
        """H^-1, (D, D)."""
        return self._of(node)[1]

    def fitted(self, node: Node, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """The best weights (R, D) on some columns, zero elsewhere, and what to add to the bias (R,), if biases are fitted."""
        problem = self.problem(node)
        matrix = torch.zeros_like(problem.weight)
        factor = torch.linalg.cholesky(problem.hessian[columns][:, columns])
        matrix[:, columns] = torch.cholesky_solve(problem.target[:, columns].mT, factor).mT
        if not self.options.bias_correction:
            return matrix, None
        change = (problem.weight - matrix)[None]
        return matrix, mean_product(LayerGeometry.of(layer_of(node)), change, self.statistics[node])[0]

    def _of(self, node: Node) -> tuple[LayerProblem, Tensor]:
        if node not in self._known:
            module = layer_of(node)
            dense = LayerGeometry.of(module).to_matrix(module.weight.detach()).double()
            hessian = self.statistics[node].hessian(centred=bool(self.options.bias_correction))
            problem = next(LayerProblem(hessian, dense @ hessian, dense).damped(self.options.damping).groups())
            self._known[node] = problem, torch.cholesky_inverse(torch.linalg.cholesky(problem.hessian))
        return self._known[node]


def survey(
    graph_module: GraphModule,
    channels: Channels,
    widths: Sequence[Width],
    readers: Readers,
    calibration: Calibration,
    *,
    multiple: int,
) -> list[SurveyedWidth]:
    """Order and price the units of every width; the graph is as it was afterwards.

    Args:
        graph_module: with observers in front of the layers.
        channels: analysis of the graph without observers, whose nodes its layouts and the widths name.
        widths: of that graph.
        readers: problems of their readers, by node of that graph.
        calibration: the output is measured on the first images.
        multiple: channels stay in multiples of it.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    with observers_off(graph_module):
        probe = probe_of(graph_module, calibration)
        of_readers = {nodes[reader.name] for width in widths for reader in width.readers}
        variances, dense = _variances(graph_module, of_readers, probe)
        found: list[SurveyedWidth] = []
        for width in widths:
            calibration.on_layer(f"channels of {width.name}", len(widths) if not found else 0)
            units = len(width.units)
            choices = width.choices(multiple)
            with calibration.stopwatch.measure("solve"):
                columns = {node: columns_of(channels, width, node) for node in width.readers}
                read = [
                    _read(readers, node, of.to(readers.inverse(node).device), variances[node.name])
                    for node, of in columns.items()
                ]
                elimination = eliminate(read, units, least=choices[-1])
            order = _whole_order(elimination, units)
            errors = elimination.errors.tolist()
            scale = _scale(graph_module, readers, columns, order, errors, nodes, probe, dense)
            costs = tuple(errors[units - left] * scale[units - left] for left in choices)
            found.append(SurveyedWidth(order, Curve(choices, _rising(costs))))
    return found


def by_size(channels: Channels, widths: Sequence[Width], *, multiple: int) -> list[SurveyedWidth]:
    """Order and price the units by the size of their weights alone: for methods that see no images.

    A unit counts by the squares of its rows in the layers that write it and its columns in those that read it, each layer
    relative to the mean of its units; in sum over a width, relative to all.
    """
    found = []
    for width in widths:
        score = torch.zeros(len(width.units), dtype=torch.float64)
        for node in width.readers:
            squares = LayerGeometry.of(layer_of(node)).to_matrix(layer_of(node).weight.detach()).double().square()
            score += _relative(squares[0].sum(0).cpu()[columns_of(channels, width, node)].sum(1))
        for node in width.writers:
            geometry = LayerGeometry.of(layer_of(node))
            squares = geometry.to_matrix(layer_of(node).weight.detach()).double().square().sum(2).flatten()
            score += _relative(squares.cpu()[rows_of(channels, width, node)].sum(1))
        order = score.argsort()
        errors = torch.cat([score.new_zeros(1), (score[order] / score.sum().clamp_min(1e-30)).cumsum(0)]).tolist()
        choices = width.choices(multiple)
        costs = tuple(errors[len(order) - left] for left in choices)
        found.append(SurveyedWidth(order, Curve(choices, costs)))
    return found


def _relative(score: Tensor) -> Tensor:
    return score / score.mean().clamp_min(1e-30)


def _read(readers: Readers, node: Node, columns: Tensor, variance: float) -> ReadUnits:
    flat = columns.flatten()
    inverse, weight = readers.inverse(node), readers.problem(node).weight
    return ReadUnits(inverse[flat][:, flat], weight[:, flat], 1 / variance)


def _whole_order(elimination: Elimination, units: int) -> Tensor:
    """The order, with the units that were never removed at its end."""
    removed = elimination.order.cpu()
    left = torch.ones(units, dtype=torch.bool)
    left[removed] = False
    return torch.cat([removed, left.nonzero()[:, 0]])


def _scale(
    graph_module: GraphModule,
    readers: Readers,
    columns: Mapping[Node, Tensor],
    order: Tensor,
    errors: Sequence[float],
    nodes: Mapping[str, Node],
    probe: list[list[object]],
    dense: list[Tensor],
) -> list[float]:
    """What an error of the readers is at the model's output, for each number of units that are gone."""
    gone = sorted({min(len(errors) - 1, max(1, round(share * len(order)))) for share in PROBES if len(errors) > 1})
    points, ratios = [], []
    for number in gone:
        if errors[number] <= 0:
            continue
        originals = []
        for node, of in columns.items():
            module = layer_of(nodes[node.name])
            left = torch.ones(readers.problem(node).weight.shape[1], dtype=torch.bool)
            left[of[order[:number]].flatten()] = False
            matrix, shift = readers.fitted(node, left.nonzero()[:, 0].to(module.weight.device))
            originals.append((module, module.weight.data, module.bias))
            weight = LayerGeometry.of(module).to_weight(matrix[None])
            module.weight.data = laid_out_like(module.weight, weight.to(module.weight))
            if shift is not None:
                shift = shift.to(module.weight)
                module.bias = nn.Parameter(shift if module.bias is None else module.bias + shift)
        change = OutputError(channel_dim=1)
        for wanted, output in zip(dense, outputs_of(graph_module, probe), strict=True):
            change.update(wanted, output)
        for module, data, bias in originals:
            module.weight.data, module.bias = data, bias
        points.append(number)
        ratios.append(change.relative / errors[number])
    if not points:
        return [1.0] * len(errors)
    scale: list[float] = np.interp(np.arange(len(errors)), points, ratios).tolist()
    return scale


def _rising(costs: Sequence[float]) -> tuple[float, ...]:
    """Costs that never fall as more goes: a measured dip is noise."""
    return tuple(np.maximum.accumulate(np.asarray(costs, dtype=np.float64)).tolist())


def _variances(
    graph_module: GraphModule, readers: set[Node], probe: list[list[object]]
) -> tuple[dict[str, float], list[Tensor]]:
    """By name of each reader the variance of what its output is added into; and the outputs of the dense model."""
    watched: dict[Node, OutputError] = {}
    of_reader: dict[str, OutputError] = {}
    for node in readers:
        value = consumers(node).value
        of_reader[node.name] = watched.setdefault(value, OutputError(channel_dim(node)))

    class Watch(Runner):
        def run_node(self, n: Node) -> object:
            value = super().run_node(n)
            if n in watched:
                watched[n].update(value, value)
            return value

    dense = outputs_of(graph_module, probe, Watch(graph_module))
    tiny = torch.finfo(torch.float64).tiny
    return {name: max(error.variance, tiny) for name, error in of_reader.items()}, dense
