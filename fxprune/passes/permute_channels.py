"""PermuteChannels: chooses which input channels share an N:M group, without changing what the network computes.

The order of a layer's output channels is arbitrary: if the layers that read them expect another order, nothing changes. But
N:M pruning asks for zeros in every group of M consecutive input channels, so the order decides which weights compete. The
pass permutes channels until the weights that must go cost little, by the saliency of Optimal Brain Surgeon, w² / [H⁻¹]_jj,
with H the centred, damped Hessian of the dense model's inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.annotations import annotation, changed_modules
from fxprune.calibration.batches import count, map_tensors, take, tensors_in
from fxprune.calibration.calibration import Calibration
from fxprune.calibration.failures import said, stays_as_it_is
from fxprune.calibration.observers import observer_of, observers_off
from fxprune.calibration.stream import CalibrationStream
from fxprune.channels import Channels, analyse_channels, permute_channels
from fxprune.channels.grouping import Reader, search_grouping
from fxprune.channels.layout import Classes
from fxprune.constraints.mask import Mask
from fxprune.errors import CalibrationError, GraphError
from fxprune.geometry import is_matrix_layer
from fxprune.graph import Runner, device_of, input_of, module_of
from fxprune.layers.problem import layer_of
from fxprune.passes.base import CalibratedPass
from fxprune.passes.insert_observers import InsertObservers
from fxprune.pattern import MixedPattern, NMPattern, Pattern
from fxprune.recipe import Recipe
from fxprune.runtime.precision import full_precision
from fxprune.runtime.processes import shared, world
from fxprune.runtime.surroundings import same_random_numbers
from fxprune.solvers import LayerProblem
from fxprune.solvers.shifted_systems import inverse_diagonal

TOLERANCE = 1e-4
ROUNDING_STEPS = 32  # In half precision; a wrong order changes the output by about its size.
IMAGES = 64
PATCHES = 32  # For each column: an order of channels needs fewer than the weights do.
EXAMPLE_IMAGES = 4


class PermuteChannels(CalibratedPass):
    """Permutes channels so that an N:M pattern costs less; to be run before InsertObservers.

    1. Every channel of every tensor gets a class; residual streams share theirs, concatenations keep those of their parts,
       padding adds classes of constants (`fxprune.channels`). What is not known to treat channels alike fixes the
       channels it reads, and so do the model's inputs and outputs, excluded, shared and tied layers.
    2. Classes that occur in the same tensors are permuted together by a greedy search for the least saliency lost,
       summed over all layers that read them, each relative to its output's variance.
    3. Rows, columns, biases and normalisation parameters are permuted in place. The network's function is compared
       on the first batch before and after.

    Layers that read channels which cannot move, or every channel several times (a flatten of several positions), are left
    out, with the reason on record. The groups are chosen for the N:M pattern that most weights are to hold, for a choice of
    patterns ("mixed:...") for the first in it; layers with groups of another size are left out.

    The search is bounded as `fxprune.solvers.permutation` says. The statistics of all layers that take part are held at
    once: D x D numbers for a layer of D columns.

    Args:
        recipe: the patterns that layers are to be pruned to.
        exclude: module names or fnmatch patterns of layers to leave exactly as they are.
        damping: lambda / mean(diag H).
        images: statistics are taken from the first so many, held-out ones left out.
        seed: of the search.

    Raises:
        CalibrationError: if there are no batches, or one cannot be used.
        GraphError: if the graph is in training mode or already observed, or if the function has changed.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        exclude: Sequence[str] = (),
        damping: float = 0.01,
        images: int = IMAGES,
        seed: int = 0,
    ) -> None:
        self.recipe = recipe
        self.images = images
        self.exclude = tuple(exclude)
        self.damping = damping
        self.seed = seed
        self._example: tuple[list[Any], list[Tensor]] | None = None  # Some images, and the output on them.

    def requires(self, graph_module: GraphModule) -> None:  # noqa: D102 - documented on Pass
        if any(annotation(node).role for node in graph_module.graph.nodes):
            raise GraphError("PermuteChannels has to run before InsertObservers")
        for node in graph_module.graph.nodes:
            module = module_of(node)
            if module is not None and any(part.training for part in module.modules()):
                raise GraphError(f"module {node.target!r} is in training mode; call eval() before PermuteChannels")

    def calibrate(self, graph_module: GraphModule, calibration: Calibration) -> PassResult:  # noqa: D102
        self._example = None
        if not any(_nm_pattern(pattern) for pattern in self.recipe.patterns):
            for node in graph_module.graph.nodes:
                module = module_of(node)
                if module is not None and is_matrix_layer(module):
                    self.record(graph_module, "kept", node, reason=f"{self.recipe} has no groups of channels")
            return PassResult(graph_module, False)
        with torch.inference_mode(), full_precision():
            channels, readers, pattern = self._observe(graph_module, calibration)
        if pattern is None:
            return PassResult(graph_module, False)
        with calibration.stopwatch.measure("solve"):
            grouping = search_grouping([r for of in readers.values() for r in of], channels, pattern, seed=self.seed)
        if np.array_equal(grouping.source, np.arange(channels.count)):
            return PassResult(graph_module, False)
        moved = permute_channels(graph_module, channels, grouping.source)
        if calibration.dense is not None:
            calibration.dense.moved(moved)
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
            steps = ROUNDING_STEPS * torch.finfo(old.dtype).eps if old.is_floating_point() else 0.0
            if not difference <= max(TOLERANCE, steps) * scale:
                raise GraphError(
                    f"permuting channels has changed the network's output by {difference:.3g}, where the largest value is "
                    f"{scale:.3g}; the channel analysis is wrong for this model: compile without permutation, and report it"
                )

    def _observe(
        self, graph_module: GraphModule, calibration: Calibration
    ) -> tuple[Channels, dict[Node, list[Reader]], NMPattern | None]:
        """Analyse the channels, and score the weights of every layer whose input channels can be permuted."""
        device = device_of(graph_module)
        example, output = calibration.run_example(graph_module)
        self._example = example.inputs, list(tensors_in(output))
        fixed = (*self.exclude, *changed_modules(graph_module))
        channels = analyse_channels(graph_module, example.shapes, exclude=fixed)
        observed = copy.deepcopy(graph_module)  # The observers go into a copy.
        twins = dict(zip(graph_module.graph.nodes, list(observed.graph.nodes), strict=True))
        InsertObservers(self.recipe, exclude=fixed, reconstruct=False)(observed)
        movable = {c for atom in channels.atoms for c in atom.tolist()}
        patterns = {node: p for node, twin in twins.items() if (p := _pattern_of(twin)) is not None}
        pattern = _most_held(patterns)
        layers: dict[Node, Node] = {}
        for node, own in patterns.items():
            reason = _reason_to_keep(channels, input_of(node), movable)
            if reason is None and pattern is not None and own.m != pattern.m:
                reason = f"{own} has groups of {own.m}, and channels are grouped for {pattern}"
            if reason is None:
                layers[node] = twins[node]
            else:
                self.record(graph_module, "kept", node, reason=reason)
        if not layers or pattern is None:
            return channels, {}, None
        few = _dealt_out(calibration.fitted_head(self.images)) if example.takes_few else list(calibration)
        images = Calibration(
            few, device=device, holdout=0.0, stopwatch=calibration.stopwatch, shapes=calibration.shapes, is_share=True
        )
        wanted = {observer_of(twin) for twin in layers.values()}
        with observers_off(observed):
            for observer in wanted:
                observer.enabled = True
            stream = CalibrationStream(observed, images, patches=PATCHES, least_images=self.images)
            stream.advance(list(observed.graph.nodes)[-1])
        with calibration.stopwatch.measure("solve"):
            for twin in layers.values():
                observer_of(twin).statistics()  # All processes have to ask before each goes on alone.

            def readers_of(node: Node) -> list[Reader]:
                return list(_readers(layers[node], channels.layouts[input_of(node)].classes, self.damping))

            readers = dict(zip(layers, shared(readers_of, list(layers)), strict=True))
        return channels, readers, pattern


def _dealt_out(batches: Sequence[Any]) -> list[Any]:
    """Of each batch that all processes have, this one's part, of whose images the same rows are taken as in one process.

    Which rows these are goes by an image's place in its batch, turned by the batch's number (`images_taken`). A part is a batch
    with another number.
    """
    here = world()
    if here.count == 1:
        return list(batches)
    own, turn = list[Any](), 0
    for number, batch in enumerate(batches):
        in_turn = torch.arange(count(batch)).roll(-number)
        for process in range(here.count):
            part = in_turn[replace(here, number=process).share(len(in_turn))]
            if len(part) and process == here.number:
                own.append(take(batch, part.roll(turn)))
            turn += len(part) > 0
    return own


def _nm_pattern(pattern: Pattern) -> NMPattern | None:
    """The pattern itself, or the first N:M of a choice of them; None if it has none."""
    if isinstance(pattern, MixedPattern):
        return next((level for level in pattern.levels if isinstance(level, NMPattern)), None)
    return pattern if isinstance(pattern, NMPattern) else None


def _pattern_of(node: Node) -> NMPattern | None:
    """The N:M pattern that a layer's own weight is to hold: the layer's, not that of factors that take its place."""
    chain = annotation(node).chain
    return _nm_pattern(chain[0].pattern) if chain and isinstance(chain[0], Mask) else None


def _most_held(patterns: Mapping[Node, NMPattern]) -> NMPattern | None:
    """The pattern that most weights are to hold."""
    weights: dict[NMPattern, int] = {}
    for node, pattern in patterns.items():
        weights[pattern] = weights.get(pattern, 0) + layer_of(node).weight.numel()
    return max(weights, key=lambda pattern: weights[pattern], default=None)


def _run(graph_module: GraphModule, inputs: Sequence[Any]) -> list[Tensor]:
    """The tensors in the graph's output, on images of the first batch."""
    try:
        with same_random_numbers():
            output = Runner(graph_module).run(*map_tensors(list(inputs), torch.clone))  # A hook may write into them.
    except Exception as error:
        if stays_as_it_is(error):
            raise
        shapes = [tuple(x.shape) for x in tensors_in(inputs)]
        raise CalibrationError(
            f"the model failed on calibration batch 0, shapes {shapes}: {said(error)}. Check the batch and the image size"
        ) from error
    return list(tensors_in(output))


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
    geometry = annotation(node).geometry
    assert geometry is not None
    weight = geometry.to_matrix(layer_of(node).weight.detach()).double()
    statistics = observer_of(node).statistics()
    hessian = statistics.hessian(centred=True)
    problem = LayerProblem(hessian, weight, weight, rank=statistics.count).damped(damping)  # Of H alone.
    assert problem.shift is not None
    variance = ((problem.image(weight) - weight * problem.shift[:, None]) * weight).sum()
    inverse = torch.stack([inverse_diagonal(group) for group in problem.groups()])
    scores = weight.square() / inverse[:, None] / torch.where(variance > 0, variance, 1.0)
    scores = replace(geometry, blocks=1).to_matrix(geometry.to_weight(scores))
    for group, of in zip(scores, np.split(classes, geometry.groups), strict=True):
        yield Reader(group.reshape(-1, len(of)), of)
