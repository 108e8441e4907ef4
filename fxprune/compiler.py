"""compile(): trace the model, fold BatchNorm, insert observers, prune layer by layer, take the observers out again."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fxprune import solvers
from fxprune.calibration.batches import peek, read_all
from fxprune.calibration.stopwatch import Stopwatch
from fxprune.compiled import CompiledModule
from fxprune.devices import default_device
from fxprune.graph import device_of
from fxprune.options import Options, given_options
from fxprune.passes import (
    AllocateSparsity,
    FoldBatchNorm,
    InsertObservers,
    PermuteChannels,
    Polish,
    PruneWeights,
    RemoveInplace,
    RemoveObservers,
    verify,
)
from fxprune.pattern import Pattern
from fxprune.progress import layer_progress
from fxprune.tracing import trace

PERMUTATION_IMAGES = 64


def compile(
    model: nn.Module,
    calib_loader: Iterable[Any],
    pattern: str | Pattern = "2:4",
    *,
    method: str = "admm",
    exclude: Sequence[str] = (),
    device: torch.device | str | None = None,
    progress: bool = True,
    options: Options | None = None,
) -> CompiledModule:
    """Prune a trained CNN in one shot: no retraining, no labels.

    Args:
        model: trained model; it is copied, never modified.
        calib_loader: iterable of batches, read once: tensors, or tuples, lists or dicts whose first item is the input.
            A few hundred to a few thousand images, preprocessed as for inference.
        pattern: "2:4", "1:4", ... (N kept of M consecutive input channels), or a sparsity such as "0.9".
        method: "admm" (ours), or as published "sparsegpt", "exact_obs" (slow), "magnitude".
        exclude: module names or fnmatch patterns of layers to leave exactly as they are.
        device: where to compute; None takes CUDA if there is one. The result is where the model was.
        progress: show a progress bar.
        options: everything else.

    Returns:
        A GraphModule in eval mode, with `.report`.

    Raises:
        FxPruneError: a subclass that names what is wrong, and the remedy.
    """
    started = time.perf_counter()
    pattern = Pattern.parse(pattern)
    options = given_options(options).resolved(method, pattern)
    device = default_device(device)
    stopwatch = Stopwatch(device)
    solvers.get(method)  # A misspelt name is told before anything is read.

    with layer_progress(progress) as on_layer:
        # What looks at the whole set besides pruning needs it in memory; otherwise batches are read as they come.
        batches = read_all(calib_loader) if options.global_budget or options.polish else calib_loader
        head, batches = peek(batches, PERMUTATION_IMAGES if options.permute else 1)
        graph_module = trace(model, exclude=exclude, example=head[0])
        home = device_of(graph_module)
        graph_module.to(device)

        RemoveInplace()(graph_module)
        if options.fold_batchnorm:
            FoldBatchNorm(exclude=exclude)(graph_module)
        if options.permute:
            PermuteChannels(
                pattern,
                head,
                images=PERMUTATION_IMAGES,
                exclude=exclude,
                damping=options.damping,
                seed=options.seed,
                stopwatch=stopwatch,
            )(graph_module)
        dense = copy.deepcopy(graph_module) if options.polish else None
        InsertObservers(pattern, exclude=exclude, reconstruct=bool(options.reconstruct))(graph_module)
        if options.global_budget:
            AllocateSparsity(pattern, method, read_all(batches), options, stopwatch=stopwatch)(graph_module)
        PruneWeights(pattern, method, batches, options, on_layer=on_layer, stopwatch=stopwatch)(graph_module)
        RemoveObservers()(graph_module)
        if dense is not None:
            Polish(dense, read_all(batches), epochs=options.polish, flip=options.flip, seed=options.seed)(graph_module)
        verify(graph_module)

    return CompiledModule.of(graph_module.to(home), seconds=time.perf_counter() - started)
