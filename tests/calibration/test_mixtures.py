"""Mixtures of two images each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

import fxprune
from fxprune import Options
from fxprune.calibration.mixtures import COUNT, Mixing
from fxprune.calibration.sampling import CHECK_EVERY, BatchPlace


def inputs(*values: Any) -> dict[Node, Any]:
    graph = Graph()
    return {graph.placeholder(f"x{i}"): value for i, value in enumerate(values)}


def of_set(images: Tensor, size: int) -> list[Tensor]:
    """The mixtures of a set in batches."""
    found, mixing, first = [], Mixing.of(len(images)), 0
    for number, batch in enumerate(images.split(size)):
        mixtures = mixing.mixtures(inputs(batch), BatchPlace(number, first, len(batch)))
        found += [] if mixtures is None else list(mixtures.values())
        first += len(batch)
    return found


@pytest.mark.parametrize("size", [2, 3, 4, 7, 16, 50, 128, 300])
@pytest.mark.parametrize("images", [2, 5, 16, 64, 70, 250, 512, 922, 5000])
def test_they_are_about_so_many_and_of_check_images(images: int, size: int) -> None:
    found = of_set(torch.arange(images)[:, None].expand(-1, 10), size)
    together = torch.cat(found) if found else torch.zeros(0, 10, dtype=torch.int64)
    first, second = together[:, 0], together[:, -1]
    assert torch.equal(together[:, :7], first[:, None].expand(-1, 7))
    assert torch.equal(together[:, 7:], second[:, None].expand(-1, 3))
    assert not (first % CHECK_EVERY).any()
    assert bool(
        (first // size == second // size).all()
    )  # Of one batch: the same, however many processes share the set.
    assert bool((first != second).all())
    assert len({*zip(first.tolist(), second.tolist(), strict=True)}) == len(first)
    assert len(together) <= 2 * COUNT
    if images >= 64 and size >= 16:
        assert len(together) >= COUNT // 2


def test_inputs_are_mixed_alike_along_their_longest_sides_and_what_holds_no_images_stays() -> None:
    x = torch.randn(8, 3, 4, 10).contiguous(memory_format=torch.channels_last)
    tall, tokens, numbers, z = torch.randn(8, 20, 5, 2), torch.randint(99, (8, 7)), torch.randn(8), torch.randn(3)
    given = inputs(x, {"tall": tall, "z": z}, tokens, numbers, "mode")
    copies = [value.clone() for value in (x, tall, tokens, numbers)]
    found = Mixing(1, 2).mixtures(given, BatchPlace(2, 9, 8))
    assert found is not None
    of_x, named, of_tokens, of_numbers, mode = found.values()
    pairs = [(3, 4), (3, 5), (7, 0), (7, 1)]  # Of the set, 12 and 16 are check images.
    for n, (i, j) in enumerate(pairs):
        assert torch.equal(of_x[n], torch.cat([x[i, :, :, :7], x[j, :, :, 7:]], 2))
        assert torch.equal(named["tall"][n], torch.cat([tall[i, :14], tall[j, 14:]]))
        assert torch.equal(of_tokens[n], torch.cat([tokens[i, :5], tokens[j, 5:]]))
        assert of_numbers[n] == numbers[i]
    assert len(of_x) == len(named["tall"]) == len(of_tokens) == len(of_numbers) == 4
    assert of_x.is_contiguous(memory_format=torch.channels_last)
    assert named["z"] is z
    assert mode == "mode"
    for value, copy in zip((x, tall, tokens, numbers), copies, strict=True):
        assert torch.equal(value, copy)


def test_nothing_is_made_of_what_cannot_be_mixed() -> None:
    assert Mixing(1, 1).mixtures(inputs(torch.randn(4), torch.randn(4, 1, 1)), BatchPlace(0, 0, 4)) is None
    assert Mixing(1, 1).mixtures(inputs(torch.randn(1, 3)), BatchPlace(0, 0, 1)) is None
    assert Mixing(1, 1).mixtures(inputs(torch.randn(2, 3)), BatchPlace(0, 1, 2)) is None  # No check image.


class Classifier(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip
        self.eval()
        with torch.no_grad():
            self[-1].weight *= 30
            self[-1].weight -= self[-1].weight.mean(0)


@pytest.mark.parametrize("size", [1, 5, 24])
def test_they_change_nothing_but_the_scale_of_the_logits(size: int) -> None:
    """Statistics, errors and scores are of images, with one loader and with batches of one image, which cannot be mixed."""
    model, images = Classifier(), torch.randn(90, 3, 12, 12)
    scaled = fxprune.compile(model, images.split(size), "1:4", progress=False)
    plain = fxprune.compile(model, images.split(size), "1:4", options=Options(temperature=False), progress=False)
    *rows, last = scaled.report.layers
    *others, _ = plain.report.layers
    for row, other in zip(rows, others, strict=True):
        assert (row.relative_error, row.damping, row.correction) == (
            other.relative_error,
            other.damping,
            other.correction,
        )
    assert (last.logit_scale != 1) == (size > 1)
    assert scaled.report.agreement == plain.report.agreement
    assert scaled.report.images_held_out == plain.report.images_held_out
    with torch.no_grad():
        torch.testing.assert_close(scaled(images), last.logit_scale * plain(images))


@pytest.mark.parametrize("seed", range(3))
def test_the_scale_is_no_worse_on_new_images_than_none(seed: int) -> None:
    """Of white noise and random weights logits come out about as large as they should; no mixture may say otherwise."""
    torch.manual_seed(seed)
    model, images, others = Classifier(), torch.randn(256, 3, 12, 12), torch.randn(2000, 3, 12, 12)

    def kl(**options: bool) -> float:
        compiled = fxprune.compile(model, images.split(50), "1:4", options=Options(**options), progress=False)
        with torch.no_grad():
            wanted, found = model(others).double().log_softmax(1), compiled(others).double().log_softmax(1)
        return float((wanted.exp() * (wanted - found)).sum(1).mean())

    assert kl() < 1.02 * kl(temperature=False)
