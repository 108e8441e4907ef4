"""Patterns: what can be written, which weights stay, and what counts as a violation, against loops over groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import PatternError
from fxprune.geometry import LayerGeometry
from fxprune.pattern import MixedPattern, NMPattern, Pattern, UnstructuredPattern

NM = ["1:2", "2:4", "1:4", "3:4", "4:8", "3:5"]


def group_values(weight: Tensor, m: int):
    """Every group of m consecutive input channels, for each output channel and kernel position."""
    flat = weight.reshape(weight.shape[0], weight.shape[1], -1)
    for row in flat:
        for position in range(flat.shape[2]):
            for start in range(0, flat.shape[1], m):
                yield row[start : start + m, position]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2:4", NMPattern(2, 4)),
        (" 1:4 ", NMPattern(1, 4)),
        ("7:16", NMPattern(7, 16)),
        ("0.9", UnstructuredPattern(0.9)),
        (".5", UnstructuredPattern(0.5)),
        (0.75, UnstructuredPattern(0.75)),
        ("mixed:0.6", MixedPattern(0.6)),
        (NMPattern(2, 4), NMPattern(2, 4)),
    ],
)
def test_parse(text, expected):
    assert Pattern.parse(text) == expected


@pytest.mark.parametrize("text", ["2:4", "0.9", "0.123456789", "0.1", "mixed:0.6"])
def test_text_parses_back(text):
    pattern = Pattern.parse(text)
    assert str(pattern) == text
    assert Pattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2.4",
        "2:4:8",
        "50%",
        "-0.5",
        "0",
        "1",
        "1.0",
        "nan",
        "inf",
        "x:y",
        "-1:4",
        "2 of 4",
        None,
        "mixed:",
        "mixed:0.9",
    ],
)
def test_typos_are_told_what_to_write(text):
    with pytest.raises(PatternError, match=r"cannot read the pattern .*write N:M"):
        Pattern.parse(text)


@pytest.mark.parametrize("text", ["4:2", "4:4", "0:4", "0:0"])
def test_impossible_nm(text):
    with pytest.raises(PatternError, match="0 < N < M"):
        Pattern.parse(text)


@pytest.mark.parametrize("shape", [(6, 40), (6, 40, 3), (5, 40, 3, 3), (3, 40, 1, 2, 2)])
@pytest.mark.parametrize("text", NM)
def test_nm_keeps_the_largest_along_input_channels(text, shape):
    pattern = Pattern.parse(text)
    weight = torch.randn(shape)
    projected = pattern.project(weight)
    for before, after in zip(group_values(weight, pattern.m), group_values(projected, pattern.m), strict=True):
        kept = before.abs() >= before.abs().sort(descending=True).values[pattern.n - 1]
        assert torch.equal(after, before * kept)
    assert pattern.sparsity == pytest.approx(float((projected == 0).double().mean()))


def test_groups_run_along_channels_and_not_along_pytorchs_own_order():
    """Channel 0 holds all large weights: 2:4 along channels keeps them all, along the flattened kernel it would not."""
    weight = torch.ones(1, 4, 3, 3)
    weight[:, 0] = 9
    assert (Pattern.parse("1:4").project(weight)[:, 0] == 9).all()


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.99])
def test_unstructured_keeps_the_largest_of_all(sparsity):
    weight = torch.randn(10, 20, 3, 3)
    pattern = Pattern.parse(sparsity)
    projected = pattern.project(weight)
    kept = round(1800 * (1 - sparsity))
    threshold = weight.abs().flatten().sort(descending=True).values[kept - 1]
    assert torch.equal(projected, weight * (weight.abs() >= threshold))


def test_scores_decide_in_place_of_magnitude():
    weight, scores = torch.randn(2, 4), torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1]])
    projected = Pattern.parse("2:4").project(weight, scores)
    assert torch.equal(projected != 0, scores > 2)


@pytest.mark.parametrize("shape", [(6, 40), (5, 40, 3, 3)])
@pytest.mark.parametrize("text", NM)
def test_check_counts_groups_that_hold_too_many(text, shape):
    pattern = Pattern.parse(text)
    weight = torch.randn(shape) * (torch.rand(shape) < pattern.n / pattern.m)
    groups = list(group_values(weight, pattern.m))
    expected = sum(int(torch.count_nonzero(group)) > pattern.n for group in groups)
    check = pattern.check(weight)
    assert (check.violations, check.units) == (expected, len(groups))
    assert 0 < expected
    assert not check.ok
    assert check.sparsity == pytest.approx(float((weight == 0).double().mean()))
    assert pattern.check(pattern.project(weight)).ok


@pytest.mark.parametrize("sparsity", ["0.1", "0.5", "0.9", "0.3333333"])
@pytest.mark.parametrize("numel", [10, 36, 144, 999])
def test_check_unstructured(sparsity, numel):
    pattern = Pattern.parse(sparsity)
    weight = pattern.project(torch.randn(1, numel))
    assert pattern.check(weight).ok
    weight[0, int((weight[0] == 0).nonzero()[0])] = 1
    assert not pattern.check(weight).ok


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7, 0.9, 0.95])
def test_parts_that_keep_their_share_keep_it_together(sparsity):
    pattern = UnstructuredPattern(sparsity)
    for size in range(1, 200):
        assert -1e-6 <= size * (1 - sparsity) - pattern.kept(size) < 1
        for parts in (2, 3, 4, 7):
            assert parts * pattern.kept(size) <= pattern.kept(parts * size)


def test_a_weight_that_does_not_fit():
    with pytest.raises(PatternError, match="6 input channels, not a multiple of 4"):
        Pattern.parse("2:4").check(torch.zeros(2, 6, 3, 3))
    with pytest.raises(PatternError, match="multiple of 4"):
        Pattern.parse("2:4").mask(torch.zeros(2, 6))


@pytest.mark.parametrize(
    ("text", "module", "reason"),
    [
        ("2:4", nn.Conv2d(8, 4, 3), None),
        ("2:4", nn.Linear(8, 3), None),
        ("2:4", nn.Conv2d(3, 4, 3), "3 input channels are not a multiple of 4"),
        ("2:4", nn.Conv2d(12, 12, 3, groups=2), "6 input channels per group are not a multiple of 4"),
        ("2:4", nn.Conv2d(8, 8, 3, groups=2), None),
        ("2:4", nn.Conv2d(8, 8, 3, groups=8), "depthwise"),
        ("2:4", nn.Conv2d(8, 16, 3, groups=8), "depthwise"),
        ("3:5", nn.Linear(8, 3), "8 input channels are not a multiple of 5"),
        ("0.5", nn.Conv2d(3, 4, 3), "3 input channels: few weights"),
        ("0.5", nn.Conv2d(8, 8, 3, groups=8), "depthwise"),
        ("0.5", nn.Conv2d(8, 8, 3, groups=2), None),
    ],
)
def test_decline(text, module, reason):
    found = Pattern.parse(text).decline(LayerGeometry.of(module))
    assert (found is None) if reason is None else (reason in found)


def test_the_public_name():
    assert fxprune.Pattern is Pattern


@pytest.mark.parametrize("ties", [False, True])
def test_two_of_four_are_the_two_largest(ties):
    scores = torch.randint(0, 3 if ties else 10**6, (50, 40), dtype=torch.float64)
    scores = scores if ties else scores + torch.rand(50, 40, dtype=torch.float64)
    mask = Pattern.parse("2:4").mask(scores)
    for values, kept in zip(scores.reshape(-1, 4), mask.reshape(-1, 4), strict=True):
        assert kept.sum() == 2
        assert values[kept].min() >= values[~kept].max()
