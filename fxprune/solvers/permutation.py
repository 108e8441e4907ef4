"""Which channels share a group of M: a search for the order of channels in which N:M loses least.

Every weight has a score, what it costs to lose it. In each row, N:M loses the M - N smallest scores of every group of M
consecutive columns. With channel j in slot i, the group of slot i loses, in row p,

    S_ip + min(score_pj, t_ip)

where t_ip is the (M - N)-th smallest of the group's other M - 1 scores and S_ip the sum of those below it. Since
2 min(a, b) = a + b - |a - b|, the loss with every channel in every slot is one table of L1 distances, and an exchange of
two channels changes the loss by the sum of two of its entries. Exchanges are made, the best of each slot first, until
none lowers the loss: the greedy search of Pool & Yu 2021, Channel Permutations for N:M Sparsity, which bounds the same
problem by trying exchanges one at a time.

L1 distances are slow. The table of a large problem is one matrix product of codes (`LevelCodes`), nearly the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.pattern import NMPattern
from fxprune.runtime.processes import shared
from fxprune.solvers.shifted_systems import product_dtype

STARTS = 4
SMALL_WORK = 10**5
LARGE_STARTS = 2  # From SMALL_WORK on. With four the KL of ResNet-20 was the same, at 2:4 and at 1:4.
TOLERANCE = 1e-9
EXACT_WORK = 5 * 10**6  # Up to which a table is computed as it is defined.
COARSE, FINE = 4, 16  # Levels of a code: for the descent from each start, and for the best end's last steps.
CODED_TOLERANCE = 1e-6  # Of rounding in products of codes.
LEAST_ROUND = 1e-4  # Of the loss: a round of exchanges by codes that gains less is the last.
MAX_TABLE_WORK = 2 * 10**9
MAX_SEARCH_WORK = 2 * 10**8
MAX_CODES = 2**26  # Numbers of one table's codes.
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
    of_each = scores.unflatten(-1, (-1, pattern.m))
    return torch.stack(_smallest(of_each, pattern.m - pattern.n)).sum(0)


def _smallest(groups: Tensor, count: int) -> list[Tensor]:
    """The smallest numbers of each group in order, (..., M) -> count times (...); a top-k of each group takes longer."""
    found = list(groups.unbind(-1))
    for place in range(count):
        for i in range(len(found) - 1, place, -1):
            found[i - 1], found[i] = torch.minimum(found[i - 1], found[i]), torch.maximum(found[i - 1], found[i])
    return found[:count]


def permute(views: Sequence[View], pattern: NMPattern, *, seed: int = 0) -> Permutation:
    """Search for the order of n channels in which all views together lose least; never worse than the present order.

    The search starts from the present order, from one that deals the channels out to the groups by their total score,
    and from random ones; the best end wins. Starts depend on the channels' scores alone, not on their present order.

    Where n * n * P is over EXACT_WORK, the search goes by codes, in few levels from every start and in more from the best
    end. Three bounds keep it short. Random starts are for n * n * P up to SMALL_WORK. There is one start where it is over
    MAX_SEARCH_WORK / LARGE_STARTS. Where it is over MAX_TABLE_WORK, or the codes over MAX_CODES, the search looks only at the
    rows that lose most. Its result is judged on all rows. One descent takes about six tables, by codes at some 5e9 / s on
    one core.

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
    exact = work <= EXACT_WORK
    share = min(1.0, MAX_TABLE_WORK / max(1, work), MAX_CODES * n / max(1, FINE * work))
    sample = views if share == 1 else list(_heaviest(views, pattern, share))
    count = STARTS if work <= SMALL_WORK else max(1, min(LARGE_STARTS, MAX_SEARCH_WORK // work))

    def end_of(start: Tensor) -> tuple[list[int], float]:
        order = descend(sample, pattern, start, levels=None if exact else COARSE)
        return order.tolist(), _loss(views, pattern, order)

    ends = shared(end_of, list(_starts(views, pattern, count, seed)))
    least = min(loss for _, loss in ends)
    # Rounding, which is another one in several processes, must not decide between ends that are equally good.
    order, after = next(end for end in ends if end[1] <= least + TOLERANCE * before)
    found = torch.tensor(order, device=present.device)
    if not exact:
        finer = descend(sample, pattern, found, levels=FINE)
        if (loss := _loss(views, pattern, finer)) < after - TOLERANCE * before:
            found, after = finer, loss
    gains = after < before * (1 - TOLERANCE)
    return Permutation(found, before, after) if gains else Permutation(present, before, before)


def descend(views: Sequence[View], pattern: NMPattern, order: Tensor, *, levels: int | None = None) -> Tensor:
    """Exchange channels until no exchange of two lowers the loss, (n,) -> (n,).

    With `levels`, by codes of so many, until a round of exchanges hardly lowers it.
    """
    table = ExchangeTable(views, pattern, order, levels=levels)
    loss, order = table.loss(), table.order.clone()
    first = loss
    least = (TOLERANCE if levels is None else CODED_TOLERANCE) * first
    while len(pairs := table.best_pairs(least)):
        table.exchange(pairs)
        if levels is not None:  # What the codes leave out may be more than what a round gains.
            before, loss = loss, table.loss()
            if loss >= before:
                return order
            if before - loss < LEAST_ROUND * first:
                break
        order = table.order.clone()
    return table.order


class LevelCodes:
    """Numbers a, b >= 0 as vectors whose inner product is about min(a, b).

    With levels 0 = u_0 < u_1 < ... < u_L and the share c_l(a) in [0, 1] of step l, from u_(l-1) to u_l, that lies below a,

        min(a, b) ~ sum over l of (u_l - u_(l-1)) c_l(a) c_l(b)

    which is exact where a and b are in different steps. The levels of each row are quantiles of its numbers.

    Args:
        numbers: (P, n) b.
        levels: L.
    """

    def __init__(self, numbers: Tensor, levels: int) -> None:
        n = numbers.shape[1]
        at = torch.linspace(0, n - 1, levels + 1, device=numbers.device)[1:].round().long()
        upper = numbers.sort(1).values[:, at]
        self._lower = torch.nn.functional.pad(upper, (1, -1))
        self._steps = upper - self._lower
        self._dtype = product_dtype(numbers.device)
        self._own = self._shares(numbers, weighted=True)

    def minima(self, numbers: Tensor) -> Tensor:
        """About the sum over rows of min(a, b) for every column of (P, k) a and every one of b, (k, n) float32."""
        return (self._shares(numbers, weighted=False).mT @ self._own).float()

    def _shares(self, numbers: Tensor, *, weighted: bool) -> Tensor:
        """c_l of each number, or (u_l - u_(l-1)) c_l, (L P, k)."""
        shares = numbers.new_empty((self._steps.shape[1], *numbers.shape), dtype=self._dtype)
        for into, lower, step in zip(shares, self._lower.T, self._steps.T, strict=True):
            above = torch.minimum((numbers - lower[:, None]).clamp_(min=0), step[:, None])
            into.copy_(above if weighted else above / step.clamp_min(torch.finfo(step.dtype).tiny)[:, None])
        return shares.flatten(0, 1)


class ExchangeTable:
    """What every exchange of two channels would change, kept up to date while exchanges are made.

    Args:
        views: all layers that read the n channels.
        pattern: N:M.
        order: (n,) the channel in each slot to begin with.
        levels: of codes for the channels' scores; None: no codes, the table is exact.
    """

    def __init__(self, views: Sequence[View], pattern: NMPattern, order: Tensor, *, levels: int | None = None) -> None:
        if levels is not None:
            largest = torch.stack([view.scores.max() for view in views]).max()
            views = [View((view.scores / largest).float(), view.slots) for view in views]
        self.order = order.clone()
        self._pattern = pattern
        self._views = views
        self._groups = [view.slots // pattern.m for view in views]
        self._channels = [view.scores[:, view.slots] for view in views]
        self._codes = None if levels is None else [LevelCodes(channels, levels) for channels in self._channels]
        self._current = [_ordered(view, order) for view in views]
        self._tables = [view.scores.new_empty(len(order), len(order)) for view in views]
        for v in range(len(views)):
            self._update(v, torch.arange(len(order), device=order.device))

    def loss(self) -> float:
        """What all views lose now."""
        return math.fsum(float(lost(current, self._pattern).sum(dtype=torch.float64)) for current in self._current)

    def changes(self) -> Tensor:
        """By how much the loss changes if the channels of slots i and j are exchanged, (n, n)."""
        total = torch.zeros_like(self._tables[0])
        for table, groups in zip(self._tables, self._groups, strict=True):
            by_slot = table[:, self.order]
            total += (by_slot + by_slot.T) * (groups[:, None] != groups)
        return total

    def best_pairs(self, least: float) -> Tensor:
        """Slots to exchange, (pairs, 2): each lowers the loss by more than `least`, no two in one group."""
        changes = self.changes()
        if (
            least
        ):  # In whole units, of equals the first: rounding, which is another one in several processes, decides nothing.
            changes = (changes / least).round() * least
        best, partner = changes.min(1)
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
        for part in slots.split(max(1, CHUNK_NUMBERS // len(channels))):
            columns = self._views[v].slots[part]
            groups, of_slot = (columns // M).unique(return_inverse=True)
            # The (M - N)-th smallest of a group's others is that of the group, or the next if the own number is not above it.
            smallest = _smallest(self._current[v].unflatten(1, (-1, M))[:, groups], lose + 1)
            last, following = smallest[-2][:, of_slot], smallest[-1][:, of_slot]
            threshold = torch.where(self._current[v][:, columns] <= last, following, last)
            if self._codes is None:
                distance = torch.cdist(threshold.T.contiguous(), channels.T.contiguous(), p=1)
                minima = (threshold.sum(0)[:, None] + channels.sum(0) - distance) / 2
            else:
                minima = self._codes[v].minima(threshold)
            # Less that of the slot's own channel, S_ip cancels, and so does most of what codes leave out.
            self._tables[v][part] = minima - minima.gather(1, self.order[part][:, None])


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
