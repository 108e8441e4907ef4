"""Which patches a layer's statistics are taken from, and that all that is gathered for a layer comes from the same ones."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune import Options
from fxprune.calibration import sampling
from fxprune.calibration.sampling import BatchPlace, PatchSample, images_taken, sample_patches, taken_before
from fxprune.calibration.stream import CalibrationStream
from fxprune.geometry import LayerGeometry
from fxprune.graph import module_of
from fxprune.passes import InsertObservers, solve_layers
from fxprune.recipe import Recipe
from fxprune.statistics import HessianObserver
from fxprune.tracing import trace
from tests.pipelines import calibration

GEOMETRY = LayerGeometry.of(nn.Conv2d(4, 8, 3, padding=1))  # 36 columns


@pytest.fixture(autouse=True)
def few_images_suffice(monkeypatch):
    monkeypatch.setattr(sampling, "LEAST_IMAGES", 4)
    monkeypatch.setattr(sampling, "LEAST_PATCHES", 0)


def at(number: int, size: int) -> BatchPlace:
    """The place of a batch among others of its size."""
    return BatchPlace(number, number * size, size)


def sample(x: Tensor, number: int = 0, images: int = 64, patches: int = 8) -> PatchSample:
    return sample_patches(GEOMETRY, x, at(number, len(x)), images=images, patches=patches)


STEPS = st.builds(lambda parts: Fraction(parts, 64), st.integers(64, 64 * 3)) | st.integers(1, 400).map(Fraction)
SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=30)
SAME_DRAWS = settings(deadline=None, derandomize=True)


@SAME_DRAWS
@given(STEPS, SIZES)
def test_the_share_is_right_and_no_number_lies_outside(step, sizes):
    total = first = 0
    for number, size in enumerate(sizes):
        taken = images_taken(size, step, first=first, turn=number)
        assert len(set(taken)) == len(taken)
        assert all(0 <= image < size for image in taken)
        assert size < step or taken
        assert size // step <= len(taken) <= -(-size // step)
        total, first = total + len(taken), first + size
    assert total == taken_before(first, step) == -(-first // step)


@SAME_DRAWS
@given(st.integers(1, 300), st.integers(1, 2000), STEPS)
def test_a_set_cut_into_batches_gives_what_the_whole_gives(size, images, step):
    """With the last batch a short one."""
    cut = [
        start + image
        for start in range(0, images, size)
        for image in images_taken(min(size, images - start), step, first=start)
    ]
    assert cut == list(images_taken(images, step)) == [int(k * step) for k in range(len(cut))]
    assert len(cut) == -(-images // step)


@SAME_DRAWS
@given(STEPS, st.integers(1, 40), SIZES)
def test_what_is_taken_of_those_taken_is_what_would_be_taken_of_all(kept, times, sizes):
    first = first_kept = 0
    for number, size in enumerate(sizes):
        all_of_batch = images_taken(size, kept, first=first, turn=number)
        then = images_taken(len(all_of_batch), Fraction(times), first=first_kept)
        assert [all_of_batch[i] for i in then] == [*images_taken(size, times * kept, first=first, turn=number)]
        first, first_kept = first + size, first_kept + len(all_of_batch)


@settings(SAME_DRAWS, max_examples=60)
@given(
    st.integers(1, 300),
    st.integers(1, 2000),
    st.floats(0.01, 400),
    st.sampled_from([(4, 6, 6), (4, 24, 6), (4, 8, 3)]),
    st.sampled_from([1.0, 0.25, 0.125, 1 / 3]),
)
def test_samples_of_any_set_hold_the_patches_asked_for(size, images, patches_per_column, shape, share):
    patches = max(1, int(patches_per_column))
    taken, seen = 0, torch.zeros(shape[1])
    for number, start in enumerate(range(0, images, size)):
        of_batch = min(size, images - start)
        x = torch.arange(float(shape[1])).reshape(1, 1, -1, 1).expand(of_batch, 4, *shape[1:])
        place = BatchPlace(number, start, of_batch)
        chosen = sample_patches(GEOMETRY, x, place, images=images, patches=patches, share=share)
        output = chosen.output(x)
        assert chosen.geometry.apply(chosen.input(x), torch.ones(1, 4, 3, 3), None).shape[2:] == output.shape[2:]
        assert len(chosen.input(x)) == len(output) == len(chosen.taken)
        assert of_batch < chosen.step or len(output)
        taken += output[:, 0].numel()
        seen += torch.bincount(output[:, 0, :, 0].flatten().long(), minlength=shape[1])
    assert taken >= min(share * patches * GEOMETRY.columns, images * shape[1] * shape[2]) * (1 - 1e-9)
    assert seen.max() - seen.min() <= 1  # All rows in turn.


def test_images_are_left_out_evenly_where_there_are_more_patches_than_asked_for():
    x = torch.randn(16, 4, 6, 6)  # 64 images of 36 patches; 8 * 36 of these are asked for.
    assert sample(x).step == 8
    assert [len(sample(x, number).output(x)) for number in range(4)] == [2] * 4
    assert torch.equal(sample(x, number=3).input(x), x[3::8])
    assert torch.equal(sample(x, number=11).input(x), x[3::8])


@pytest.mark.parametrize(("images", "patches"), [(64, 0), (64, 64), (64, 100), (3, 1), (4, 1)])
def test_all_images_where_they_are_wanted_or_few(images, patches):
    x = torch.randn(3, 4, 6, 6)
    chosen = sample(x, images=images, patches=patches)
    assert chosen.step == 1
    assert chosen.input(x) is x


def test_steps_need_not_be_whole():
    x = torch.randn(10, 4, 6, 6)  # 40 images of 36 patches; two thirds of these are asked for.
    chosen = sample(x, images=40, patches=36 * 40 // 36 * 2 // 3)
    assert 1.5 <= chosen.step < 1.6
    assert torch.equal(chosen.input(x), x[[0, 1, 3, 4, 6, 7, 9]])
    last = x.contiguous(memory_format=torch.channels_last)
    assert chosen.input(last).is_contiguous(memory_format=torch.channels_last)
    counts = [len(sample(x, number, images=40, patches=26).input(x)) for number in range(30)]
    assert set(counts) == {6, 7}


def test_what_lies_at_one_distance_is_not_copied():
    x = torch.randn(16, 4, 6, 6)
    assert sample(x, number=1).input(x)._base is x
    assert sample(x, number=1).input(x).data_ptr() == x[1].data_ptr()


def test_so_many_images_are_always_taken(monkeypatch):
    monkeypatch.setattr(sampling, "LEAST_IMAGES", 32)
    assert sample(torch.randn(16, 4, 6, 6)).step == 2


def test_small_batches_give_an_image_where_their_turn_comes():
    counts = [len(sample(torch.randn(2, 4, 6, 6), number).output(torch.randn(2, 8, 6, 6))) for number in range(32)]
    assert counts == [1, 0, 0, 0] * 8


def test_the_first_dimension_may_be_several_for_each_image_or_none():
    """Windows or crops of images, and sequences whose first dimension is time."""
    geometry, counts = LayerGeometry.of(nn.Linear(4, 2)), []
    for shape in ((64, 4), (5, 16, 4)):  # Four windows of an image; five steps in time of sixteen images.
        x = torch.randn(shape)
        seen = [sample_patches(geometry, x, at(n, 16), images=64, patches=16).output(x) for n in range(4)]
        counts.append(sum(y[..., 0].numel() for y in seen))
    assert counts == [64, 64]


def test_linear_layers_count_vectors():
    geometry, x = LayerGeometry.of(nn.Linear(4, 2)), torch.randn(16, 10, 4)
    chosen = sample_patches(geometry, x, at(1, 16), images=64, patches=80)
    assert torch.equal(chosen.input(x), x[1::2])


def test_an_image_without_a_batch_dimension_is_taken_whole():
    x = torch.randn(4, 6, 6)
    assert sample(x).input(x) is x


def test_what_is_not_one_value_for_each_image_is_left_whole():
    chosen = PatchSample(GEOMETRY, images=8, dims=4, step=Fraction(2), first=1)
    for value in (torch.randn(8, 1, 1), torch.randn(1, 8, 1, 1), torch.tensor(3.0), torch.randn(8)):
        assert chosen.output(value) is value
    assert len(chosen.output(torch.randn(8, 2, 1, 1))) == 4


LAYERS = {
    "3x3": nn.Conv2d(4, 8, 3, padding=1),
    "3x3, stride 2": nn.Conv2d(4, 8, 3, padding=1, stride=2),
    "3x5, dilation": nn.Conv2d(4, 8, (3, 5), padding=(2, 3), dilation=(2, 1)),
    "1x1": nn.Conv2d(4, 8, 1),
    "1x1, stride 2": nn.Conv2d(4, 8, 1, stride=2),
    "4x4, same": nn.Conv2d(4, 8, 4, padding="same"),
    "much padding": nn.Conv2d(4, 8, 3, padding=5),
    "depthwise": nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "1-D": nn.Conv1d(4, 8, 5, padding=2, stride=3),
    "3-D": nn.Conv3d(4, 8, 3, padding=1),
}


@pytest.mark.parametrize("patches", [1, 2, 5])
@pytest.mark.parametrize("name", LAYERS)
def test_on_a_band_of_its_input_the_layer_gives_a_band_of_its_output(name, patches):
    torch.manual_seed(0)
    layer = LAYERS[name].double()
    geometry = LayerGeometry.of(layer)
    x = torch.randn(12, 4, *(24, 9, 3)[: len(geometry.kernel_size)], dtype=torch.float64)
    output = layer(x).detach()
    for number in range(3):
        chosen = sample_patches(geometry, x, at(number, 12), images=36, patches=patches)
        if patches == 1 and name not in ("3-D", "1-D"):
            assert chosen.bands > 1
        banded = chosen.geometry.apply(chosen.input(x), layer.weight.detach(), layer.bias.detach())
        torch.testing.assert_close(banded, chosen.output(output), rtol=0, atol=1e-12)


def test_bands_take_all_rows_in_turn():
    x = torch.randn(16, 4, 24, 6)
    rows = torch.arange(24.0).reshape(1, 1, 24, 1).expand(16, 8, 24, 6)
    seen = torch.zeros(24)
    for number in range(6):
        chosen = sample(x, number, images=96, patches=16)  # A twenty-fourth of all patches.
        assert (chosen.bands, chosen.step) == (6, 4)
        found = chosen.output(rows)[:, 0, :, 0]
        assert found.shape == (4, 4)
        assert torch.equal(found[:, 0] % 4, torch.zeros(4))
        seen += torch.bincount(found.flatten().long(), minlength=24)
    assert (seen == 4).all()


def test_rows_are_left_out_before_images():
    x = torch.randn(16, 4, 24, 6)
    assert (sample(x, images=16, patches=16).bands, sample(x, images=16, patches=16).step) == (4, 1)


def test_padding_that_is_not_zeros_is_left_to_whole_images():
    geometry = LayerGeometry.of(nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"))
    chosen = sample_patches(geometry, torch.randn(16, 4, 24, 6), at(0, 16), images=96, patches=16)
    assert (chosen.bands, chosen.step) == (1, 24)


def test_what_has_one_row_for_each_image_keeps_it():
    chosen = sample(torch.randn(16, 4, 24, 6), images=96, patches=16)
    assert chosen.output(torch.randn(16, 8, 1, 1)).shape == (4, 8, 1, 1)


@pytest.mark.parametrize("name", ["3x3", "3x3, stride 2", "3x5, dilation", "depthwise"])
def test_observers_take_the_patches_of_the_bands(name):
    torch.manual_seed(0)
    geometry = LayerGeometry.of(LAYERS[name])
    x = torch.randn(8, 4, 24, 9, dtype=torch.float64)
    chosen = sample_patches(geometry, x, at(2, 8), images=64, patches=2)
    assert chosen.bands > 1
    observer = HessianObserver(geometry)
    observer.observe(x, geometry)
    observer.observe(chosen.input(x), chosen.geometry)
    rows = chosen.output(torch.arange(float(chosen.rows))[None, None, :, None].expand(8, 1, -1, 1))[:, 0, :, 0].long()
    patches = geometry.patches(x).unflatten(1, (8, chosen.rows, -1))
    images = torch.tensor(chosen.taken)
    banded = patches[:, images[:, None], rows].flatten(1, 3)
    whole = patches.flatten(1, 3)
    assert observer.statistics().count == whole.shape[1] + banded.shape[1]
    torch.testing.assert_close(observer.statistics().gram, whole.mT @ whole + banded.mT @ banded)
    torch.testing.assert_close(observer.statistics().total, whole.sum(1) + banded.sum(1))


def test_channels_stay_last():
    x = torch.randn(16, 4, 24, 6).contiguous(memory_format=torch.channels_last)
    assert sample(x, images=96, patches=16).input(x).is_contiguous(memory_format=torch.channels_last)


def test_observers_see_the_sample_of_every_batch():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    batches = list(torch.randn(40, 4, 6, 6).split(16))
    graph_module = trace(model)
    InsertObservers(Recipe.parse("2:4"))(graph_module)
    stream = CalibrationStream(graph_module, calibration(batches), patches=8)
    stream.advance(list(graph_module.graph.nodes)[-1])
    first = next(m for n in graph_module.graph.nodes if isinstance(m := module_of(n), HessianObserver))
    chosen = torch.cat([x[taken] for x, taken in zip(batches, ([0, 5, 10, 15], [5, 10, 15], [5]), strict=True)])
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


@pytest.mark.parametrize("target", ["dense", "skip", "relu6_aware", "relu_aware"])
def test_inputs_and_wanted_outputs_come_from_the_same_images(target, monkeypatch):
    monkeypatch.setattr(solve_layers, "unaffected", lambda graph_module, roles, calls: [])
    torch.manual_seed(0)
    model, images = Blocks(channels=6).eval(), torch.randn(60, 3, 6, 6).split(6)
    # Every layer is fitted whole, and its dense weights are the answer.
    options = Options(patches=4, target=target, damping=1e-9, holdout=0.0)
    fitted = fxprune.compile(model, images, "dense", progress=False, options=options)
    assert [fitted.report[name].status for name in ("stem", "a", "b")] == ["reconstructed"] * 3
    for name in ("stem", "a", "b"):
        torch.testing.assert_close(
            fitted.get_submodule(name).weight, model.get_submodule(name).weight, rtol=0, atol=1e-3
        )


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_reported_error_is_of_a_share_of_the_patches(name):
    torch.manual_seed(0)
    model, images = Blocks(channels=8).eval(), torch.randn(64, 3, 24, 6).split(8)
    pruned = fxprune.compile(
        model, images, "2:4", progress=False, options=Options(patches=4, permute=False, holdout=0.0)
    )
    # Every fifth image is kept, and of these a layer's error takes every third.
    kept = [x[list(images_taken(8, Fraction(5), first=8 * n, turn=n))] for n, x in enumerate(images)]
    places = [BatchPlace(n, sum(map(len, kept[:n])), len(x)) for n, x in enumerate(kept)]
    assert pruned.report.images == sum(map(len, kept)) == 13
    seen: dict[nn.Module, list[Tensor]] = {}
    for of in (model, pruned):
        layer = of.get_submodule(name)
        layer.register_forward_hook(lambda layer, x, y: seen.setdefault(layer, []).extend([x[0], y.detach()]))
        for x in kept:
            of(x)
    inputs, outputs = (seen[pruned.get_submodule(name)][i::2] for i in (0, 1))
    geometry = LayerGeometry.of(model.get_submodule(name))
    chosen = [
        sample_patches(geometry, x, place, images=13, patches=1, kept=Fraction(5))  # A quarter.
        for x, place in zip(inputs, places, strict=True)
    ]
    assert chosen[0].step == 3
    assert chosen[0].bands > 1
    wanted, found = (
        torch.cat([of.output(y) for of, y in zip(chosen, ys, strict=True)]).movedim(1, 0).flatten(1).double()
        for ys in (seen[model.get_submodule(name)][1::2], outputs)
    )
    error = (wanted - found).square().sum() / (wanted - wanted.mean(1, keepdim=True)).square().sum()
    assert pruned.report[name].relative_error == pytest.approx(float(error), rel=1e-4)


def test_a_layer_of_few_columns_keeps_patches_enough(monkeypatch):
    x = torch.randn(16, 4, 6, 6)  # 64 images of 36 patches; 8 * 36 of these are asked for.
    monkeypatch.setattr(sampling, "LEAST_PATCHES", 16 * 36)
    assert sample(x).step == 4
    assert sample_patches(GEOMETRY, x, at(0, 16), images=64, patches=8, share=0.5).step == 8
    assert sample_patches(GEOMETRY, x, at(0, 16), images=64, patches=32).step == 2  # Enough as it is.
    assert sample_patches(GEOMETRY, x, at(0, 16), images=64, patches=8, least=4).step == 8


def test_so_many_images_may_be_asked_for_in_a_small_set():
    x = torch.randn(16, 4, 6, 6)
    assert sample_patches(GEOMETRY, x, at(0, 16), images=64, patches=8, least=65).step == 1
    assert sample_patches(GEOMETRY, x, at(0, 16), images=64, patches=1, least=32).step == 2


def test_an_interrupted_run_takes_the_same_images(tmp_path):
    torch.manual_seed(0)
    model, images = Blocks(channels=8).eval(), torch.randn(64, 3, 6, 6).split(8)
    kinds = {"progress": False, "options": Options(patches=4), "checkpoint_dir": str(tmp_path)}
    whole = fxprune.compile(model, images, "2:4", **kinds)
    (tmp_path / "b.layer.pt").unlink()
    resumed = fxprune.compile(model, images, "2:4", **kinds)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
