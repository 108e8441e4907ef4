"""PermuteChannels: chooses which input channels share an N:M group, without changing what the network computes.

The order of a layer's output channels is arbitrary: if the layers that read them expect another order, nothing changes. But
N:M pruning asks for zeros in every group of M consecutive input channels, so the order decides which weights compete. The
pass permutes channels until the weights that must go cost little, by the saliency of Optimal Brain Surgeon, w² / [H⁻¹]_jj,
with H the centred, damped Hessian of the dense model's inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils._pytree import tree_leaves

from fxprune.calibration.batches import assign, first_images, peek
from fxprune.calibration.observers import observer_of
from fxprune.calibration.stopwatch import Stopwatch
from fxprune.calibration.stream import CalibrationStream
from fxprune.channels import Channels, analyse_channels, permute_channels, value_shapes
from fxprune.channels.grouping import Reader, search_grouping
from fxprune.channels.layout import Classes
from fxprune.errors import CalibrationError, GraphError
from fxprune.geometry import is_matrix_layer
from fxprune.graph import call, device_of, input_of, module_of
from fxprune.layer_solution import layer_of
from fxprune.passes.base import Pass
from fxprune.passes.insert_observers import TASK, InsertObservers, LayerTask
from fxprune.pattern import NMPattern, Pattern
from fxprune.precision import full_precision
from fxprune.solvers import LayerProblem
from fxprune.statistics import HessianObserver

TOLERANCE = 1e-4
PATCHES = 32  # For each column: an order of channels needs fewer than the weights do.
EXAMPLE_IMAGES = 4


class PermuteChannels(Pass):
    """Permutes channels so that an N:M pattern costs less; to be run before InsertObservers.

    1. Every channel of every tensor gets a class; residual streams share theirs, concatenations keep those of their parts,
       padding adds classes of constants (`fxprune.channels`). What is not known to treat channels alike fixes the
       channels it reads, and so do the model's inputs and outputs, excluded, shared and tied layers.
    2. Classes that occur in the same tensors are permuted together by a greedy search for the least saliency lost,
       summed over all layers that read them, each relative to its output's variance.
    3. Rows, columns, biases and normalisation parameters are permuted in place. The network's function is compared
       on the first batch before and after.

    Layers that read channels which cannot move, or every channel several times (a flatten of several positions), are left
    out, with the reason on record. For a choice of patterns ("mixed:...") the groups are chosen for the first N:M in it.

    The search is bounded as `fxprune.solvers.permutation` says. The statistics of all layers that take part are held at
    once: D x D numbers for a layer of D columns.

    Args:
        pattern: the pattern that the network is to be pruned to.
        batches: calibration batches, read once per call: tensors, or tuples, lists or dicts whose first item is the input.
            A hundred images are enough.
        images: take the first so many only, where the model accepts less than a batch; None for all.
        exclude: module names or fnmatch patterns of layers to leave exactly as they are.
        damping: lambda / mean(diag H).
        seed: of the search.
        stopwatch: takes the time of "stream", "statistics", and "solve", the search.

    Raises:
        CalibrationError: if there are no batches, or one cannot be used.
        GraphError: if the graph is in training mode or already observed, or if the function has changed.
    """

    def __init__(
        self,
        pattern: Pattern,
        batches: Iterable[Any],
        *,
        images: int | None = None,
        exclude: Sequence[str] = (),
        damping: float = 0.01,
        seed: int = 0,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.pattern = pattern
        self.batches = batches
        self.images = images
        self.exclude = tuple(exclude)
        self.damping = damping
        self.seed = seed
        self.stopwatch = stopwatch or Stopwatch(torch.device("cpu"))
        self._example: tuple[list[Any], list[Tensor]] | None = None  # Some images, and the output on them.

    def requires(self, graph_module: GraphModule) -> None:  # noqa: D102 - documented on Pass
        if any(TASK in node.meta for node in graph_module.graph.nodes):
            raise GraphError("PermuteChannels has to run before InsertObservers")
        for node in graph_module.graph.nodes:
            module = module_of(node)
            if module is not None and any(part.training for part in module.modules()):
                raise GraphError(f"module {node.target!r} is in training mode; call eval() before PermuteChannels")

    def call(self, graph_module: GraphModule) -> PassResult:  # noqa: D102 - documented on Pass
        self._example = None
        levels = (self.pattern,) if isinstance(self.pattern, NMPattern) else self.pattern.levels
        pattern = next((level for level in levels if isinstance(level, NMPattern)), None)
        if pattern is None:
            for node in graph_module.graph.nodes:
                module = module_of(node)
                if module is not None and is_matrix_layer(module):
                    self.record(graph_module, "kept", node, reason=f"pattern {self.pattern} has no groups of channels")
            return PassResult(graph_module, False)
        with torch.inference_mode(), full_precision():
            channels, readers = self._observe(graph_module, pattern)
        with self.stopwatch.measure("solve"):
            grouping = search_grouping([r for of in readers.values() for r in of], channels, pattern, seed=self.seed)
        if np.array_equal(grouping.source, np.arange(channels.count)):
            return PassResult(graph_module, False)
        permute_channels(graph_module, channels, grouping.source)
        losses = iter(zip(grouping.before, grouping.after, strict=True))
        for node, of in readers.items():
            before, after = np.sum([next(losses) for _ in of], axis=0)
            classes = channels.layouts[input_of(node)].classes
            if not np.array_equal(classes, grouping.source[classes]):
                saved = f"{pattern} loses {after / before:.1%} of the saliency that it lost before"
                self.record(graph_module, "permuted", node, reason=saved)
        return PassResult(graph_module, True)

    def ensures(self, graph_module: GraphModule) -> None:  # noqa: D102 - documented on Pass
        if self._example is None:
            return
        inputs, before = self._example
        self._example = None
        with torch.inference_mode(), full_precision():
            after = _run(graph_module, inputs)
        for old, new in zip(before, after, strict=True):
            difference, scale = float((old - new).abs().max()), float(old.abs().max())
            if not difference <= TOLERANCE * scale:
                raise GraphError(
                    f"permuting channels has changed the network's output by {difference:.3g}, where the largest value is "
                    f"{scale:.3g}; the channel analysis is wrong for this model: compile without permutation, and report it"
                )

    def _observe(self, graph_module: GraphModule, pattern: NMPattern) -> tuple[Channels, dict[Node, list[Reader]]]:
        """Analyse the channels, and score the weights of every layer whose input channels can be permuted."""
        device = device_of(graph_module)
        head, batches = peek(self.batches)
        placeholders = graph_module.graph.find_nodes(op="placeholder")
        inputs = list(assign(placeholders, head[0], device=device).values())
        self._example = _example(graph_module, inputs)
        channels = analyse_channels(graph_module, value_shapes(graph_module, *self._example[0]), exclude=self.exclude)
        observed = copy.deepcopy(graph_module)  # The observers go into a copy.
        twins = dict(zip(graph_module.graph.nodes, list(observed.graph.nodes), strict=True))
        InsertObservers(pattern, exclude=self.exclude, reconstruct=False)(observed)
        movable = {c for atom in channels.atoms for c in atom.tolist()}
        layers: dict[Node, Node] = {}
        for node, twin in twins.items():
            task: LayerTask | None = twin.meta.get(TASK)
            if task is None or task.role != "prune":
                continue
            reason = _reason_to_keep(channels, input_of(node), movable)
            if reason is None:
                layers[node] = twin
            else:
                self.record(graph_module, "kept", node, reason=reason)
        wanted = {observer_of(twin) for twin in layers.values()}
        for module in observed.modules():
            if isinstance(module, HessianObserver):
                module.enabled = module in wanted
        if layers:
            if self.images and self._example[0] is not inputs:
                batches = first_images(batches, self.images)
            CalibrationStream(
                observed,
                batches,
                device=device,
                stopwatch=self.stopwatch,
                patches=PATCHES,
                least_images=self.images,
            ).finish()
        with self.stopwatch.measure("solve"):
            readers = {
                node: list(_readers(twin, channels.layouts[input_of(node)].classes, self.damping))
                for node, twin in layers.items()
            }
        return channels, readers


def _example(graph_module: GraphModule, inputs: list[Any]) -> tuple[list[Any], list[Tensor]]:
    """A few images of a batch, and the output on them; all of them if the graph takes no other number."""
    few = [x[:EXAMPLE_IMAGES] if isinstance(x, Tensor) and x.dim() else x for x in inputs]
    try:
        return few, _run(graph_module, few)
    except CalibrationError:
        return inputs, _run(graph_module, inputs)


def _run(graph_module: GraphModule, inputs: Sequence[Any]) -> list[Tensor]:
    """The tensors in the graph's output, on images of the first batch."""
    try:
        output = call(graph_module, *inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = [tuple(x.shape) for x in inputs if isinstance(x, Tensor)]
        raise CalibrationError(
            f"the model failed on calibration batch 0, shapes {shapes}: {error}. Check the batch and the image size"
        ) from error
    return [value for value in tree_leaves(output) if isinstance(value, Tensor)]


def _reason_to_keep(channels: Channels, source: Node, movable: set[int]) -> str | None:
    """Why the input channels of a layer that reads `source` are left where they are, or None."""
    layout = channels.layouts.get(source)
    classes = [] if layout is None else layout.classes.tolist()
    if movable.isdisjoint(classes):
        return f"its input channels stay in place: {channels.reason(source)}"
    if len(set(classes)) < len(classes):
        return "it reads each channel at several places, as after a flatten, and groups run over these"
    return None


def _readers(node: Node, classes: Classes, damping: float) -> Iterator[Reader]:
    """The scores of an observed layer's weights, relative to the variance of its output; one reader a group."""
    geometry = node.meta[TASK].geometry
    weight = geometry.to_matrix(layer_of(node).weight.detach()).double()
    hessian = observer_of(node).statistics().hessian(centred=True)
    variance = (weight @ hessian * weight).sum()
    problem = LayerProblem(hessian, weight @ hessian, weight).damped(damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(problem.hessian)).diagonal(dim1=1, dim2=2)
    scores = weight.square() / inverse[:, None] / torch.where(variance > 0, variance, 1.0)
    for group, of in zip(scores, np.split(classes, geometry.groups), strict=True):
        yield Reader(group.reshape(-1, len(of)), of)
