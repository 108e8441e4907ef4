"""Which images a layer's statistics are taken from, and that all that is gathered for a layer comes from the same ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Options
from fxprune.calibration import sampling
from fxprune.calibration.sampling import ImageSample, sample_images
from fxprune.calibration.stopwatch import Stopwatch
from fxprune.calibration.stream import CalibrationStream
from fxprune.geometry import LayerGeometry
from fxprune.graph import module_of
from fxprune.passes import InsertObservers
from fxprune.pattern import Pattern
from fxprune.statistics import HessianObserver
from fxprune.tracing import trace

GEOMETRY = LayerGeometry.of(nn.Conv2d(4, 8, 3, padding=1))  # 36 columns


@pytest.fixture(autouse=True)
def few_images_suffice(monkeypatch):
    monkeypatch.setattr(sampling, "LEAST_IMAGES", 4)


def sample(x: Tensor, number: int = 0, images: int = 64, patches: int = 8) -> ImageSample:
    return sample_images(GEOMETRY, x, number=number, images=images, patches=patches)


def test_images_are_left_out_evenly_where_there_are_more_patches_than_asked_for():
    x = torch.randn(16, 4, 6, 6)  # 64 images of 36 patches; 8 * 36 of these are asked for.
    assert sample(x).step == 8
    assert [len(sample(x, number)(x)) for number in range(4)] == [2] * 4
    assert torch.equal(sample(x, number=3)(x), x[3::8])
    assert sample(x, number=11).start == 3


@pytest.mark.parametrize(("images", "patches"), [(64, 0), (64, 64), (64, 100), (3, 1), (4, 1)])
def test_all_images_where_they_are_wanted_or_few(images, patches):
    x = torch.randn(3, 4, 6, 6)
    chosen = sample(x, images=images, patches=patches)
    assert chosen.step == 1
    assert chosen(x) is x


def test_steps_need_not_be_whole():
    x = torch.randn(10, 4, 6, 6)  # 40 images of 36 patches; two thirds of these are asked for.
    chosen = sample(x, images=40, patches=36 * 40 // 36 * 2 // 3)
    assert 1.5 <= chosen.step < 1.6
    assert torch.equal(chosen(x), x[[0, 1, 3, 4, 6, 7, 9]])
    last = x.contiguous(memory_format=torch.channels_last)
    assert chosen(last).is_contiguous(memory_format=torch.channels_last)
    counts = [len(sample(x, number, images=40, patches=26)(x)) for number in range(30)]
    assert set(counts) == {6, 7}


def test_so_many_images_are_always_taken(monkeypatch):
    monkeypatch.setattr(sampling, "LEAST_IMAGES", 32)
    assert sample(torch.randn(16, 4, 6, 6)).step == 2


def test_every_batch_gives_an_image_though_it_be_small():
    for number in range(5):
        x = torch.randn(2, 4, 6, 6)
        assert len(sample(x, number)(x)) == 1


def test_linear_layers_count_vectors():
    geometry, x = LayerGeometry.of(nn.Linear(4, 2)), torch.randn(16, 10, 4)
    chosen = sample_images(geometry, x, number=1, images=64, patches=80)
    assert torch.equal(chosen(x), x[1::2])


def test_an_image_without_a_batch_dimension_is_taken_whole():
    x = torch.randn(4, 6, 6)
    assert sample(x)(x) is x


def test_what_is_not_one_value_for_each_image_is_left_whole():
    chosen = ImageSample(images=8, dims=4, step=2, start=1)
    for value in (torch.randn(8, 1, 1), torch.randn(1, 8, 1, 1), torch.tensor(3.0), torch.randn(8)):
        assert chosen(value) is value
    assert len(chosen(torch.randn(8, 2, 1, 1))) == 4


def test_observers_see_the_sample_of_every_batch():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    batches = list(torch.randn(40, 4, 6, 6).split(16))
    graph_module = trace(model)
    InsertObservers(Pattern.parse("2:4"))(graph_module)
    stream = CalibrationStream(
        graph_module, batches, device=torch.device("cpu"), stopwatch=Stopwatch(torch.device("cpu")), patches=8
    )
    stream.finish()
    first = next(m for n in graph_module.graph.nodes if isinstance(m := module_of(n), HessianObserver))
    chosen = torch.cat([x[number % 5 :: 5] for number, x in enumerate(batches)])
    patches = first.geometry.patches(chosen)[0].double()
    assert first.statistics().count == len(patches)
    torch.testing.assert_close(first.statistics().gram[0], patches.T @ patches, rtol=1e-5, atol=1e-4)


class Blocks(nn.Module):
    """Residual blocks with a parameter whose first dimension is the batch's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(c, channels, 3, padding=1) for c in (3, channels, channels))
        self.shift = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return torch.relu(self.b(torch.relu(self.a(x))) + x + self.shift)


@pytest.mark.parametrize("target", ["dense", "skip", "rectified"])
def test_inputs_and_wanted_outputs_come_from_the_same_images(target):
    torch.manual_seed(0)
    model, images = Blocks(channels=6).eval(), torch.randn(60, 3, 6, 6).split(6)
    # Three and six channels hold no group of four: every layer is fitted whole, and its dense weights are the answer.
    options = Options(patches=4, target=target, damping=1e-9)
    fitted = fxprune.compile(model, images, "2:4", progress=False, options=options)
    assert [layer.status for layer in fitted.report.layers] == ["reconstructed"] * 3
    for name in ("stem", "a", "b"):
        torch.testing.assert_close(
            fitted.get_submodule(name).weight, model.get_submodule(name).weight, rtol=0, atol=1e-3
        )


def test_an_interrupted_run_takes_the_same_images(tmp_path):
    torch.manual_seed(0)
    model, images = Blocks(channels=8).eval(), torch.randn(64, 3, 6, 6).split(8)
    kinds = {"progress": False, "options": Options(patches=4, checkpoint_dir=str(tmp_path))}
    whole = fxprune.compile(model, images, "2:4", **kinds)
    (tmp_path / "b.layer.pt").unlink()
    resumed = fxprune.compile(model, images, "2:4", **kinds)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
