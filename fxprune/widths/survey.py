"""survey(): in which order the units of each width go, and what the network loses, from one run of the dense model.

The order is that of group OBS (`fxprune/solvers/channel_elimination.py`) on all layers that read the units, each error relative
to the variance of what that layer's output is added into. The errors of k layers that read the same channels count k times: no
later layer makes up for them, as it does for what a block has lost inside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxprune.calibration.calibration import Calibration
from fxprune.calibration.output_error import OutputError, channel_dim
from fxprune.channels.layout import Channels
from fxprune.constraints.sensitivity import probe_of
from fxprune.consumers import consumers
from fxprune.geometry import LayerGeometry
from fxprune.graph import Runner
from fxprune.layers.problem import layer_of, mean_product
from fxprune.options import Options
from fxprune.solvers.channel_elimination import Elimination, ReadUnits, eliminate
from fxprune.solvers.problem import LayerProblem
from fxprune.statistics import InputStatistics
from fxprune.widths.network import Width, columns_of, rows_of
from fxprune.widths.plan import Curve

DAMPINGS = (0.1, 1.0, 10.0, 100.0)  # Relative to the mean of H's diagonal.


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


@dataclass(frozen=True)
class _Posed:
    """One layer's problem, its H^-1, and what a cost in it comes to on images that it was not fitted to, as a multiple."""

    problem: LayerProblem
    inverse: Tensor
    unseen_share: float


class Readers:
    """The least-squares problems of the layers that read channels, posed when they are asked for, on the dense model.

    Args:
        statistics: of the inputs of the layers.
        checks: those of every fourth image, of layers without patches to spare.
        options: resolved.
    """

    def __init__(
        self, statistics: Mapping[Node, InputStatistics], checks: Mapping[Node, InputStatistics], options: Options
    ) -> None:
        self.statistics = statistics
        self.checks = checks
        self.options = options
        self._known: dict[Node, _Posed] = {}

    def problem(self, node: Node) -> LayerProblem:
        """What the layer's own dense output asks of it, (D, D) and (R, D)."""
        return self._of(node).problem

    def inverse(self, node: Node) -> Tensor:
        """H^-1, (D, D)."""
        return self._of(node).inverse

    def fitted(self, node: Node, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """The best weights (R, D) on some columns, zero elsewhere, and what to add to the bias (R,), if biases are fitted."""
        problem = self.problem(node)
        matrix = torch.zeros_like(problem.weight)
        factor = torch.linalg.cholesky(problem.hessian[columns][:, columns])
        matrix[:, columns] = torch.cholesky_solve(problem.target[:, columns].mT, factor).mT
        if not self.options.bias_correction:
            return matrix, None
        change = (problem.weight - matrix)[None]
        return matrix, mean_product(LayerGeometry.of(layer_of(node)), change, self.statistics[node].mean)[0]

    def unseen_share(self, node: Node) -> float:
        """What a cost in this problem comes to on images that it was not fitted to, as a multiple."""
        return self._of(node).unseen_share

    def _settle(self, node: Node, dense: Tensor) -> Settled:
        """The damping of the options where there are patches to spare, else the one that is best on images left out of the fit.

        In as many columns as patches, or fewer, any columns seem to make up for any others. On EfficientNet-Lite1 with 250
        images, 225 patches for the 1,280 columns of its classifier, all but 226 of them seemed to be free.
        """
        if node not in self.checks:
            return Settled(self.options.damping, 1.0)
        check, centred = self.checks[node], bool(self.options.bias_correction)
        (seen,) = self.statistics[node].hessian_without(check, centred=centred)
        (unseen,) = check.hessian(centred=centred)
        return settle(dense, seen, unseen, self.options.damping)

    def _of(self, node: Node) -> _Posed:
        if node not in self._known:
            module = layer_of(node)
            dense = LayerGeometry.of(module).to_matrix(module.weight.detach()).double()
            hessian = self.statistics[node].hessian(centred=bool(self.options.bias_correction))
            settled = self._settle(node, dense[0])
            problem = next(LayerProblem(hessian, dense @ hessian, dense).damped(settled.damping).groups())
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(problem.hessian))
            self._known[node] = _Posed(problem, inverse, settled.unseen_share)
        return self._known[node]


@dataclass(frozen=True)
class Settled:
    """How a layer's problem is posed where there are few images.

    Attributes:
        damping: relative to the mean of H's diagonal.
        unseen_share: error on unseen images over what it costs in the damped problem.
    """

    damping: float
    unseen_share: float


def settle(dense: Tensor, seen: Tensor, unseen: Tensor, least: float) -> Settled:
    """With which damping the larger half of a layer's columns makes up best for the others on unseen images.

    Args:
        dense: (R, D) float64.
        seen: H of the images fitted, (D, D).
        unseen: H of others.
        least: damping to start from, relative to the mean of H's diagonal, as all.
    """
    size = dense.square().sum(0) * seen.diagonal()
    stay = size.topk(max(1, len(size) // 2)).indices
    scale, target = seen.diagonal().mean(), (dense @ seen)[:, stay]

    def tried(damping: float) -> tuple[float, float]:
        """The error on unseen images, and the cost on those seen."""
        shift = damping * scale
        system = seen[stay][:, stay]
        system.diagonal().add_(shift)
        factor, failed = torch.linalg.cholesky_ex(system)
        if failed:
            return math.inf, 1.0
        change = -dense
        change[:, stay] += torch.cholesky_solve((target + shift * dense[:, stay]).mT, factor).mT
        cost = float((change @ seen * change).sum() + shift * change.square().sum())
        return float((change @ unseen * change).sum()), cost

    best, (error, cost) = least, tried(least)
    for damping in (d for d in DAMPINGS if d > least):
        found = tried(damping)
        if found[0] >= error:
            break
        best, (error, cost) = damping, found
    return Settled(best, error / cost if cost > 0 and math.isfinite(error) else 1.0)


def survey(
    graph_module: GraphModule,
    channels: Channels,
    widths: Sequence[Width],
    readers: Readers,
    calibration: Calibration,
    *,
    multiple: int,
) -> list[SurveyedWidth]:
    """Order and price the units of every width.

    Args:
        graph_module: as it is.
        channels: its analysis.
        widths: of the graph.
        readers: problems of the layers that read them.
        calibration: variances are measured on the first images.
        multiple: channels stay in multiples of it.
    """
    variances = _variances(graph_module, {node for width in widths for node in width.readers}, calibration)
    found: list[SurveyedWidth] = []
    for width in widths:
        calibration.on_layer(f"channels of {width.name}", len(widths) if not found else 0)
        units, choices = len(width.units), width.choices(multiple)
        with calibration.stopwatch.measure("solve"):
            read = [_read(readers, node, columns_of(channels, width, node), variances[node]) for node in width.readers]
            elimination = eliminate(read, units, least=choices[-1])
        errors = (max(1, len(read)) * elimination.errors).tolist()
        curve = Curve(choices, tuple(errors[units - left] for left in choices))
        found.append(SurveyedWidth(_whole_order(elimination, units), curve))
    return found


def by_size(channels: Channels, widths: Sequence[Width], *, multiple: int) -> list[SurveyedWidth]:
    """Order and price the units by the size of their weights alone: for methods that see no images.

    A unit counts by the squares of its rows in the layers that write it and its columns in those that read it, each layer
    relative to the mean of its units. Its cost is its share of the width, once for each of the k layers that read it, and k
    times in all, as errors count in `survey`: else a stream of ten layers would cost as little as the inside of a block.
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
        shares = score[order] * max(1, len(width.readers)) ** 2 / score.sum().clamp_min(1e-30)
        errors = torch.cat([score.new_zeros(1), shares.cumsum(0)]).tolist()
        choices = width.choices(multiple)
        costs = tuple(errors[len(order) - left] for left in choices)
        found.append(SurveyedWidth(order, Curve(choices, costs)))
    return found


def _relative(score: Tensor) -> Tensor:
    return score / score.mean().clamp_min(1e-30)


def _read(readers: Readers, node: Node, columns: Tensor, variance: float) -> ReadUnits:
    flat = columns.flatten().to(readers.inverse(node).device)
    inverse, weight = readers.inverse(node), readers.problem(node).weight
    return ReadUnits(inverse[flat][:, flat], weight[:, flat], readers.unseen_share(node) / variance)


def _whole_order(elimination: Elimination, units: int) -> Tensor:
    """The order, with the units that were never removed at its end."""
    removed = elimination.order.cpu()
    left = torch.ones(units, dtype=torch.bool)
    left[removed] = False
    return torch.cat([removed, left.nonzero()[:, 0]])


def _variances(graph_module: GraphModule, readers: set[Node], calibration: Calibration) -> dict[Node, float]:
    """For each reader the variance of what its output is added into, on the first images."""
    watched: dict[Node, OutputError] = {}
    of_reader = {}
    for node in readers:
        of_reader[node] = watched.setdefault(consumers(node).value, OutputError(channel_dim(node)))

    class Watch(Runner):
        def run_node(self, n: Node) -> object:
            value: Any = super().run_node(n)
            if n in watched:
                watched[n].update(value, value)
            return value

    for inputs in probe_of(graph_module, calibration):
        Watch(graph_module).run(*inputs)
    tiny = torch.finfo(torch.float64).tiny
    return {node: max(error.variance, tiny) for node, error in of_reader.items()}
