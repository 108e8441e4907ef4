"""Compares matched nodes, and says of removed and inserted ones what became of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.export.inspection import PATTERNS, held_patterns
from fxprune.graph_diff.channel_order import Order, find_orders
from fxprune.graph_diff.matching import Matching, sources
from fxprune.graph_diff.model_graph import GraphNode, ModelGraph
from fxprune.graph_diff.pictures import draw_weights
from fxprune.graph_diff.result import NodeDiff, NodeState, Status
from fxprune.graph_diff.text import NOT_PRUNED, percent, sizes
from fxprune.graph_diff.weights import (
    ROUNDING,
    Weights,
    changed_others,
    composed,
    fold,
    relative_change,
    reorder,
    same_numbers,
    was_folded,
)

REARRANGED = "the same weights in another order"
_LEAST_SPARSITY = min(pattern.sparsity for pattern in PATTERNS)


@dataclass(frozen=True)
class Comparison:
    """Two graphs, what corresponds in them, and every node summed up.

    Attributes:
        before: the first graph.
        after: the second graph.
        matching: which nodes correspond.
        folded: id before of a removed BatchNorm -> id before of the layer that it was folded into.
        old: nodes before, by id.
        new: nodes after, by id.
        states_before: nodes before summed up, by id.
        states_after: likewise.
        comparable: tensors before, by id after: BatchNorm folded and channels in the order that they have after.
        orders: (inputs, outputs) by id after: where the channels of a node whose order changed stood before.
        orders_found: whether these were found from the weights, because no pass wrote them down.
    """

    before: ModelGraph
    after: ModelGraph
    matching: Matching
    folded: Mapping[str, str]
    old: Mapping[str, GraphNode]
    new: Mapping[str, GraphNode]
    states_before: Mapping[str, NodeState]
    states_after: Mapping[str, NodeState]
    comparable: Mapping[str, Weights]
    orders: Mapping[str, Order]
    orders_found: bool

    @classmethod
    def of(cls, before: ModelGraph, after: ModelGraph, matching: Matching) -> Comparison:
        """Find out which BatchNorms were folded, and sum up all nodes."""
        old, new = ({node.id: node for node in graph.nodes} for graph in (before, after))
        states = [{node.id: node_state(node) for node in graph.nodes} for graph in (before, after)]
        folded = _folded(before, after, matching, old, new)
        weights = {}
        for name, heir in matching.pairs.items():
            weights[heir] = old[name].weights
            for norm in (norm for norm, layer in folded.items() if layer == name):
                weights[heir] = fold(weights[heir], old[norm].weights)
        recorded = any(node.is_permuted for node in [*old.values(), *new.values()])
        orders = dict(find_orders(after.nodes, weights, {node.id: node.weights for node in after.nodes}))
        for name, heir in matching.pairs.items():
            if old[name].is_permuted or new[heir].is_permuted:
                orders[heir] = _recorded_order(old[name], new[heir])
        orders = {name: order for name, order in orders.items() if order[0] is not None or order[1] is not None}
        comparable = weights | {name: reorder(weights[name], *order) for name, order in orders.items()}
        found = bool(orders) and not recorded
        return cls(before, after, matching, folded, old, new, states[0], states[1], comparable, orders, found)

    @property
    def has_unknown_order(self) -> bool:
        """Whether a pass permuted channels and did not write down how."""
        permuted = [any(c.action == "permuted" for c in graph.changes) for graph in (self.before, self.after)]
        return permuted == [False, True] and not self.orders

    def matched(self, before: str, after: str) -> NodeDiff:
        """The difference between two nodes that correspond."""
        u, v = self.old[before], self.new[after]
        norms = [self.old[norm] for norm, layer in self.folded.items() if layer == before]
        weights = self.comparable[after]
        change = relative_change(weights.all, v.weights.all)
        if norms and change is not None and change < ROUNDING:
            change = 0.0
        ordered = not self.has_unknown_order
        phrases = [
            *self._operation_changes(u, v),
            *weight_phrases(weights, v, change),
            *other_phrases(weights, v, rounded=bool(norms), ordered=ordered),
        ]
        if REARRANGED in phrases or (change and not ordered):
            change = None
        if after in self.orders:
            phrases.append(_what_moved(self.orders[after]))
        phrases += [f"{_short(norm, v)} folded in" for norm in norms]
        phrases += self._input_changes(u, v)
        if u.name != v.name and u.weights.all is not None:
            phrases.append(f"was {u.name}")
        status: Status = "unchanged" if not phrases else "changed"
        return NodeDiff(
            name=v.name,
            status="replaced" if u.op != v.op else status,
            before=self.states_before[before],
            after=self.states_after[after],
            changes=tuple(phrases),
            folded=tuple(norm.name for norm in norms),
            weight_change=change,
            output_error=v.output_error,
            reason=_reason(v),
            notes=self._notes(v),
            picture=draw_weights(weights, v.weights),
        )

    def removed(self, before: str) -> NodeDiff:
        """A node that only the first graph has."""
        u = self.old[before]
        layer = self.folded.get(before)
        heirs = [self.new[name] for name in self.matching.replaced.get(before, ())]
        change, phrase, into = None, "", tuple(heir.name for heir in heirs)
        if layer is not None:
            into = (self.new[self.matching.pairs[layer]].name,)
            phrase = f"folded into {into[0]}"
        elif heirs:
            phrase = f"replaced by {', '.join(into)}"
            change = _change_of_composed(u, self._norm_replaced_with(u), heirs)
        return NodeDiff(
            name=u.name,
            status="replaced" if heirs else "removed",
            before=self.states_before[before],
            after=None,
            changes=(phrase,) if phrase else (),
            into=into,
            weight_change=change,
            notes=self._notes(u),
            picture=draw_weights(u.weights, None),
        )

    def _norm_replaced_with(self, layer: GraphNode) -> GraphNode | None:
        """The BatchNorm behind a layer that went into the same new layers as it did."""
        heirs = self.matching.replaced[layer.id]
        norms = (self.old[name] for name, others in self.matching.replaced.items() if others == heirs)
        return next((n for n in norms if n.weights.scale is not None and n.inputs == (layer.id,)), None)

    def inserted(self, after: str) -> NodeDiff:
        """A node that only the second graph has."""
        v = self.new[after]
        replaced = [self.old[name].name for name, heirs in self.matching.replaced.items() if after in heirs]
        phrases = [f"in place of {', '.join(replaced)}"] if replaced else []
        if v.pattern:
            phrases.append(f"pruned to {v.pattern}")
        return NodeDiff(
            name=v.name,
            status="inserted",
            before=None,
            after=self.states_after[after],
            changes=tuple(phrases),
            output_error=v.output_error,
            reason=_reason(v),
            notes=self._notes(v),
            picture=draw_weights(None, v.weights),
        )

    def _operation_changes(self, u: GraphNode, v: GraphNode) -> list[str]:
        """Operation, arguments and sizes."""
        old, new = self.states_before[u.id], self.states_after[v.id]
        if u.op != v.op:
            return [f"{u.op} → {v.op}"]
        names = dict.fromkeys([*u.arguments, *v.arguments])
        differing = [name for name in names if u.arguments.get(name) != v.arguments.get(name)]
        phrases = [f"{name} {u.arguments.get(name, 'unset')} → {v.arguments.get(name, 'unset')}" for name in differing]
        if old.weight_shape != new.weight_shape:
            phrases.append(f"weight {sizes(old.weight_shape)} → {sizes(new.weight_shape)}")
        if old.dtype != new.dtype:
            phrases.append(f"{old.dtype or 'no weight'} → {new.dtype or 'no weight'}")
        shapes = (old.output_shape, new.output_shape)
        if None not in shapes and shapes[0] != shapes[1]:
            phrases.append(f"output {sizes(shapes[0] or ())} → {sizes(shapes[1] or ())}")
        return phrases

    def _input_changes(self, u: GraphNode, v: GraphNode) -> list[str]:
        """Other sources, not counting what was removed or inserted between."""
        pairs = self.matching.pairs
        old = tuple(pairs[source] for source in sources(u, self.old, pairs))
        new = sources(v, self.new, set(pairs.values()))
        if old == new:
            return []
        old_names, new_names = (", ".join(self.new[s].name for s in found) or "nothing" for found in (old, new))
        return [f"reads {new_names} instead of {old_names}"]

    def _notes(self, node: GraphNode) -> tuple[str, ...]:
        """What passes wrote down about a node, each note once, and without the reason that the layer's report gives."""
        told = [
            f"{change.pass_name}: {change.reason}"
            for change in self.after.changes
            if change.node == node.id and change.reason and change.reason != node.reason
        ]
        return tuple(dict.fromkeys(told))


def node_state(node: GraphNode) -> NodeState:
    """Sum up a node, without its tensors."""
    weight = node.weights.all
    learnt = [t.numel() for name, t in node.weights.others.items() if "running_" not in name and t.is_floating_point()]
    state = NodeState(
        node=node.id,
        op=node.op,
        arguments=dict(node.arguments),
        output_shape=node.output_shape,
        parameters=sum(learnt),
        macs=node.macs,
    )
    if weight is None:
        return state
    nonzeros = int(torch.count_nonzero(weight))
    sparsity = 1 - nonzeros / max(weight.numel(), 1)
    numbers = {
        "weights": weight.numel(),
        "weight_shape": () if node.weights.weight is None else tuple(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "parameters": state.parameters + weight.numel(),
        "nonzeros": nonzeros,
        "sparsity": sparsity,
        "pattern": node.pattern or _patterns(node, weight, sparsity),
    }
    return NodeState(**{**vars(state), **numbers})


def _patterns(node: GraphNode, weight: Tensor, sparsity: float) -> str:
    if node.weights.matrices and sparsity >= _LEAST_SPARSITY:
        of_each = [held_patterns(matrix) for matrix in node.weights.matrices.values()]
        return ", ".join(str(pattern) for pattern in of_each[0] if all(pattern in held for held in of_each))
    if weight.dim() < 2 or sparsity < _LEAST_SPARSITY:
        return ""
    reduced = weight.transpose(0, 1) if node.weights.transposed else weight
    return ", ".join(map(str, held_patterns(reduced)))


def _folded(
    before: ModelGraph,
    after: ModelGraph,
    matching: Matching,
    old: Mapping[str, GraphNode],
    new: Mapping[str, GraphNode],
) -> dict[str, str]:
    """Removed BatchNorms that went into the layer before them: on record, or by the looks of its weights."""
    recorded = {(change.node, change.into) for change in after.changes if change.action == "folded"}
    folded = {}
    for norm in before.nodes:
        layer = norm.inputs[0] if norm.inputs else ""
        if norm.id in matching.pairs or norm.weights.scale is None or layer not in matching.pairs:
            continue
        heir = matching.pairs[layer]
        if old[layer].weights.weight is not None and (
            (norm.id, heir) in recorded or was_folded(old[layer].weights, norm.weights, new[heir].weights)
        ):
            folded[norm.id] = layer
    return folded


def _reason(node: GraphNode) -> str:
    """Why a layer was not pruned; how it was factored."""
    if not node.reason or node.status == "pruned":
        return ""
    return node.reason if node.status in ("factored", "narrowed") else f"{NOT_PRUNED}{node.reason}"


def _change_of_composed(node: GraphNode, norm: GraphNode | None, heirs: list[GraphNode]) -> float | None:
    """Relative change of a layer that two layers in a row replace, with the BatchNorm that they replace too."""
    layers = [heir.weights for heir in heirs if heir.weights.weight is not None]
    if len(layers) != 2 or any(layer.groups != 1 or layer.transposed for layer in [*layers, node.weights]):
        return None
    first, second, weights = layers[0].weight, layers[1].weight, node.weights
    if first is None or second is None or weights.weight is None:
        return None
    if norm is not None:
        weights = fold(weights, norm.weights)
    return relative_change(weights.weight, composed(first, second))


def _short(norm: GraphNode, layer: GraphNode) -> str:
    """A BatchNorm's name without the part that the layer has too; "BN" if only a number is left."""
    stem = layer.name.rpartition(".")[0]
    name = norm.name.removeprefix(f"{stem}.") if stem else norm.name
    return "BN" if name.isdecimal() else name


def weight_phrases(before: Weights, after: GraphNode, change: float | None) -> list[str]:
    """What became of the weight.

    Args:
        before: tensors before, with BatchNorm folded and channels permuted as they are after.
        after: the node after.
        change: relative change of the weight, 0 for one that does not differ.
    """
    phrases = []
    old, new = before.all, after.weights.all
    if old is not None and new is not None and old.shape == new.shape and change != 0.0:
        if change is not None and change < ROUNDING:
            phrases.append("weight differs by rounding")
        elif same_numbers(old, new):
            phrases.append(REARRANGED)
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
        ordered: False if channels may stand in another order than before.
    """
    old, new = before.others, after.weights.others
    zero_bias = {name for name, tensor in {**old, **new}.items() if name == "bias" and not tensor.any()}
    phrases = [f"{name} added" for name in new if name not in old and name not in zero_bias]
    phrases += [f"{name} removed" for name in old if name not in new and name not in zero_bias]
    changed = changed_others(old, new)
    rearranged = [name for name in changed if same_numbers(old[name], new[name])]
    if rearranged:
        phrases.append(f"{', '.join(rearranged)} in another order")
    for name, moved_by in changed.items():
        if name in rearranged:
            continue
        if moved_by is None or not ordered:
            phrases.append(f"{name} changed")
        elif moved_by > ROUNDING:
            phrases.append(f"{name} changed by {percent(moved_by)}")
        elif not rounded:
            phrases.append(f"{name} differs by rounding")
    return phrases


def _recorded_order(before: GraphNode, after: GraphNode) -> Order:
    """Where the channels after stood before, when each model says where its channels stood before a pass moved them."""
    inputs, outputs = (_from_one_to_other(a, b) for a, b in zip(before.order, after.order, strict=True))
    return inputs, outputs


def _from_one_to_other(before: Tensor | None, after: Tensor | None) -> Tensor | None:
    """New channel i is old channel result[i], if new channel i was first channel `after[i]`, and old `before[i]`.

    None where all stayed, and where the old ones do not hold all of the new: they cannot be compared one by one.
    """
    if before is None or after is None:
        if before is None or not torch.equal(before.sort().values, torch.arange(len(before))):
            return after
        return torch.argsort(before)
    places = {int(channel): i for i, channel in enumerate(before)}
    order = torch.tensor([places.get(int(channel), -1) for channel in after])
    if bool((order < 0).any()) or (len(before) == len(after) and torch.equal(order, torch.arange(len(order)))):
        return None
    return order


def _what_moved(order: Order) -> str:
    """Whether channels were removed, permuted, or both."""
    moved = any(places is not None and not torch.equal(places, places.sort().values) for places in order)
    fewer = any(places is not None and len(places) <= int(places.max()) for places in order)
    return "channels removed and permuted" if fewer and moved else f"channels {'permuted' if moved else 'removed'}"
