"""Finds in which order the channels of one model stand in another, from the weights, where no pass wrote it down.

The order of a layer's output channels means nothing as long as all layers that read them expect the same one. Channels that
an operation ties together, such as those that an add puts on top of each other, form a *space* with one order. As in the
weight matching of Ainsworth, Hayase & Srinivasa, "Git Re-Basin" (2023), the order of one space at a time is chosen such that
the rows of the layers that write it and the columns of those that read it resemble those of the other model most, the orders
of the other spaces being held. An order is only accepted if it explains much that the order as it stands does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxprune.graph_diff.model_graph import GraphNode
from fxprune.graph_diff.weights import Weights

Order = tuple[Tensor | None, Tensor | None]

_CONCAT = ("cat", "concat", "concatenate", "Concat")
# Operations after which channel i need no longer be channel i.
_BREAKS = frozenset(
    "chunk split tensor_split unbind getitem select index_select narrow permute transpose swapaxes T t matmul mm bmm einsum "
    "baddbmm scaled_dot_product_attention multi_head_attention_forward pixel_shuffle pixel_unshuffle channel_shuffle roll flip "
    "PixelShuffle PixelUnshuffle ChannelShuffle MultiheadAttention LSTM GRU RNN Unfold Fold stack "
    "Split Slice Gather GatherND Transpose MatMul Einsum DepthToSpace SpaceToDepth SequenceAt".split()
)
_SWEEPS = 4
_SAMPLE = 1024  # columns of a matrix that are looked at: an order needs fewer than a weight does
_LIKE = 0.5  # least mean cosine between a channel and the one that it is taken for
_GAIN = 0.2  # by which that must exceed the mean cosine in the order as it stands
_EQUAL = 1e-5  # relative; equal but for rounding


@dataclass(eq=False)
class _Space:
    """Channels that can only move together; `fixed` if their order is known to be the same in both models."""

    size: int
    fixed: bool = False
    parent: _Space | None = None
    order: Tensor | None = None  # new channel i is old channel order[i]; None while unknown
    terms: list[_Term] = field(default_factory=list)

    @property
    def root(self) -> _Space:
        space = self
        while space.parent is not None:
            space = space.parent
        return space


Parts = tuple[_Space, ...]  # of a tensor's channels, one after another


@dataclass(eq=False)
class _Term:
    """A tensor with a space along axis 0: (n, other side, ...), and what orders the other side, if anything."""

    before: Tensor
    after: Tensor
    other: Parts | None


def find_orders(
    nodes: Sequence[GraphNode], before: Mapping[str, Weights], after: Mapping[str, Weights]
) -> dict[str, Order]:
    """(inputs, outputs) of each node whose channels stand in another order: new channel i is old channel `inputs[i]`.

    Args:
        nodes: of the second graph, in topological order.
        before: tensors that nodes with a counterpart in the first graph have there, by the node's id in the second.
        after: tensors that they have now.
    """
    changed = [name for name in before if before[name].weight is not None and _differs(before[name], after[name])]
    if not changed:
        return {}
    spaces, sides = _spaces(nodes, before, after)
    _solve([space for space in spaces if space.parent is None and not space.fixed])
    found = {name: (_joined(inputs), _joined(outputs)) for name, (inputs, outputs) in sides.items()}
    for name, (inputs, outputs) in list(found.items()):
        weights = before[name]
        if inputs is None or weights.weight is None:
            continue
        columns = weights.weight.shape[0] if weights.transposed else weights.weight.shape[1] * weights.groups
        inputs = _each(inputs, columns // len(inputs))
        in_group = len(inputs) // weights.groups
        stays = torch.equal(inputs // in_group, torch.arange(len(inputs)) // in_group)
        found[name] = (inputs if stays or in_group == 1 else None, outputs)
    return {name: order for name, order in found.items() if order[0] is not None or order[1] is not None}


def _differs(before: Weights, after: Weights) -> bool:
    old, new = before.weight, after.weight
    return old is not None and new is not None and old.shape == new.shape and not torch.equal(old, new)


def _spaces(
    nodes: Sequence[GraphNode], before: Mapping[str, Weights], after: Mapping[str, Weights]
) -> tuple[list[_Space], dict[str, tuple[Parts | None, Parts | None]]]:
    """All spaces with what is known of them, and the spaces of each node's input and output."""
    spaces: list[_Space] = []
    parts: dict[str, Parts | None] = {}  # of each node's value; None: the order is the same in both models
    sides: dict[str, tuple[Parts | None, Parts | None]] = {}

    def new_space(size: int) -> _Space:
        spaces.append(_Space(size))
        return spaces[-1]

    for node in nodes:
        sources = [parts.get(name) for name in node.inputs]
        old, new = before.get(node.id), after[node.id]
        if node.op in ("input", "output"):
            for some in sources:
                _fix(some)
            parts[node.id] = None
        elif new.weight is not None:
            channels = new.weight.shape[0] if new.transposed else new.weight.shape[1] * new.groups
            if node.inputs and sources[0] == ():  # nobody knows yet in which order this value's channels stand
                parts[node.inputs[0]] = sources[0] = (new_space(channels),)
            source = sources[0] if sources else None
            if source is not None and channels % _size(source):
                source = None
            if old is None or old.weight is None or old.weight.shape != new.weight.shape:
                parts[node.id] = ()
            elif source is not None and new.groups == channels == _size(source) == len(new.weight):  # depthwise
                parts[node.id] = source
                sides[node.id] = source, source
                _add_vectors(source, old, new)
                _add_term(source, old.weight, new.weight, None)
            else:
                own = (new_space(new.weight.shape[1] * new.groups if new.transposed else new.weight.shape[0]),)
                parts[node.id] = own
                sides[node.id] = source, own
                _add_vectors(own, old, new)
                if new.groups == 1:
                    _add_matrix(source, own, old, new)
        elif node.op in _BREAKS or any(tensor.dim() > 1 for tensor in new.others.values()):
            parts[node.id] = ()
        elif node.op in _CONCAT:
            axis = next((node.arguments[name] for name in ("dim", "axis", "argument 1") if name in node.arguments), "0")
            known = [some for some in sources if some]
            parts[node.id] = sum(known, ()) if axis == "1" and len(known) == len(sources) else ()
        else:
            parts[node.id] = joined = _tied(sources)
            if joined and old is not None and new.others:
                _add_vectors(joined, old, new)
                sides[node.id] = None, joined
    return spaces, sides


def _tied(sources: Sequence[Parts | None]) -> Parts | None:
    """The channels of a value that is computed channel by channel from several: those in one order, where sizes agree."""
    if not sources or all(some is None for some in sources):
        return None
    known = sorted((some for some in sources if some), key=len)
    for other in known[1:]:
        if [space.size for space in other] == [space.size for space in known[0]]:
            for one, two in zip(known[0], other, strict=True):
                _unite(one.root, two.root)
    if any(some is None for some in sources) and known:
        _fix(known[0])
    return known[0] if known else ()


def _unite(one: _Space, two: _Space) -> None:
    if one is not two:
        two.parent = one
        one.terms += two.terms
        if two.fixed:
            _fix((one,))


def _fix(parts: Parts | None) -> None:
    for space in parts or ():
        space.root.fixed = True
        space.root.order = torch.arange(space.size)


def _size(parts: Parts) -> int:
    return sum(space.size for space in parts)


def _add_matrix(source: Parts | None, own: Parts, before: Weights, after: Weights) -> None:
    """Give the rows of a layer's weight to its output's channels, and the columns to its input's."""
    assert before.weight is not None
    assert after.weight is not None
    old, new = (w.transpose(0, 1) if after.transposed else w for w in (before.weight, after.weight))
    _add_term(own, old, new, source)
    if source is None:
        return
    count = old.shape[1] // _size(source)
    old, new = (w.transpose(0, 1).unflatten(0, (-1, count)).movedim(2, 1) for w in (old, new))
    _add_term(source, old, new, own)


def _add_vectors(parts: Parts, before: Weights, after: Weights) -> None:
    """Biases, and what normalisations hold for each channel."""
    for name, old in before.others.items():
        new = after.others.get(name)
        if new is not None and old.shape == new.shape == (_size(parts),):
            _add_term(parts, old[:, None], new[:, None], None)


def _add_term(parts: Parts, before: Tensor, after: Tensor, other: Parts | None) -> None:
    """Give each space its share of a tensor with all their channels along axis 0."""
    sizes = [space.size for space in parts]
    for space, old, new in zip(parts, before.split(sizes), after.split(sizes), strict=True):
        space.root.terms.append(_Term(old, new, other))


def _joined(parts: Parts | None) -> Tensor | None:
    """The order of several spaces' channels one after another, None if it is the same or not known."""
    orders: list[Tensor] = []
    start = 0
    for space in parts or ():
        order = space.root.order
        orders.append((torch.arange(space.size) if order is None else order) + start)
        start += space.size
    order = torch.cat(orders) if orders else None
    return None if order is None or torch.equal(order, torch.arange(start)) else order


def _each(order: Tensor, count: int) -> Tensor:
    """The order of columns where each channel has `count` of them, as after a flatten."""
    return (order[:, None] * count + torch.arange(count)).flatten()


def _solve(spaces: Sequence[_Space]) -> None:
    """Give every space its order, from those that write to those that read, until nothing moves any more."""
    for sweep in range(_SWEEPS):
        moved = False
        for space in spaces:
            usual = torch.arange(space.size)
            evidence = _evidence(space, guess=sweep == 0)
            if evidence is None:
                continue
            found = _best_order(*evidence, doubting=sweep > 0)
            previous = usual if space.order is None else space.order
            moved |= not torch.equal(found, previous)
            space.order = found
        if not moved:
            return


def _evidence(space: _Space, *, guess: bool) -> tuple[Tensor, Tensor] | None:
    """What is known of each channel in both models, (n, features) each, every number with the same weight; None if nothing is.

    Args:
        space: the channels.
        guess: whether orders of other spaces may be unknown: what they order is then left out, or if that is all there is,
            compared by size.
    """
    known = [t for t in space.terms if t.other is None or all(s.root.order is not None for s in t.other)]
    old, new = [], []
    for term in known if known or not guess else space.terms:
        before, after = (torch.nan_to_num(t.float(), 0.0, 0.0, 0.0) for t in (term.before, term.after))
        if term in known and term.other is not None:
            order = _joined(term.other)
            if order is not None:
                before = before.index_select(1, _each(order, before.shape[1] // len(order)))
        rows = [t.reshape(len(t), -1) for t in (before, after)]
        if term not in known:
            rows = [t.sort(dim=1).values for t in rows]
        rows = [t[:, :: math.ceil(t.shape[1] / _SAMPLE)] for t in rows]
        scale = math.sqrt(rows[0].numel()) / rows[0].norm().clamp(min=1e-30)
        old.append(rows[0] * scale)
        new.append(rows[1] * scale)
    return (torch.cat(old, dim=1), torch.cat(new, dim=1)) if old else None


def _best_order(before: Tensor, after: Tensor, *, doubting: bool) -> Tensor:
    """The order of `before` in which its rows resemble those of `after` most.

    Args:
        before: (n, features).
        after: (n, features).
        doubting: leave the order as it stands if the best one explains little more.
    """
    usual = torch.arange(len(before))
    one, two = (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30) for rows in (after, before))
    alike = (one * two).sum(dim=1)
    if float(alike.min()) > _LIKE:
        return usual
    cosines = one @ two.T
    cosines.diagonal().add_(1e-6)  # what fits equally well stays
    order = _assign(cosines)
    features, count = before.shape[1], len(before)
    if not doubting or bool(((before[order] - after).norm() <= _EQUAL * after.norm()).item()):
        return order
    # The best of n random directions in d dimensions has a cosine of about sqrt(2 ln n / d).
    least = max(_LIKE, 2 * math.sqrt(2 * math.log(max(count, 2)) / max(features, 1)))
    fit = float(cosines[usual, order].mean())
    return order if fit >= max(least, float(alike.mean()) + _GAIN) else usual


def _assign(scores: Tensor) -> Tensor:
    """For each row a column of its own: first the pairs that are each other's best, then those among what is left."""
    count = len(scores)
    scores = scores.clone()
    order = torch.full((count,), -1)
    while bool((order < 0).any()):
        rows = (order < 0).nonzero().flatten()
        best = scores[rows].argmax(dim=1)
        mutual = scores.argmax(dim=0)[best] == rows
        order[rows[mutual]] = best[mutual]
        scores[rows[mutual]] = -torch.inf
        scores[:, best[mutual]] = -torch.inf
    return order
