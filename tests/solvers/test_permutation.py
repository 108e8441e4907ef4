from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fxprune.pattern import NMPattern
from fxprune.solvers import permutation
from fxprune.solvers.permutation import ExchangeTable, LevelCodes, View, descend, lost, permute

PATTERNS = [NMPattern(2, 4), NMPattern(1, 4), NMPattern(3, 4), NMPattern(4, 8), NMPattern(1, 2)]


def naive_loss(scores: Tensor, pattern: NMPattern) -> float:
    total = 0.0
    for row in scores.tolist():
        for at in range(0, len(row), pattern.m):
            total += sum(sorted(row[at : at + pattern.m])[: pattern.m - pattern.n])
    return total


def reordered(view: View, order: Tensor) -> Tensor:
    scores = view.scores.clone()
    for slot, channel in enumerate(order.tolist()):
        scores[:, view.slots[slot]] = view.scores[:, view.slots[channel]]
    return scores


def random_view(rows: int, columns: int, slots: list[int] | None = None) -> View:
    scores = torch.rand(rows, columns, dtype=torch.float64) ** 3 * torch.rand(columns, dtype=torch.float64)
    return View(scores, torch.arange(columns) if slots is None else torch.tensor(slots))


def total(views: list[View], pattern: NMPattern, order: Tensor) -> float:
    return sum(naive_loss(reordered(view, order), pattern) for view in views)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_lost_is_the_sum_of_the_smallest_scores_of_each_group(pattern: NMPattern) -> None:
    scores = torch.rand(5, 4 * pattern.m, dtype=torch.float64)
    assert lost(scores, pattern).shape == (5, 4)
    assert float(lost(scores, pattern).sum()) == pytest.approx(naive_loss(scores, pattern), rel=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_what_is_lost_is_what_the_pattern_masks(pattern: NMPattern) -> None:
    scores = torch.rand(5, 4 * pattern.m, dtype=torch.float64)
    assert float(lost(scores, pattern).sum()) == pytest.approx(float(scores[~pattern.mask(scores)].sum()), rel=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_table_gives_the_change_of_every_exchange(pattern: NMPattern) -> None:
    n = 2 * pattern.m
    apart = [*range(1, n, 2), *range(n, n + pattern.m)]  # slots that share groups with other columns
    views = [random_view(3, n), random_view(2, 2 * n, torch.randperm(2 * n)[:n].tolist())]
    views.append(random_view(4, n + pattern.m, (apart + [0] * n)[:n] if len(apart) >= n else list(range(1, n + 1))))
    order = torch.randperm(n)
    changes = ExchangeTable(views, pattern, order).changes()
    before = total(views, pattern, order)
    for i, j in itertools.product(range(n), repeat=2):
        exchanged = order.clone()
        exchanged[[i, j]] = order[[j, i]]
        wanted = total(views, pattern, exchanged) - before
        assert float(changes[i, j]) == pytest.approx(wanted, abs=1e-12), (i, j)


def test_table_stays_up_to_date_while_exchanges_are_made() -> None:
    pattern = NMPattern(2, 4)
    views = [random_view(7, 16), random_view(3, 24, torch.randperm(24)[:16].tolist())]
    table = ExchangeTable(views, pattern, torch.randperm(16))
    for pairs in ([[0, 9]], [[3, 12], [5, 8]]):
        table.exchange(torch.tensor(pairs))
        torch.testing.assert_close(
            table.changes(), ExchangeTable(views, pattern, table.order).changes(), rtol=1e-12, atol=1e-12
        )


def test_the_table_is_the_same_computed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    views, order = [random_view(7, 16)], torch.randperm(16)
    whole = ExchangeTable(views, NMPattern(2, 4), order).changes()
    monkeypatch.setattr(permutation, "CHUNK_NUMBERS", 70)
    torch.testing.assert_close(ExchangeTable(views, NMPattern(2, 4), order).changes(), whole)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_no_exchange_is_left_that_lowers_the_loss(pattern: NMPattern) -> None:
    n = 3 * pattern.m
    views = [random_view(9, n), random_view(5, 2 * n, torch.randperm(2 * n)[:n].tolist())]
    order = descend(views, pattern, torch.arange(n))
    assert sorted(order.tolist()) == list(range(n))
    here = total(views, pattern, order)
    assert here < total(views, pattern, torch.arange(n))
    for i, j in itertools.combinations(range(n), 2):
        exchanged = order.clone()
        exchanged[[i, j]] = order[[j, i]]
        assert total(views, pattern, exchanged) >= here * (1 - 1e-8)


def test_pairs_exchanged_at_once_share_no_group() -> None:
    pattern, views = NMPattern(2, 4), [random_view(9, 32), random_view(9, 64, torch.randperm(64)[:32].tolist())]
    pairs = ExchangeTable(views, pattern, torch.arange(32)).best_pairs(0.0)
    assert len(pairs) > 1
    for view in views:
        groups = (view.slots[pairs] // 4).tolist()
        assert all(set(a).isdisjoint(b) for a, b in itertools.combinations(groups, 2))


@pytest.mark.parametrize("seed", range(5))
def test_rounding_does_not_choose_among_equals(seed: int) -> None:
    """With few rows many exchanges and ends are equally good; sums over several processes are rounded in another way."""
    torch.manual_seed(seed)
    view = random_view(2, 24)
    orders = [
        permute([View(view.scores * (1 + rounding * torch.randn_like(view.scores)), view.slots)], NMPattern(2, 4)).order
        for rounding in (0.0, 1e-14, 1e-14, 1e-14)
    ]
    assert all(torch.equal(order, orders[0]) for order in orders)


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(1, 4)], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_eight_channels_reach_the_optimum_of_all_orders(pattern: NMPattern, seed: int) -> None:
    torch.manual_seed(seed)
    view = random_view(6, 8)
    best = math.inf
    for rest in itertools.combinations(range(1, 8), 3):
        first = [0, *rest]
        order = torch.tensor(first + [c for c in range(8) if c not in first])
        best = min(best, naive_loss(view.scores[:, order], pattern))
    found = permute([view], pattern)
    assert found.before == pytest.approx(naive_loss(view.scores, pattern), rel=1e-12)
    assert found.after == pytest.approx(naive_loss(view.scores[:, found.order], pattern), rel=1e-12)
    assert found.after == pytest.approx(best, rel=1e-9)


def test_two_views_are_weighed_together() -> None:
    """Brute force over all pairings of six channels in two layers that hold them in different columns."""
    pattern = NMPattern(1, 2)
    for seed in range(3):
        torch.manual_seed(seed)
        views = [random_view(4, 6), random_view(3, 8, [7, 0, 5, 2, 4, 3])]
        orders = [torch.tensor(order) for order in itertools.permutations(range(6))]
        losses = sorted(total(views, pattern, order) for order in orders)
        found = permute(views, pattern)
        # Only groups that hold a channel count: columns 1 and 6 share theirs with channels 1 and 0.
        assert total(views, pattern, found.order) == pytest.approx(found.after, rel=1e-12)
        assert found.after <= losses[len(losses) // 50]  # Among the best 2% of all orders.


def test_groups_without_a_channel_do_not_count() -> None:
    view = random_view(5, 16, [0, 5, 2, 7])
    found = permute([view], NMPattern(2, 4))
    assert found.before == pytest.approx(naive_loss(view.scores[:, :8], NMPattern(2, 4)), rel=1e-12)


def test_planted_groups_are_found() -> None:
    """Sixteen channels of four kinds that never matter in one row together: the right order loses nothing."""
    scores = torch.zeros(64, 16, dtype=torch.float64)
    for row in range(64):
        for kind in torch.randperm(4)[:2].tolist():
            scores[row, kind * 4 : kind * 4 + 4] = torch.rand(4, dtype=torch.float64)
    assert naive_loss(scores, NMPattern(2, 4)) > 1
    found = permute([View(scores, torch.arange(16))], NMPattern(2, 4))
    assert found.after == 0
    assert naive_loss(scores[:, found.order], NMPattern(2, 4)) == 0


def test_the_present_order_stays_where_nothing_is_better() -> None:
    found = permute([View(torch.ones(3, 16, dtype=torch.float64), torch.arange(16))], NMPattern(2, 4))
    assert found.order.tolist() == list(range(16))
    assert found.before == found.after == 3 * 4 * 2


def test_a_second_search_finds_nothing_better() -> None:
    view = random_view(40, 32)
    first = permute([view], NMPattern(2, 4), seed=3)
    second = permute([View(view.scores[:, first.order], view.slots)], NMPattern(2, 4), seed=3)
    assert second.after == pytest.approx(first.after, rel=1e-9)
    assert second.order.tolist() == list(range(32))


def test_the_same_seed_gives_the_same_order() -> None:
    view = random_view(40, 32)
    assert torch.equal(permute([view], NMPattern(1, 4), seed=5).order, permute([view], NMPattern(1, 4), seed=5).order)


def test_a_search_on_some_rows_is_judged_on_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    view, pattern = random_view(400, 16), NMPattern(2, 4)
    monkeypatch.setattr(permutation, "MAX_TABLE_WORK", 16 * 16 * 100)
    partial = permute([view], pattern)
    assert partial.before == pytest.approx(naive_loss(view.scores, pattern), rel=1e-12)
    assert partial.after == pytest.approx(naive_loss(view.scores[:, partial.order], pattern), rel=1e-12)
    monkeypatch.undo()
    assert permute([view], pattern).after <= partial.after < partial.before
    # One row says next to nothing; the result is still no worse than the present order.
    monkeypatch.setattr(permutation, "MAX_TABLE_WORK", 1)
    assert permute([view], pattern).after <= partial.before


@pytest.mark.gpu
def test_the_search_runs_on_the_device() -> None:
    view = random_view(40, 32)
    there = permute([View(view.scores.cuda(), view.slots.cuda())], NMPattern(2, 4))
    assert there.order.is_cuda
    assert there.after == pytest.approx(permute([view], NMPattern(2, 4)).after, rel=0.02)


def test_codes_give_sums_of_minima() -> None:
    own, others = random_view(40, 30).scores.float(), random_view(40, 7).scores.float()
    exact = torch.minimum(others[:, :, None], own[:, None]).sum(0)
    worst = [float(((LevelCodes(own, levels).minima(others) - exact) / exact).abs().max()) for levels in (4, 16, 64)]
    assert worst[0] < 0.5
    assert worst[1] < 0.1
    assert worst[2] < 0.01


def test_codes_of_rows_of_zeros_are_zero() -> None:
    assert not LevelCodes(torch.zeros(3, 8), 4).minima(torch.rand(3, 5)).any()


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8)], ids=str)
def test_a_search_by_codes_loses_as_little(pattern: NMPattern, monkeypatch: pytest.MonkeyPatch) -> None:
    views = [random_view(200, 64), random_view(90, 128, torch.randperm(128)[:64].tolist())]
    exact = permute(views, pattern)
    monkeypatch.setattr(permutation, "EXACT_WORK", 0)
    coded = permute(views, pattern)
    assert coded.after == pytest.approx(
        total(views, pattern, coded.order) - total(views, pattern, torch.arange(64)) + coded.before
    )
    assert coded.before - coded.after > 0.97 * (exact.before - exact.after)
