"""Which channels share a group of M: a search for the order of channels in which N:M loses least.

Every weight has a score, what it costs to lose it. In each row, N:M loses the M - N smallest scores of every group of M
consecutive columns. With channel j in slot i, the group of slot i loses, in row p,

    S_ip + min(score_pj, t_ip)

where t_ip is the (M - N)-th smallest of the group's other M - 1 scores and S_ip the sum of those below it. Since
2 min(a, b) = a + b - |a - b|, the loss with every channel in every slot is one table of L1 distances, and an exchange of
two channels changes the loss by the sum of two of its entries. Exchanges are made, the best of each slot first, until
none lowers the loss: the greedy search of Pool & Yu 2021, Channel Permutations for N:M Sparsity, which bounds the same
problem by trying exchanges one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.pattern import NMPattern
from fxprune.runtime.processes import shared

STARTS = 4
TOLERANCE = 1e-9
MAX_TABLE_WORK = 2 * 10**9
MAX_SEARCH_WORK = 2 * 10**8
CHUNK_NUMBERS = 2**23


@dataclass(frozen=True)
class View:
    """How one layer reads the channels that may be exchanged.

    Attributes:
        scores: (P, C) what each weight costs to lose, at least 0; the columns in the layer's present order, C a
            multiple of M.
        slots: (n,) the column that holds each of the n channels at present. Other columns stay where they are.
    """

    scores: Tensor
    slots: Tensor


@dataclass(frozen=True)
class Permutation:
    """Slot i is to hold channel `order[i]`, (n,) int64; what all views lose before and after, in the groups concerned."""

    order: Tensor
    before: float
    after: float


def lost(scores: Tensor, pattern: NMPattern) -> Tensor:
    """What N:M loses in each row and group: the sum of the M - N smallest scores, (P, C) -> (P, C / M)."""
    groups = scores.unflatten(-1, (-1, pattern.m))
    smallest: Tensor = groups.topk(pattern.m - pattern.n, dim=-1, largest=False, sorted=False).values
    return smallest.sum(-1)


def permute(views: Sequence[View], pattern: NMPattern, *, seed: int = 0) -> Permutation:
    """Search for the order of n channels in which all views together lose least; never worse than the present order.

    The search starts from the present order, from one that deals the channels out to the groups by their total score,
    and from random ones; the best end wins. Starts depend on the channels' scores alone, not on their present order.

    Two bounds keep it short. There are fewer starts than STARTS where n * n * P is over MAX_SEARCH_WORK / STARTS, and
    where it is over MAX_TABLE_WORK, the search looks only at the rows that lose most; its result is judged on all rows.
    One descent takes about six tables, at some 5e8 / s on one core.

    Args:
        views: all layers that read the channels, with the same n.
        pattern: N:M.
        seed: of the random starts.
    """
    views = list(_merged(views, pattern))
    n = len(views[0].slots)
    present = torch.arange(n, device=views[0].slots.device)
    before = _loss(views, pattern, present)
    work = n * n * sum(len(view.scores) for view in views)
    sample = views if work <= MAX_TABLE_WORK else list(_heaviest(views, pattern, MAX_TABLE_WORK / work))
    count = max(1, min(STARTS, MAX_SEARCH_WORK // max(1, work)))
    best = Permutation(present, before, before)

    def end_of(start: Tensor) -> tuple[list[int], float]:
        order = descend(sample, pattern, start)
        return order.tolist(), _loss(views, pattern, order)

    for order, after in shared(end_of, list(_starts(views, pattern, count, seed))):
        if after < best.after - TOLERANCE * before:
            best = Permutation(torch.tensor(order, device=present.device), before, after)
    return best


def descend(views: Sequence[View], pattern: NMPattern, order: Tensor) -> Tensor:
    """Exchange channels until no exchange of two lowers the loss; (n,) -> (n,)."""
    table = ExchangeTable(views, pattern, order)
    least = TOLERANCE * _loss(views, pattern, order)
    while len(pairs := table.best_pairs(least)):
        table.exchange(pairs)
    return table.order


class ExchangeTable:
    """What every exchange of two channels would change, kept up to date while exchanges are made.

    Args:
        views: all layers that read the n channels.
        pattern: N:M.
        order: (n,) the channel in each slot to begin with.
    """

    def __init__(self, views: Sequence[View], pattern: NMPattern, order: Tensor) -> None:
        self.order = order.clone()
        self._pattern = pattern
        self._views = views
        self._groups = [view.slots // pattern.m for view in views]
        self._channels = [view.scores[:, view.slots] for view in views]
        self._current = [_ordered(view, order) for view in views]
        self._tables = [view.scores.new_empty(len(order), len(order)) for view in views]
        for v in range(len(views)):
            self._update(v, torch.arange(len(order), device=order.device))

    def changes(self) -> Tensor:
        """By how much the loss changes if the channels of slots i and j are exchanged, (n, n)."""
        total = torch.zeros_like(self._tables[0])
        for table, groups in zip(self._tables, self._groups, strict=True):
            by_slot = table[:, self.order]
            total += (by_slot + by_slot.T) * (groups[:, None] != groups)
        return total

    def best_pairs(self, least: float) -> Tensor:
        """Slots to exchange, (pairs, 2): each lowers the loss by more than `least`, no two in one group."""
        best, partner = self.changes().min(1)
        candidates = (best < -least).nonzero()[:, 0]
        candidates = candidates[best[candidates].argsort(stable=True)]
        groups = torch.stack(self._groups, 1).tolist()
        taken: set[tuple[int, int]] = set()
        pairs = []
        for i, j in zip(candidates.tolist(), partner[candidates].tolist(), strict=True):
            touched = {*enumerate(groups[i]), *enumerate(groups[j])}
            if taken.isdisjoint(touched):
                taken |= touched
                pairs.append((i, j))
        return torch.tensor(pairs, dtype=torch.int64, device=self.order.device)

    def exchange(self, pairs: Tensor) -> None:
        """Exchange the channels of pairs of slots, (pairs, 2)."""
        slots, others = pairs.flatten(), pairs.flip(1).flatten()
        self.order[slots] = self.order[others]
        for v, view in enumerate(self._views):
            self._current[v][:, view.slots[slots]] = self._channels[v][:, self.order[slots]]
            self._update(v, torch.isin(self._groups[v], self._groups[v][slots]).nonzero()[:, 0])

    def _update(self, v: int, slots: Tensor) -> None:
        """Enter the rows of some slots in one view's table."""
        M, lose = self._pattern.m, self._pattern.m - self._pattern.n
        channels = self._channels[v]
        for part in slots.split(max(1, CHUNK_NUMBERS // (M * len(channels)))):
            columns = self._views[v].slots[part]
            groups = self._current[v].unflatten(1, (-1, M))[:, columns // M]
            own = torch.arange(M, device=part.device) == (columns % M)[:, None]
            others = groups.masked_fill(own, torch.inf).topk(lose, dim=2, largest=False).values
            threshold = others[:, :, -1]
            rest = others[:, :, :-1].sum((0, 2)) - groups.topk(lose, dim=2, largest=False).values.sum((0, 2))
            distance = torch.cdist(threshold.T.contiguous(), channels.T.contiguous(), p=1)
            minima = (threshold.sum(0)[:, None] + channels.sum(0) - distance) / 2
            self._tables[v][part] = minima + rest[:, None]


def _loss(views: Sequence[View], pattern: NMPattern, order: Tensor) -> float:
    return math.fsum(float(lost(_ordered(view, order), pattern).sum()) for view in views)


def _ordered(view: View, order: Tensor) -> Tensor:
    """The view's scores with channel order[i] in slot i."""
    return view.scores.index_copy(1, view.slots, view.scores[:, view.slots[order]])


def _merged(views: Sequence[View], pattern: NMPattern) -> Iterator[View]:
    """Views reduced to the groups that hold a channel; those with the same slots become one with all their rows."""
    alike: dict[tuple[int, ...], list[Tensor]] = {}
    for view in views:
        groups, group = (view.slots // pattern.m).unique(return_inverse=True)
        scores = view.scores.unflatten(1, (-1, pattern.m))[:, groups].flatten(1)
        slots = group * pattern.m + view.slots % pattern.m
        alike.setdefault((scores.shape[1], *slots.tolist()), []).append(scores)
    for (_, *slots), scores in alike.items():
        yield View(torch.cat(scores), torch.tensor(slots, device=scores[0].device))


def _heaviest(views: Sequence[View], pattern: NMPattern, share: float) -> Iterator[View]:
    """A share of each view's rows, at least one: those that lose most."""
    for view in views:
        count = max(1, int(share * len(view.scores)))
        yield View(view.scores[lost(view.scores, pattern).sum(1).topk(count).indices], view.slots)


def _starts(views: Sequence[View], pattern: NMPattern, count: int, seed: int) -> Iterator[Tensor]:
    """Orders to start from: the present one, one with the channels dealt out by rank, and random ones."""
    generator = torch.Generator().manual_seed(seed)
    n, slots = len(views[0].slots), views[0].slots
    yield torch.arange(n, device=slots.device)
    totals = torch.stack([view.scores[:, view.slots].sum(0) for view in views]).sum(0)
    ranked = totals.argsort(descending=True, stable=True)
    dealt = (slots % pattern.m * (int(slots.max()) + 1) + slots // pattern.m).argsort()
    for i in range(1, count):
        ranks = torch.arange(n, device="cpu") if i == 1 else torch.randperm(n, generator=generator, device="cpu")
        yield torch.empty_like(ranked).index_copy_(0, dealt, ranked[ranks.to(slots.device)])
