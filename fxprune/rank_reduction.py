"""low_rank(): trace the model, fold BatchNorm, and factor its layers one after another."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from fxprune.calibration.batches import first_item, read_all
from fxprune.compiled import CompiledModule
from fxprune.devices import default_device
from fxprune.graph import device_of
from fxprune.options import Options
from fxprune.passes import FoldBatchNorm, InsertObservers, RemoveInplace, RemoveObservers, verify
from fxprune.passes.low_rank import LowRank
from fxprune.progress import layer_progress
from fxprune.ranks import Factorable, Method, RankPlan, RankRule, Split, low_rank_options, splits_of, survey
from fxprune.ranks.speedup import plan_for_speedup
from fxprune.tracing import trace


def low_rank(
    model: nn.Module,
    calib_loader: Iterable[Any],
    rank: str | RankRule | RankPlan = "multiply_adds:0.7",
    *,
    method: Method = "data_aware",
    split: Split | Literal["auto"] = "auto",
    multiple: int | None = None,
    exclude: Sequence[str] = (),
    device: torch.device | str | None = None,
    progress: bool = True,
    options: Options | None = None,
) -> CompiledModule:
    """Replace convolutions and linear layers by two smaller ones each: fewer multiply-adds, no retraining, no labels.

    The result can be pruned in turn: `fxprune.compile(fxprune.low_rank(model, loader), loader, "2:4")`.

    Args:
        model: trained model; it is copied, never modified.
        calib_loader: iterable of batches, read once and held in memory: tensors, or tuples, lists or dicts whose first
            item is the input.
        rank: "multiply_adds:0.7" (the network keeps 70% of them, spread over the layers by the error each rank makes),
            "ratio:0.5" (each layer keeps half of its own), "energy:0.95" (each layer keeps 95% of its output's
            variance), or "speedup:1.3" (1.3 times faster than dense in onnxruntime on this machine's CPU, one image,
            one thread, measured on exported files).
        method: "data_aware" (least output error, each layer fitted to the dense model's output), or "svd" (as
            published: truncated singular value decomposition of the weight).
        split: "channel" (k x k to r channels, then 1 x 1), "spatial" (k x 1 to r channels, then 1 x k), or "auto".
        multiple: ranks are multiples of it; None takes 16 for "speedup", which suits the kernels of most CPUs, else 4,
            with which the new layers can be pruned 2:4.
        exclude: module names or fnmatch patterns of layers to leave exactly as they are.
        device: where to compute; None takes CUDA if there is one. The result is where the model was.
        progress: show a progress bar.
        options: damping, target, bias correction, ...; those of pruning only are errors.

    Returns:
        A GraphModule in eval mode, with `.report`. Layer `conv` has become `conv.0` and `conv.1`.

    Raises:
        FxPruneError: a subclass that names what is wrong, and the remedy.
    """
    started = time.perf_counter()
    device = default_device(device)
    options = low_rank_options(options, method)
    rule = rank if isinstance(rank, RankPlan) else RankRule.parse(rank)
    by_time = isinstance(rule, RankRule) and rule.kind == "speedup"
    multiple = (16 if by_time else 4) if multiple is None else multiple
    splits = splits_of(split)
    with layer_progress(progress) as on_layer:
        batches = read_all(calib_loader)
        graph_module = trace(model, exclude=exclude, example=batches[0])
        home = device_of(graph_module)
        graph_module.to(device)
        RemoveInplace()(graph_module)
        if options.fold_batchnorm:
            FoldBatchNorm(exclude=exclude)(graph_module)
        InsertObservers(Factorable(splits), exclude=exclude, reconstruct=bool(options.reconstruct))(graph_module)
        if isinstance(rule, RankRule) and by_time:
            on_layer("measuring", 0)
            found = survey(graph_module, batches, method=method, splits=splits, multiple=multiple, options=options)
            rule = plan_for_speedup(graph_module, found, rule.value, first_item(batches[0])[:1])
        factor = LowRank(batches, options, rank=rule, method=method, split=split, multiple=multiple, on_layer=on_layer)
        factor(graph_module)
        RemoveObservers()(graph_module)
        verify(graph_module)
    return CompiledModule.of(graph_module.to(home), seconds=time.perf_counter() - started)
