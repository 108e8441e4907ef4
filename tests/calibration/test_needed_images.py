"""Images that no layer needs are not run, and nothing else changes by it."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Options
from fxprune.calibration import reading, sampling
from fxprune.calibration.stream import CalibrationStream
from fxprune.graph import module_of
from fxprune.passes import InsertObservers
from fxprune.recipe import Recipe
from fxprune.statistics import HessianObserver
from fxprune.tracing import trace
from tests.pipelines import calibration


@pytest.fixture(autouse=True)
def few_images_suffice(monkeypatch):
    monkeypatch.setattr(sampling, "LEAST_IMAGES", 4)
    monkeypatch.setattr(sampling, "LEAST_PATCHES", 0)


class Net(nn.Module):
    """36 columns at 12 x 12, 72 columns at 6 x 6, and a classifier, which sees one patch of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return self.head(x.mean((2, 3)))


class OfSixteen(Net):
    """Takes batches of sixteen images and no others."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(16, 4, 12, 12))


class WithShift(Net):
    """Takes a value for each image, and one for all of them."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x * scale + shift)


def run(stream: CalibrationStream) -> None:
    """The dense model, to the output."""
    stream.advance(list(stream.graph_module.graph.nodes)[-1])


def stream_of(model: nn.Module, batches: object, *, patches: int) -> tuple[CalibrationStream, list[HessianObserver]]:
    graph_module = trace(model.eval())
    InsertObservers(Recipe.parse("2:4"))(graph_module)
    stream = CalibrationStream(graph_module, calibration(batches), patches=patches)
    return stream, [m for n in graph_module.graph.nodes if isinstance(m := module_of(n), HessianObserver)]


def batches_of(images: int = 64, size: int = 16) -> list[Tensor]:
    torch.manual_seed(0)
    return list(torch.randn(images, 4, 12, 12).split(size))


def test_as_many_as_the_layer_takes_that_needs_most():
    # b wants 8 * 72 patches, which are 16 images of 36; a wants 8 * 36, and takes 4 rows of 7.
    stream, observers = stream_of(Net(), batches_of(), patches=8)
    run(stream)
    assert (stream.source.images, stream.source.images_read) == (16, 64)
    assert [observer.statistics().count for observer in observers] == [7 * 48, 16 * 36, 16]


def test_each_layer_sees_the_images_that_it_would_have_seen(monkeypatch):
    # Of 72 images b takes every 4th, and a half of every 16th.
    batches = list(torch.randn(72, 4, 8, 8).split(24))
    stream, found = stream_of(net := Net(), batches, patches=4)
    run(stream)
    monkeypatch.setattr(reading, "image_step", lambda *args, **kwargs: Fraction(1))
    whole, wanted = stream_of(net, batches, patches=4)
    run(whole)
    assert (stream.source.images, whole.source.images) == (18, 72)
    for one, other in zip(found[:2], wanted[:2], strict=True):
        assert one.statistics().count == other.statistics().count
        torch.testing.assert_close(one.statistics().gram, other.statistics().gram)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_short_last_batch_keeps_an_image(size):
    # Every 3rd image is needed, and of batch 5 from number 2 on.
    batches = [*batches_of(images=60, size=12), torch.randn(size, 4, 12, 12)]
    stream, observers = stream_of(Net(), batches, patches=8)
    run(stream)
    assert stream.source.images == 5 * 4 + 1
    assert observers[-1].statistics().count == stream.source.images


@pytest.mark.parametrize("size", [1, 2, 3, 7, 13, 50, 64])
def test_as_many_whatever_the_size_of_a_batch(size):
    """Batches too small to give an image each are left out whole, and nobody is shown an empty one."""
    stream, observers = stream_of(Net(), batches_of(images=64, size=size), patches=8)
    run(stream)
    assert stream.source.images == 16
    assert all(slot.place.images for slot in stream.source.slots)
    assert [observer.statistics().count for observer in observers] == [7 * 48, 16 * 36, 16]
    report = fxprune.compile(
        Net(), batches_of(size=size), "2:4", progress=False, options=Options(patches=8, holdout=0.0)
    ).report
    assert all(0 < layer.relative_error < 1 for layer in report.layers)


@pytest.mark.parametrize("patches", [0, 32, 1000])
def test_all_where_they_are_wanted_or_needed(patches):
    stream, _ = stream_of(Net(), batches_of(), patches=patches)
    run(stream)
    assert stream.source.images == stream.source.images_read == 64


def test_linear_layers_alone_keep_what_each_asks_for():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
    stream, observers = stream_of(model, list(torch.randn(64, 4).split(16)), patches=2)
    run(stream)
    assert stream.source.images == 16
    assert [observer.statistics().count for observer in observers] == [8, 16]


@pytest.mark.parametrize(("columns", "images"), [(8, 16), (16, 16), (32, 32), (60, 64)])
def test_a_classifier_behind_pooling_counts_an_eighth_of_the_patches_as_enough(columns, images):
    net = Net()
    net.b, net.head = nn.Conv2d(8, columns, 3, padding=1, stride=2), nn.Linear(columns, 8)
    stream, observers = stream_of(net, batches_of(), patches=8)
    run(stream)
    assert stream.source.images == observers[-1].statistics().count == images


def test_a_model_of_one_batch_size_sees_whole_batches():
    compiled = fxprune.compile(
        OfSixteen(), batches_of(), "2:4", progress=False, options=Options(patches=8, holdout=0.0)
    )
    assert compiled.report.images == compiled.report.images_read == 64


def test_every_input_that_has_a_value_for_each_image_is_cut_alike():
    shifts, scale = torch.randn(64, 1, 1, 1).split(16), torch.tensor([2.0])
    batches = [{"x": x, "shift": s, "scale": scale} for x, s in zip(batches_of(), shifts, strict=True)]
    stream, found = stream_of(net := WithShift(), batches, patches=8)
    run(stream)
    assert stream.source.images == 16
    kept = [b | {"x": b["x"][n % 4 :: 4], "shift": b["shift"][n % 4 :: 4]} for n, b in enumerate(batches)]
    reference, wanted = stream_of(net, kept, patches=8)
    run(reference)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(one.statistics().gram, other.statistics().gram)


def test_the_report_says_so():
    report = fxprune.compile(Net(), batches_of(), "2:4", progress=False, options=Options(patches=8, holdout=0.0)).report
    assert (report.images, report.images_read) == (16, 64)
    assert "; 16 of 64 images, " in report.summary
    whole = fxprune.compile(Net(), batches_of(), "2:4", progress=False, options=Options(patches=0, holdout=0.0)).report
    assert "; 64 images, " in whole.summary


def test_macs_of_a_sample_do_not_depend_on_it():
    counts = [
        fxprune.low_rank(
            Net(), batches_of(), "ratio:0.7", progress=False, options=Options(patches=patches, holdout=0.0)
        ).report
        for patches in (8, 0)
    ]
    assert [report.images for report in counts] == [16, 64]
    assert counts[0].macs[0] == counts[1].macs[0] == 12 * 12 * 8 * 36 + 6 * 6 * 8 * 72 + 64


def test_a_resumed_run_keeps_the_same_images(tmp_path):
    kinds = {"progress": False, "options": Options(patches=8, holdout=0.0), "checkpoint_dir": str(tmp_path)}
    torch.manual_seed(1)
    net = Net()
    first = fxprune.compile(net, batches_of(), "2:4", **kinds)
    finished = sorted(tmp_path.rglob("*.pt"))
    finished[-1].unlink()
    again = fxprune.compile(net, batches_of(), "2:4", **kinds)
    assert again.report.images == 16
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
