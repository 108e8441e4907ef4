"""low_rank(): trace the model, fold BatchNorm, and factor its layers one after another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from os import PathLike
from typing import Any, Literal, get_args

import torch
from torch import nn

from fxprune.compiled import CompiledModule
from fxprune.compiler import compile, solving_passes
from fxprune.constraints.rank import Rank
from fxprune.errors import OptionsError
from fxprune.layers.splits import Split, splits_of
from fxprune.options import OURS, PUBLISHED, Factorisation, Method, Options, given_options
from fxprune.ranks.plan import RankPlan, RankRule
from fxprune.recipe import Recipe
from fxprune.solvers import ADMM, Magnitude

UNUSED = ("permute", "global_budget", "polish")


def low_rank(
    model: nn.Module | str | PathLike[str],
    calib_loader: Iterable[Any],
    rank: str | RankRule | RankPlan = "macs:0.7",
    *,
    method: Factorisation = "data_aware",
    split: Split | Literal["auto"] = "auto",
    multiple: int | None = None,
    exclude: Sequence[str] = (),
    options: Options | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    memory_limit: int | None = None,
    checkpoint_dir: str | None = None,
) -> CompiledModule:
    """Replace convolutions and linear layers by two smaller ones each: fewer MACs, no retraining, no labels.

    The same as `compile` with the recipe "rank:0.7", with more to choose. To prune the factors too, use the recipe
    "rank:0.7+2:4": their targets are then the dense model's.

    Args:
        model: trained model, or an ONNX file, as for `compile`; it is copied, never modified.
        calib_loader: iterable of batches as for `compile`.
        rank: "macs:0.7" (the network keeps 70% of them, spread over the layers by the error each rank makes),
            "ratio:0.5" (each layer keeps half of its own), "energy:0.95" (each layer keeps 95% of its output's
            variance), or "speedup:1.3" (1.3 times faster than dense in onnxruntime on this machine's CPU, one image,
            one thread, measured on exported files).
        method: "data_aware" (least output error, each layer fitted to the dense model's output), or "svd" (as
            published: truncated singular value decomposition of the weight).
        split: "channel" (k x k to r channels, then 1 x 1), "spatial" (k x 1 to r channels, then 1 x k), or "auto".
        multiple: ranks are multiples of it; None takes 16 for "speedup", which suits the kernels of most CPUs, else 4,
            with which the new layers can be pruned 2:4.
        exclude: module names or fnmatch patterns of layers to leave exactly as they are.
        options: damping, target, bias correction, ...; those of pruning only are errors.
        device: where to compute; None takes CUDA if there is one. The result is where the model was.
        progress: show a progress bar.
        memory_limit: as for `compile`.
        checkpoint_dir: as for `compile`.

    Returns:
        A GraphModule in eval mode, with `.report`. Layer `conv` has become `conv.0` and `conv.1`.

    Raises:
        FxPruneError: a subclass that names what is wrong, and the remedy.
    """
    rule = rank if isinstance(rank, RankPlan) else RankRule.parse(rank)
    if multiple is None:
        multiple = 16 if isinstance(rule, RankRule) and rule.kind == "speedup" else 4
    recipe = Recipe((("*", (Rank(rule, splits_of(split), multiple),)),))
    solver = Magnitude() if method == "svd" else ADMM()
    options = low_rank_options(options, method)
    compiled = compile(
        model,
        calib_loader,
        exclude=exclude,
        options=options,
        passes=solving_passes(recipe, Method(solver, options, label=method), exclude=exclude),
        device=device,
        progress=progress,
        memory_limit=memory_limit,
        checkpoint_dir=checkpoint_dir,
    )
    assert isinstance(compiled, CompiledModule)  # Passes are for one graph.
    return compiled


def low_rank_options(options: Options | None, method: Factorisation) -> Options:
    """Options with every None replaced: "data_aware" fits to the dense model's output, "svd" leaves weights as published.

    Raises:
        OptionsError: an unknown method, or an option that is asked for and has no part in rank reduction.
    """
    if method not in get_args(Factorisation):
        raise OptionsError(f"unknown method {method!r}; choose one of {', '.join(map(repr, get_args(Factorisation)))}")
    given = given_options(options)
    if unused := [name for name in UNUSED if getattr(given, name, None)]:
        raise OptionsError(f"{', '.join(unused)}: low_rank has no such step; use fxprune.compile with 'rank:0.7+2:4'")
    own = replace(OURS, target="skip", permute=False) if method == "data_aware" else PUBLISHED
    missing = {f.name: getattr(own, f.name) for f in fields(given) if getattr(given, f.name) is None}
    return replace(given, **missing)
