"""`flip`: images fitted beside their mirror images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import FxPruneError, Options
from fxprune.calibration.reading import mirrored
from fxprune.calibration.stream import CalibrationStream
from fxprune.passes.insert_observers import InsertObservers
from fxprune.recipe import Recipe
from fxprune.tracing import trace
from tests.pipelines import calibration

PLAIN = Options(patches=0, holdout=0.0, shrink=False, temperature=False, permute=False)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(), nn.Linear(72, 12)
    ).eval()  # fmt: skip


def batches_of(images: int, size: int) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.randn(images, 4, 7, 8).split(size))


@pytest.mark.parametrize(("images", "size"), [(16, 16), (30, 7), (13, 5), (9, 1)])
def test_the_same_as_a_set_that_has_them_too(images: int, size: int) -> None:
    batches = batches_of(images, size)
    found = fxprune.compile(network(), batches, "2:4", options=Options(**{**vars(PLAIN), "flip": True}), progress=False)
    both = [*batches, *(x.flip(-1) for x in batches)]
    wanted = fxprune.compile(network(), both, "2:4", options=PLAIN, progress=False)
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, msg=name)
    assert (found.report.images, found.report.images_read) == (images, images)


@pytest.mark.parametrize(("images", "size"), [(16, 16), (30, 7), (13, 5)])
def test_an_image_and_its_mirror_image_check_the_same(images: int, size: int) -> None:
    """Else what is fitted to an image would be checked by its mirror image."""
    batches = batches_of(images, size)
    graph_module = trace(network())
    InsertObservers(Recipe.parse("2:4"))(graph_module)
    stream = CalibrationStream(graph_module, calibration(batches), target="dense", check=True, flip=True)
    first = next(n for n in graph_module.graph.nodes if str(n.target) == "0")
    layer = next(stream.layers([first]))
    checks = torch.cat(batches)[::4]
    patches = layer.geometry.patches(torch.cat([checks, checks.flip(-1)]).double())
    torch.testing.assert_close(layer.check.inputs.gram, patches.mT @ patches, rtol=1e-5, atol=1e-3)
    assert layer.check.inputs.count == 2 * len(checks) * 56


def test_not_where_images_are_left_out() -> None:
    """Other images show more than mirror images."""
    found = fxprune.compile(
        network()[:3], batches_of(512, 64), "2:4", options=Options(flip=True, patches=1), progress=False
    )
    plain = fxprune.compile(network()[:3], batches_of(512, 64), "2:4", options=Options(patches=1), progress=False)
    assert found.report.images == plain.report.images


def test_only_images_are_turned() -> None:
    images, flags = torch.randn(3, 2, 4, 5), torch.arange(3.0)
    turned, same, number = mirrored([images, flags, 5])
    assert torch.equal(turned, images.flip(-1))
    assert same is flags
    assert number == 5


def test_held_out_images_are_scored_as_they_are() -> None:
    batches = batches_of(80, 20)
    found = fxprune.compile(network(), batches, "2:4", options=Options(flip=True), progress=False)
    assert found.report.images_held_out == 16


def test_without_images_it_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(FxPruneError, match=r"flip mirrors images \(N, C, H, W\)"):
        fxprune.compile(model, [torch.randn(9, 8)], "2:4", progress=False, options=Options(flip=True))
