"""The scale of a classifier's logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxprune.layers.temperature import LARGEST, BothLogits, logit_scale


def noisy(classes: int, size: float, images: int = 200) -> tuple[Tensor, Tensor]:
    dense = 3 * torch.randn(images, classes, dtype=torch.float64)
    return dense, size * (dense + torch.randn(images, classes, dtype=torch.float64))


def divergences(dense: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """KL of each image at many scales, (scales, images), and the scales."""
    scales = torch.logspace(-2, 2, 4001, base=2, dtype=torch.float64)
    kl = torch.stack([(dense.softmax(1) * (dense.log_softmax(1) - (s * found).log_softmax(1))).sum(1) for s in scales])
    return kl, scales


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("size", [0.4, 1.0, 2.0])
def test_on_mixtures_the_best_scale_is_taken(classes: int, size: float) -> None:
    dense, found = noisy(classes, size)
    kl, scales = divergences(dense, found)
    wanted = float(scales[kl.mean(1).argmin()])
    assert logit_scale(BothLogits(dense, found, mixed=True)) == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("size", [0.4, 1.0, 2.0])
def test_on_images_the_scale_nearest_to_1_within_a_standard_error_of_the_best_is_taken(
    classes: int, size: float
) -> None:
    dense, found = noisy(classes, size)
    kl, scales = divergences(dense, found)
    more = kl - kl[kl.mean(1).argmin()]
    near = scales[more.mean(1) <= more.std(1) / 200**0.5]
    wanted = float(near[near.log().abs().argmin()])
    assert logit_scale(BothLogits(dense, found, mixed=False)) == pytest.approx(wanted, rel=4e-3)


@pytest.mark.parametrize("mixed", [True, False])
def test_what_needs_no_scale_gets_none(mixed: bool) -> None:
    dense, found = noisy(10, 0.5)
    assert logit_scale(BothLogits(dense, dense, mixed)) == 1
    assert logit_scale(BothLogits(dense[:1], found[:1], mixed)) == 1  # One image says nothing about others.
    assert logit_scale(BothLogits(dense[:0], found[:0], mixed)) == 1
    assert logit_scale(BothLogits(dense, dense / 2, mixed)) == pytest.approx(2, abs=1e-3)
    half = dense / 2
    half[::3], half[1, 0] = torch.nan, -torch.inf
    assert logit_scale(BothLogits(dense, half, mixed)) == pytest.approx(2, abs=1e-3)
    assert logit_scale(BothLogits(dense, half * torch.nan, mixed)) == 1
    assert logit_scale(BothLogits(dense, 2 * dense, mixed)) == pytest.approx(1 / 2, abs=1e-3)
    assert logit_scale(BothLogits(dense, dense / 99, mixed)) == pytest.approx(LARGEST, rel=0.01)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(("loss", "wanted"), [("cross_entropy", True), ("mse_loss", False), ("labels", False)])
def test_classifiers_are_told_from_other_heads(optimizer: type, loss: str, wanted: bool) -> None:
    x = torch.randn(500, 32)
    scores = x @ torch.randn(32, 10)
    layer = torch.nn.Linear(32, 10)
    steps = optimizer(layer.parameters(), lr=0.05 if optimizer is torch.optim.Adam else 1.0)
    for _ in range(300):
        steps.zero_grad()
        found = layer(x)
        if loss == "cross_entropy":
            torch.nn.functional.cross_entropy(found, scores.argmax(1)).backward()
        elif loss == "mse_loss":
            torch.nn.functional.mse_loss(found, scores / scores.std()).backward()
        else:
            torch.nn.functional.binary_cross_entropy_with_logits(found, (scores > 2 * scores.std()).float()).backward()
        steps.step()
    logits = layer(x[:100]).detach()
    assert BothLogits(logits, logits, mixed=True).are_logits(layer.weight) is wanted


def test_coordinates_and_single_numbers_are_no_logits() -> None:
    landmarks = torch.tensor([60.0, 60, 160, 60, 110, 110, 80, 150, 140, 150]) + 5 * torch.randn(200, 10)
    weight = torch.randn(10, 32)
    assert not BothLogits(landmarks, landmarks, mixed=True).are_logits(weight)
    assert not BothLogits(landmarks[:, :1], landmarks[:, :1], mixed=True).are_logits(weight[:1])
    assert not BothLogits(landmarks[:0], landmarks[:0], mixed=True).are_logits(weight)
