"""What became of a layer's tensors, in a few words."""

from __future__ import annotations

import torch

from fxprune.graph_diff.model_graph import GraphNode, Weights
from fxprune.graph_diff.weights import ROUNDING, changed_others, same_numbers
from fxprune.graph_diff.wording import percent


def weight_phrases(before: Weights, after: GraphNode, change: float | None, *, ordered: bool) -> list[str]:
    """What became of the weight.

    Args:
        before: tensors before, with BatchNorm folded and channels permuted as they are after.
        after: the node after.
        change: relative change of the weight, 0 for one that does not differ.
        ordered: False if channels may stand in another order than before.
    """
    phrases = []
    old, new = before.weight, after.weights.weight
    if old is not None and new is not None and old.shape == new.shape and change != 0.0:
        if change is not None and change < ROUNDING:
            phrases.append("weight differs by rounding")
        elif not ordered and same_numbers(old, new):
            phrases.append("channels permuted")
        elif after.pattern:
            phrases.append(f"pruned to {after.pattern}")
        else:
            phrases.append("re-fitted" if after.status == "reconstructed" else "weight changed")
    if new is not None and not torch.isfinite(new).all():
        phrases.append("weight holds NaN or infinite values")
    return phrases


def other_phrases(before: Weights, after: GraphNode, *, rounded: bool, ordered: bool) -> list[str]:
    """What became of bias, statistics and other tensors beside the weight.

    Args:
        before: as for `weight_phrases`.
        after: the node after.
        rounded: whether BatchNorm was folded, so that tiny differences come from rounding.
        ordered: as for `weight_phrases`.
    """
    old, new = before.others, after.weights.others
    zero_bias = {name for name, tensor in {**old, **new}.items() if name == "bias" and not tensor.any()}
    phrases = [f"{name} added" for name in new if name not in old and name not in zero_bias]
    phrases += [f"{name} removed" for name in old if name not in new and name not in zero_bias]
    for name, moved_by in changed_others(old, new).items():
        if not ordered and same_numbers(old[name], new[name]):
            continue
        if moved_by is None or not ordered:
            phrases.append(f"{name} changed")
        elif moved_by > (ROUNDING if rounded else 0):
            phrases.append(f"{name} changed by {percent(moved_by)}")
    return phrases
