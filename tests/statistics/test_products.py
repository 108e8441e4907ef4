"""Every way to sum X X^T and Y X^T against the naive reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxprune.geometry import LayerGeometry
from fxprune.statistics import CrossStatistics, HessianObserver, patches
from fxprune.statistics import cross_correlation as cross_correlation_module
from fxprune.statistics.autocorrelation import applies, assemble, box_products
from fxprune.statistics.cross_correlation import cross_correlation
from fxprune.statistics.patches import image_sum, patch_cross, patch_gram
from fxprune.statistics.products import LARGE_PRODUCT_CHANNELS, GramAccumulator, cross_product
from tests.statistics.reference import CONVS, example, naive_patches


def gram(geometry: LayerGeometry, x: Tensor) -> Tensor:
    accumulator = GramAccumulator(geometry)
    accumulator.add(x[:1])
    accumulator.add(x[1:])
    return accumulator.total()


def autocorrelation_gram(geometry: LayerGeometry, x: Tensor) -> Tensor:
    return assemble(geometry, tuple(x.shape[2:]), [box_products(geometry, x)])


@pytest.mark.parametrize("module", CONVS, ids=repr)
def test_all_ways_equal_the_naive_reference(module):
    module, x = example(module)
    geometry = LayerGeometry.of(module)
    y = torch.randn_like(module(x))
    patches = naive_patches(module, x)
    expected = patches.mT @ patches
    expected_cross = geometry.output_matrix(y) @ patches
    torch.testing.assert_close(geometry.patches(x), patches, rtol=0, atol=0)
    for way in (gram, patch_gram, *([autocorrelation_gram] if applies(geometry) else [])):
        torch.testing.assert_close(way(geometry, x), expected, rtol=1e-12, atol=1e-10)
    for way in (cross_product, patch_cross, *([cross_correlation] if applies(geometry) else [])):
        torch.testing.assert_close(way(geometry, x, y), expected_cross, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_cross_terms_of_many_channels_are_shifted_products(padding, monkeypatch):
    """From this many channels on no weight gradient is taken, and batches of several chunks add up."""
    module, x = example(nn.Conv2d(LARGE_PRODUCT_CHANNELS, LARGE_PRODUCT_CHANNELS + 3, 3, padding=padding))
    monkeypatch.setattr(cross_correlation_module, "CHUNK_ELEMENTS", 2 * x[0].numel())
    monkeypatch.setattr(torch.ops.aten, "convolution_backward", None)
    geometry, y = LayerGeometry.of(module), torch.randn_like(module(x))
    torch.testing.assert_close(cross_product(geometry, x, y), geometry.output_matrix(y) @ naive_patches(module, x))


@pytest.mark.parametrize("blocks", [1, 2, 8])
@pytest.mark.parametrize(
    "module", [nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(4, 6, 3, groups=2), nn.Linear(47, 3)], ids=repr
)
def test_symmetric_products_in_blocks_equal_the_naive_reference(module, blocks, monkeypatch):
    monkeypatch.setattr(patches, "BLOCK_ROWS", 4)
    monkeypatch.setattr(patches, "BLOCKS", blocks)
    geometry = LayerGeometry.of(module)
    x = torch.randn(3, *((module.in_channels, 6, 7) if geometry.kernel_size else (47,)), dtype=torch.float64)
    of_each = naive_patches(module, x)
    total = patch_gram(geometry, x)
    torch.testing.assert_close(total, of_each.mT @ of_each)
    torch.testing.assert_close(patch_gram(geometry, x, total), 2 * of_each.mT @ of_each)


@pytest.mark.parametrize("module", CONVS, ids=repr)
def test_the_matrix_form_computes_the_layer(module):
    module, x = example(module)
    geometry = LayerGeometry.of(module)
    matrix = geometry.to_matrix(module.weight)
    product = torch.einsum("grd,gpd->grp", matrix, geometry.patches(x))
    if module.bias is not None:
        product = product + module.bias.reshape(geometry.groups, -1, 1)
    torch.testing.assert_close(product, geometry.output_matrix(module(x)))
    torch.testing.assert_close(geometry.to_weight(matrix), module.weight, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 1), (1, 4), (2, 7)])
@pytest.mark.parametrize(
    "module",
    [nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 5, padding=2), nn.Conv2d(4, 6, 3, padding=2, dilation=2)],
    ids=repr,
)
def test_images_smaller_than_the_kernel(module, size):
    module.double()
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    geometry = LayerGeometry.of(module)
    patches, y = naive_patches(module, x), torch.randn_like(module(x))
    torch.testing.assert_close(autocorrelation_gram(geometry, x), patches.mT @ patches)
    torch.testing.assert_close(cross_correlation(geometry, x, y), geometry.output_matrix(y) @ patches)


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5), (2, 3, 2, 5)])
def test_linear_on_any_leading_shape(shape):
    module = nn.Linear(5, 3).double()
    x = torch.randn(shape, dtype=torch.float64)
    geometry, y = LayerGeometry.of(module), torch.randn(*shape[:-1], 3, dtype=torch.float64)
    flat = x.reshape(-1, 5)
    torch.testing.assert_close(gram(geometry, x)[0], flat.mT @ flat)
    torch.testing.assert_close(cross_product(geometry, x, y)[0], y.reshape(-1, 3).mT @ flat)


@pytest.mark.parametrize("channels_last", [False, True])
def test_float32_over_many_batches_stays_within_1e_5(channels_last):
    """Positive activations with a mean, as after a ReLU: H and C accumulate without drift."""
    module = nn.Conv2d(8, 4, 3, padding=1)
    geometry, observer = LayerGeometry.of(module), HessianObserver(LayerGeometry.of(module))
    cross = CrossStatistics.empty(geometry, torch.device("cpu"))
    expected = torch.zeros(1, 72, 72, dtype=torch.float64)
    expected_cross = torch.zeros(1, 4, 72, dtype=torch.float64)
    for _ in range(50):
        x = torch.rand(8, 8, 12, 12) + 3
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        y = module(x).detach()
        assert observer(x) is x
        cross.update(geometry, x, y)
        patches = geometry.patches(x.double())
        expected += patches.mT @ patches
        expected_cross += geometry.output_matrix(y.double()) @ patches
    statistics = observer.statistics()
    count = 50 * 8 * 144
    assert statistics.count == cross.count == count
    hessian, target = statistics.hessian(centred=False), cross.target(statistics, None, centred=False)
    assert (count * hessian - expected).norm() / expected.norm() < 1e-5
    assert (count * target - expected_cross).norm() / expected_cross.norm() < 1e-5
    mean = statistics.mean[0]
    centred = expected[0] / count - mean[:, None] * mean
    assert (statistics.hessian(centred=True)[0] - centred).norm() / centred.norm() < 1e-4


def test_a_constant_input_has_no_centred_variance():
    module = nn.Conv2d(2, 2, 1)
    observer = HessianObserver(LayerGeometry.of(module))
    x = torch.randn(4, 2, 5, 5)
    x[:, 1] = 0.1
    observer(x)
    hessian = observer.statistics().hessian(centred=True)[0]
    assert hessian[0, 0] > 0.5
    assert hessian[1, 1] == 0
    assert hessian[0, 1] == 0


def test_a_paused_observer_leaves_what_it_has_not_seen_to_others():
    observer = HessianObserver(LayerGeometry.of(nn.Conv2d(2, 2, 1)))
    x = torch.randn(4, 2, 5, 5)
    with observer.paused() as unseen:
        observer(x)
        assert unseen
    observer(x)  # Waits in the pool.
    with observer.paused() as unseen:
        assert not unseen
    assert observer.statistics().count == 100
    with observer.paused() as unseen:
        assert not unseen
    observer.reset()
    observer.enabled = False
    with observer.paused() as unseen:
        assert not unseen
    assert not observer.enabled


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("module", [nn.Conv2d(4, 6, 3, padding=1), nn.Conv1d(4, 6, 3), nn.Conv3d(4, 6, 1)], ids=repr)
def test_sums_of_images_in_any_layout(module, channels_last):
    module, x = example(module)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    torch.testing.assert_close(image_sum(x), x.sum(0, keepdim=True))
