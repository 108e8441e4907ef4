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

from fxprune.batches import EMPTY, input_tensor
from fxprune.channels import Channels, analyse_channels, permute_channels, value_shapes
from fxprune.channels.grouping import Grouping, Reader, search_grouping
from fxprune.errors import CalibrationError, GraphError
from fxprune.geometry import is_matrix_layer
from fxprune.graph import input_of, module_of
from fxprune.layer_solution import layer_of, observer_of
from fxprune.passes.base import Pass
from fxprune.passes.insert_observers import TASK, InsertObservers, LayerTask
from fxprune.pattern import NMPattern, Pattern
from fxprune.precision import full_precision
from fxprune.solvers import LayerProblem

TOLERANCE = 1e-4


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
            Some hundred images are enough.
        exclude: module names or fnmatch patterns of layers to leave exactly as they are.
        damping: lambda / mean(diag H).
        seed: of the search.

    Raises:
        CalibrationError: if there are no batches, or one cannot be used.
        GraphError: if the graph is in training mode or already observed, or if the function has changed.
    """

    def __init__(
        self,
        pattern: Pattern,
        batches: Iterable[Any],
        *,
        exclude: Sequence[str] = (),
        damping: float = 0.01,
        seed: int = 0,
    ) -> None:
        self.pattern = pattern
        self.batches = batches
        self.exclude = tuple(exclude)
        self.damping = damping
        self.seed = seed
        self._example: tuple[Tensor, list[Any]] | None = None

    def requires(self, graph_module: GraphModule) -> None:  # noqa: D102 - documented on Pass
        if any(module.training for module in graph_module.modules()):
            raise GraphError("PermuteChannels needs the graph in eval mode; call eval() first")
        if any(TASK in node.meta for node in graph_module.graph.nodes):
            raise GraphError("PermuteChannels has to run before InsertObservers")

    def call(self, graph_module: GraphModule) -> PassResult:  # noqa: D102 - documented on Pass
        self._example = None
        levels = (self.pattern, *self.pattern.levels)
        pattern = next((level for level in levels if isinstance(level, NMPattern)), None)
        if pattern is None:
            for node in graph_module.graph.nodes:
                if is_matrix_layer(module_of(node)):
                    self.record(graph_module, "kept", node, reason=f"pattern {self.pattern} has no groups of channels")
            return PassResult(graph_module, False)
        with torch.inference_mode(), full_precision():
            return self._permute(graph_module, pattern)

    def _permute(self, graph_module: GraphModule, pattern: NMPattern) -> PassResult:
        observed = copy.deepcopy(graph_module)
        InsertObservers(pattern, exclude=self.exclude, reconstruct=False)(observed)
        batches = self._inputs(graph_module)
        first = next(batches, None)
        if first is None:
            raise CalibrationError(EMPTY)
        self._example = first, tree_leaves(graph_module(first))
        channels = analyse_channels(graph_module, value_shapes(graph_module, first), exclude=self.exclude)
        layers = self._layers(graph_module, channels, observed)
        if not layers:
            return PassResult(graph_module, False)
        observed(first)
        for x in batches:
            observed(x)
        readers = {node: _readers(twin, channels.layouts[input_of(node)].classes, self.damping) for node, twin in layers.items()}
        grouping = search_grouping([r for of in readers.values() for r in of], channels, pattern, seed=self.seed)
        if np.array_equal(grouping.source, np.arange(channels.count)):
            return PassResult(graph_module, False)
        permute_channels(graph_module, channels, grouping.source)
        ...
