"""Polish: a few label-free epochs in which the pruned model learns the dense model's activations, its masks held fixed.

Least squares layer by layer does not see what later layers make of an error; gradient steps on all layers together do.
The loss compares every activation that follows a layer, after its ReLU if it has one, each relative to its variance:
feature distillation (Romero et al. 2015, FitNets; block by block in Lucas & Mazumder 2025, SNOWS). Matching activations
overfits a few hundred images far less than matching logits, since an image has thousands of activations and only a few logits.
Logits that were scaled (`Options.temperature`) are compared before their scale, which least squares would take back.

Adam's steps are relative to the size of a row's weights (Shazeer & Stern 2018, Adafactor, section 8): folded BatchNorm leaves
rows of one layer a hundred times smaller than others, which a step that suits these would destroy. How large a step a network
bears is found on the way: each epoch ends with the mean of its later weights (Polyak & Juditsky 1992); if the held-out images
gain by it, the next epoch's steps are larger, and if not, the epoch is undone and the next one's are smaller.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.optim.swa_utils import AveragedModel

from fxprune.annotations import annotate, annotate_graph, annotation, report_of
from fxprune.calibration.batches import count, inputs_of, take
from fxprune.calibration.calibration import Calibration
from fxprune.calibration.dense_twin import DenseTwin
from fxprune.calibration.failures import run_graph
from fxprune.calibration.output_error import OutputError, channel_dim
from fxprune.calibration.output_score import OutputScore
from fxprune.calibration.reading import mirrored
from fxprune.consumers import consumers
from fxprune.errors import GraphError
from fxprune.geometry import LayerGeometry, MatrixLayer
from fxprune.graph import Runner, device_of
from fxprune.layers.problem import layer_of
from fxprune.layers.shared import weight_calls
from fxprune.passes.base import CalibratedPass
from fxprune.runtime.processes import from_process, gathered, in_order, world

FIRST_STEP = 0.005  # Of the root mean square of the weights that a row has kept.
LARGER, SMALLER = 1.5, 0.25  # The step after an epoch that gained, and after one that did not.
WARM_UP = 5  # Steps.
STEP_IMAGES = 16
HOLD_OUT_EVERY = 8
SMALLEST_ROW = 1e-3  # Of the largest row's weights: what has hardly any weight must be able to grow.

Inputs = list[Any]


class KeepDense(CalibratedPass):
    """Keeps a copy of the graph as it is now, before its layers are solved, for `Polish` to learn from."""

    def calibrate(self, graph_module: GraphModule, calibration: Calibration) -> PassResult:  # noqa: D102
        if calibration.dense is None:  # Where channels were removed, it is the graph from before that.
            calibration.dense = DenseTwin(copy.deepcopy(graph_module))
        calibration.hold()
        return PassResult(graph_module, False)


class Polish(CalibratedPass):
    """Trains the weights that pruning kept, and the biases, of all layers that were pruned or re-fitted.

    The epoch that is best on the images that are held out is kept; it may be none. Where none are held out, every eighth
    step's images take their place, which the layers have been fitted to.

    Args:
        epochs: passes over the images.
        flip: mirror half of the images, others in each epoch: right for photographs, wrong for digits.
        seed: of the order and the flips.
    """

    def __init__(self, *, epochs: int, flip: bool = False, seed: int = 0) -> None:
        self.epochs = epochs
        self.flip = flip
        self.seed = seed

    def calibrate(self, graph_module: GraphModule, calibration: Calibration) -> PassResult:  # noqa: D102
        if calibration.dense is None:
            raise GraphError("Polish needs the dense graph: run KeepDense before the layers are solved")
        layers = [
            node
            for node in graph_module.graph.nodes
            if (report := annotation(node).report) is not None and report.relative_error  # 0: as in the dense model.
        ]
        if not layers:
            return PassResult(graph_module, False)
        training, held_out = _steps(graph_module, calibration)
        is_score = bool(held_out)
        if not held_out:
            held_out = training[::HOLD_OUT_EVERY]
            training = [x for number, x in enumerate(training) if number % HOLD_OUT_EVERY] or training
        distance = _Distance(calibration.dense, graph_module, layers)
        weights, gained = _Weights(layers, graph_module), False
        generator = torch.Generator().manual_seed(self.seed)
        least, step_size = distance.mean(held_out), FIRST_STEP
        for _ in range(self.epochs):
            before = weights.state()
            self._epoch(weights, distance, training, step_size, generator)
            found = distance.mean(held_out)
            if found < least:  # False for NaN, too.
                least, gained, step_size = found, True, LARGER * step_size
            else:
                weights.restore(before)
                step_size *= SMALLER
        weights.release()
        if not gained:
            calibration.warn(
                f"polish={self.epochs} gained nothing on the images held out: the weights stay as they were"
            )
            return PassResult(graph_module, False)
        with torch.no_grad():
            of_all = held_out if is_score else [*training, *held_out]
            _update_report(calibration.dense, graph_module, layers, of_all, is_score=is_score)
        return PassResult(graph_module, True)

    def _epoch(
        self,
        weights: _Weights,
        distance: _Distance,
        steps: Sequence[_Step],
        step_size: float,
        generator: torch.Generator,
    ) -> None:
        """Takes every step once, in a random order; leaves the mean of the weights after the second half of them."""
        later = AveragedModel(weights.scaled)
        for taken, number in enumerate(torch.randperm(len(steps), generator=generator, device="cpu").tolist()):
            step = steps[number]
            turned = _half(step.images, generator) if self.flip else None
            if step.inputs is not None:
                with torch.enable_grad():
                    loss = distance(step.inputs if turned is None else mirrored(step.inputs, turned))
                loss.backward()
            weights.step(step_size, step.process)
            if taken >= len(steps) // 2:
                later.update_parameters(weights.scaled)
        weights.set(later.module.parameters())


class _Weights:
    """The parameters of layers, and Adam on them in units of what their rows have kept; zeros of weights stay zero.

    Adam's steps do not depend on the scale of a gradient, so that the one of a parameter serves for it in any unit.
    """

    def __init__(self, layers: Sequence[Node], graph_module: GraphModule) -> None:
        self._flags = {p: p.requires_grad for p in graph_module.parameters()}
        self._own = [p.requires_grad_(True) for node in layers for p in layer_of(node).parameters()]
        self._masks = [p != 0 if p.dim() > 1 else torch.ones_like(p, dtype=torch.bool) for p in self._own]
        self._sizes = [size for node in layers for size in _row_sizes(layer_of(node))]
        # At least in float32: the steps of a model in half precision would be lost in its rounding.
        self.scaled = nn.ParameterList(p.detach() / size for p, size in zip(self._own, self._sizes, strict=True))
        self._adam = torch.optim.Adam(self.scaled, betas=(0.9, 0.99))
        self._taken = 0

    @torch.no_grad()
    def step(self, size: float, process: int) -> None:
        """One step of Adam on the gradients of the layers' parameters, which a process has; they are used up."""
        _gradients_of(process, self._own)
        for scaled, p, mask in zip(self.scaled, self._own, self._masks, strict=True):
            scaled.grad = None if p.grad is None else (p.grad * mask).to(scaled.dtype)
            p.grad = None
        self._taken += 1
        self._adam.param_groups[0]["lr"] = size * min(1.0, self._taken / WARM_UP)
        self._adam.step()
        self.set(self.scaled)

    @torch.no_grad()
    def set(self, scaled: Iterable[Tensor]) -> None:
        """Give the layers these values, in units of their rows."""
        for p, own, value, size in zip(self._own, self.scaled, scaled, self._sizes, strict=True):
            own.copy_(value)
            p.copy_(value * size)

    def state(self) -> tuple[Any, ...]:
        """Values and Adam's moments, to go back to."""
        return copy.deepcopy(
            ([p.detach() for p in self._own], self.scaled.state_dict(), self._adam.state_dict(), self._taken)
        )

    @torch.no_grad()
    def restore(self, state: tuple[Any, ...]) -> None:
        """Go back."""
        own, scaled, adam, self._taken = state
        for p, value in zip(self._own, own, strict=True):
            p.copy_(value)  # Not by their units: what no epoch improves is to stay bit for bit.
        self.scaled.load_state_dict(scaled)
        self._adam.load_state_dict(adam)

    def release(self) -> None:
        """Leave all parameters of the model as trainable as they were, without gradients."""
        for p, flag in self._flags.items():
            p.grad = None
            p.requires_grad_(flag)


def _row_sizes(module: MatrixLayer) -> list[Tensor]:
    """For each parameter of a layer the root mean square of what its rows have kept of the weight, shaped to go with it."""
    geometry = LayerGeometry.of(module)
    rows = geometry.to_matrix(module.weight.detach())  # (G, R/G, D)
    kept = rows.count_nonzero(2).clamp_min(1)
    size = (rows.double().square().sum(2) / kept).sqrt().to(torch.promote_types(rows.dtype, torch.float32))
    largest = size.max()
    size = size.clamp_min(SMALLEST_ROW * largest) if largest > 0 else torch.ones_like(size)
    of_weight = geometry.to_weight(size[:, :, None].expand_as(rows))
    return [of_weight if p is module.weight else size.flatten() for p in module.parameters()]


class _Distance:
    """How far the activations of two models are apart: the mean, over what the layers feed, of ||d - p||^2 / ||d - mean||^2."""

    def __init__(self, twin: DenseTwin, pruned: GraphModule, layers: list[Node]) -> None:
        self.twin, self.pruned = twin, pruned
        self._pairs = _counterparts(twin.graph_module, {_fed(node).name: node for node in layers})
        reports = {_fed(node).name: annotation(node).report for node in layers}
        self._scales = {name: 1.0 if row is None else row.logit_scale for name, row in reports.items()}

    def __call__(self, inputs: Inputs) -> Tensor:
        with torch.no_grad():
            dense = _Recorder(self.twin.graph_module, set(self._pairs.values())).outputs(inputs)
        pruned = _Recorder(self.pruned, set(self._pairs)).outputs(inputs)
        terms = []
        for name, p in pruned.items():
            counterpart = self._pairs[name]
            d = self.twin.wanted(counterpart, dense[counterpart])
            terms.append(F.mse_loss(p / self._scales[name], d) / d.var().clamp_min(torch.finfo(d.dtype).tiny))
        return torch.stack(terms).mean()

    @torch.no_grad()
    def mean(self, steps: list[_Step]) -> float:
        own = sum(float(self(step.inputs)) for step in steps if step.inputs is not None)
        return sum(gathered(own)) / len(steps)


class _Recorder(Runner):
    """Runs a graph and keeps the outputs of the nodes with the given names."""

    def __init__(self, graph_module: GraphModule, names: set[str]) -> None:
        super().__init__(graph_module)
        self.names = names
        self.kept: dict[str, Tensor] = {}
        self.result: Any = None

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.kept[n.name] = value
        return value

    def outputs(self, inputs: Inputs) -> dict[str, Tensor]:
        self.result = run_graph(
            self,
            inputs,
            f"{count(inputs)} images of a calibration batch",
            remedy=f"Polish takes {STEP_IMAGES} at a time",
        )
        return self.kept


def _counterparts(dense: GraphModule, layers: Mapping[str, Node]) -> dict[str, str]:
    """The dense graph's node for each node of the other: the one of its name, or the call of what is two layers now.

    Args:
        dense: the graph before solving.
        layers: for each node's name, the layer it is, or is fed by.
    """
    known = {node.name for node in dense.graph.nodes}
    of_layer: dict[str, str] = {str(n.target): n.name for n in dense.graph.find_nodes(op="call_module")}

    def call_of(layer: str) -> str:
        return of_layer[layer] if layer in of_layer else of_layer[layer.rpartition(".")[0]]  # "conv.1" was "conv".

    return {name: name if name in known else call_of(str(layer.target)) for name, layer in layers.items()}


def _fed(layer: Node) -> Node:
    """The node to match for a layer: the rectifier that it feeds, or the sum of its output and what is added to it."""
    reached = consumers(layer)
    return next(iter(reached.value.users)) if reached.rectifier else reached.value


@dataclass(frozen=True)
class _Step:
    """Some images of a batch.

    Attributes:
        images: how many.
        process: which has them.
        inputs: the model's arguments; None in the other processes.
    """

    images: int
    process: int
    inputs: Inputs | None


def _gradients_of(process: int, weights: Sequence[Tensor]) -> None:
    """Give all processes the gradients that one has worked out: steps follow one another, so there is nothing to share."""
    if world().count > 1:
        own = [p.grad for p in weights]
        for p, gradient in zip(weights, from_process(process, own), strict=True):
            p.grad = gradient


def _steps(graph_module: GraphModule, calibration: Calibration) -> tuple[list[_Step], list[_Step]]:
    """At most STEP_IMAGES images at a time: of images that were fitted, and of held-out ones."""
    device = device_of(graph_module)
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    batches = calibration.hold()
    values = [list(inputs_of(batch, placeholders, n, device=device).values()) for n, batch in enumerate(batches)]
    sizes, places = in_order([(count(of_batch), world().number) for of_batch in values])
    own = dict(zip(places, values, strict=True))
    masks = calibration.held_out(sum(size for size, _ in sizes)).split([size for size, _ in sizes])
    steps: tuple[list[_Step], list[_Step]] = ([], [])
    for number, mask in enumerate(masks):
        for of, chosen in zip(steps, (~mask, mask), strict=True):
            for part in chosen.nonzero()[:, 0].to(device).split(STEP_IMAGES):
                if len(part):
                    inputs = take(own[number], part) if number in own else None
                    of.append(_Step(len(part), sizes[number][1], inputs))
    return steps


def _half(images: int, generator: torch.Generator) -> Tensor:
    """About half of so many images, (N,) bool."""
    return torch.rand(images, generator=generator, device="cpu") < 0.5


def _update_report(
    twin: DenseTwin, graph_module: GraphModule, layers: list[Node], steps: list[_Step], *, is_score: bool
) -> None:
    """Measure every layer's error, and the agreement at the output, again: the weights are others now."""
    calls, dense = weight_calls(graph_module), twin.graph_module
    errors = {node: OutputError(channel_dim(node)) for node in layers}
    of_call = {call.name: errors[node] for node in layers for call in calls[node]}
    pairs = _counterparts(dense, {call.name: node for node in layers for call in calls[node]})
    score = OutputScore()
    for inputs in [step.inputs for step in steps if step.inputs is not None]:
        wanted, found = _Recorder(dense, {*pairs.values()}), _Recorder(graph_module, {*of_call})
        wanted.outputs(inputs)
        found.outputs(inputs)
        for name, error in of_call.items():
            error.update(twin.wanted(pairs[name], wanted.kept[pairs[name]]), found.kept[name])
        if is_score:
            score.update(wanted.result, found.result)
    errors = dict(zip(errors, OutputError.summed([*errors.values()]), strict=True))
    score = score.summed()
    measured = {}
    for node in layers:
        row = annotation(node).report
        assert row is not None
        measured[row.name] = replace(row, relative_error=errors[node].relative)
        annotate(node, report=measured[row.name])
    report = report_of(graph_module)
    assert report is not None
    every_layer = tuple(measured.get(layer.name, layer) for layer in report.layers)
    report = replace(
        report, layers=every_layer, agreement=score.share, kl=score.kl, output_errors=score.relative_errors
    )
    annotate_graph(graph_module, report=report)
