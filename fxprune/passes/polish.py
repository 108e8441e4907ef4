"""Polish: a few label-free epochs in which the pruned model learns the dense model's activations, its masks held fixed.

Layer-wise least squares is blind to what the layers after it make of an error; gradient steps on all layers together are
not. What is matched is every activation that a layer feeds, as far as its rectifier lets it through, each relative to its
variance: feature distillation (Romero et al. 2015, FitNets; block by block in Lucas & Mazumder 2025, SNOWS). A few hundred
images overfit far less on activations than on logits, of which they have only a handful each.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.calibration.batches import count, inputs_of, take
from fxprune.calibration.failures import run_graph
from fxprune.calibration.output_error import OutputAgreement, OutputError, channel_dim
from fxprune.errors import OptionsError
from fxprune.graph import Runner, device_of
from fxprune.layer_solution import layer_of
from fxprune.passes.base import Pass
from fxprune.passes.destination import destination
from fxprune.passes.prune_weights import LAYER, REPORT
from fxprune.report import PruneReport

LEARNING_RATE = 5e-4
WARM_UP = 0.1
STEP_IMAGES = 64
HOLD_OUT_EVERY = 8

Inputs = list[Any]


class Polish(Pass):
    """Trains the weights that pruning kept, and the biases, of all layers that were pruned or re-fitted.

    Every eighth step's images are held out (if there are several steps), and the epoch that is best on those is kept; it
    may be none.

    Args:
        dense: the graph module as it was before pruning, with the same node names.
        batches: calibration batches.
        epochs: passes over them.
        flip: mirror half of the images, others in each epoch: right for photographs, wrong for digits.
        seed: of the order and the flips.
    """

    def __init__(
        self, dense: GraphModule, batches: Sequence[Any], *, epochs: int, flip: bool = False, seed: int = 0
    ) -> None:
        self.dense = dense
        self.batches = batches
        self.epochs = epochs
        self.flip = flip
        self.seed = seed

    def call(self, graph_module: GraphModule) -> PassResult:  # noqa: D102 - documented on Pass
        layers = [n for n in graph_module.graph.nodes if LAYER in n.meta and n.meta[LAYER].relative_error is not None]
        if not layers:
            return PassResult(graph_module, False)
        steps = list(_steps(graph_module, self.batches))
        held_out = steps[::HOLD_OUT_EVERY]
        training = [x for number, x in enumerate(steps) if number % HOLD_OUT_EVERY] or steps
        distance = _Distance(self.dense, graph_module, layers)
        before = best = copy.deepcopy(graph_module.state_dict())
        least = distance.mean(held_out)
        for _ in self._epochs(layers, distance, training):
            found = distance.mean(held_out)
            if found < least:  # False for NaN, too.
                least, best = found, copy.deepcopy(graph_module.state_dict())
        graph_module.load_state_dict(best)
        if best is before:
            return PassResult(graph_module, False)
        with torch.no_grad():
            _update_report(self.dense, graph_module, layers, steps)
        return PassResult(graph_module, True)

    def _epochs(self, layers: list[Node], distance: _Distance, steps: list[Inputs]) -> Iterator[int]:
        """Adam on a one-cycle schedule, an epoch at a time; gradients outside the masks are zeroed: zeros stay zero."""
        own = {p: p.requires_grad for p in distance.pruned.parameters()}
        weights = [p.requires_grad_(True) for node in layers for p in layer_of(node).parameters()]
        masks = [p != 0 if p.dim() > 1 else torch.ones_like(p, dtype=torch.bool) for p in weights]
        optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE)
        total = self.epochs * len(steps)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=total, pct_start=WARM_UP)
        generator = torch.Generator().manual_seed(self.seed)
        for epoch in range(self.epochs):
            for number in torch.randperm(len(steps), generator=generator, device="cpu").tolist():
                inputs = _mirrored(steps[number], generator) if self.flip else steps[number]
                with torch.enable_grad():
                    loss = distance(inputs)
                optimizer.zero_grad()
                loss.backward()
                for p, mask in zip(weights, masks, strict=True):
                    if p.grad is not None:
                        p.grad *= mask
                optimizer.step()
                schedule.step()
            yield epoch
        for p, flag in own.items():
            p.grad = None
            p.requires_grad_(flag)


class _Distance:
    """How far the activations of two models are apart: the mean, over what the layers feed, of ||d - p||^2 / ||d - mean||^2."""

    def __init__(self, dense: GraphModule, pruned: GraphModule, layers: list[Node]) -> None:
        self.dense, self.pruned = dense, pruned
        self._names = {_fed(node).name for node in layers}

    def __call__(self, inputs: Inputs) -> Tensor:
        with torch.no_grad():
            dense = _Recorder(self.dense, self._names).outputs(inputs)
        pruned = _Recorder(self.pruned, self._names).outputs(inputs)
        terms = [
            F.mse_loss(pruned[name], d) / d.var().clamp_min(torch.finfo(d.dtype).tiny) for name, d in dense.items()
        ]
        return torch.stack(terms).mean()

    @torch.no_grad()
    def mean(self, steps: list[Inputs]) -> float:
        return sum(float(self(inputs)) for inputs in steps) / len(steps)


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


def _fed(layer: Node) -> Node:
    """The node to match for a layer: the rectifier that it feeds, or the sum of its output and what is added to it."""
    reached = destination(layer)
    return next(iter(reached.value.users)) if reached.rectifier else reached.value


def _steps(graph_module: GraphModule, batches: Iterable[Any]) -> Iterator[Inputs]:
    """The model's arguments, for at most STEP_IMAGES images at a time."""
    device = device_of(graph_module)
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for number, batch in enumerate(batches):
        inputs = list(inputs_of(batch, placeholders, number, device=device).values())
        for at in range(0, count(inputs), STEP_IMAGES):
            yield take(inputs, slice(at, at + STEP_IMAGES))


def _mirrored(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """The images of a step, (N, C, H, W), half of them from right to left."""
    images, *others = inputs
    if images.dim() != 4:
        raise OptionsError(f"flip mirrors images (N, C, H, W); the model's input has shape {tuple(images.shape)}")
    chosen = (torch.rand(len(images), generator=generator, device="cpu") < 0.5).to(images.device)
    return [torch.where(chosen[:, None, None, None], images.flip(-1), images), *others]


def _update_report(dense: GraphModule, graph_module: GraphModule, layers: list[Node], steps: list[Inputs]) -> None:
    """Measure every layer's error, and the agreement at the output, again: the weights are others now."""
    names = {node.name for node in layers}
    errors = {node.name: OutputError(channel_dim(node)) for node in layers}
    agreement = OutputAgreement()
    for inputs in steps:
        wanted, found = _Recorder(dense, names), _Recorder(graph_module, names)
        wanted.outputs(inputs)
        found.outputs(inputs)
        for name, error in errors.items():
            error.update(wanted.kept[name], found.kept[name])
        agreement.update(wanted.result, found.result)
    for node in layers:
        node.meta[LAYER] = replace(node.meta[LAYER], relative_error=errors[node.name].relative)
    report: PruneReport = graph_module.meta[REPORT]
    measured = {node.meta[LAYER].name: node.meta[LAYER] for node in layers}
    every_layer = tuple(measured.get(layer.name, layer) for layer in report.layers)
    graph_module.meta[REPORT] = replace(report, layers=every_layer, agreement=agreement.agreement, kl=agreement.kl)
