"""Moments of inputs whose mean is far above their deviation, against the naive reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxprune.geometry import LayerGeometry
from fxprune.statistics import CrossStatistics, HessianObserver, InputStatistics, products
from fxprune.statistics.autocorrelation import applies
from fxprune.statistics.offset import Offset
from tests.statistics.reference import CONVS, naive_patches

CPU = torch.device("cpu")
LAYERS = [
    *CONVS,
    nn.Linear(12, 5),
    nn.Conv2d(24, 8, 3, padding=1),
    nn.Conv2d(24, 8, 3, padding_mode="reflect", padding=1),
]
RIDGE = 1e-4  # Of the deviation squared: what is smaller than this need not be right.


def far_from_zero(shape: tuple[int, ...], *, channel_dim: int, ratio: float = 1000.0) -> Tensor:
    """Values of deviation about 1 and a mean of `ratio`, plus or minus a half; channels nearly follow a common one."""
    channels = shape[channel_dim]
    common, own = torch.randn(shape).narrow(channel_dim, 0, 1), 0.1 * torch.randn(shape)
    means = ratio * (0.5 + torch.rand(channels)) * torch.randn(channels).sign()
    return common + own + means.reshape(-1, *[1] * (len(shape) - 1 - channel_dim % len(shape)))


def batches_for(module: nn.Module, *, ratio: float = 1000.0) -> list[Tensor]:
    if isinstance(module, nn.Linear):
        return list(far_from_zero((3, 40, 12), channel_dim=-1, ratio=ratio).split(1))
    sizes = {1: (40,), 2: (9, 11), 3: (4, 5, 6)}[len(module.kernel_size)]
    return list(far_from_zero((6, module.in_channels, *sizes), channel_dim=1, ratio=ratio).split((1, 3, 2)))


def gathered(
    module: nn.Module, batches: list[Tensor], outputs: list[Tensor]
) -> tuple[InputStatistics, CrossStatistics]:
    geometry = LayerGeometry.of(module)
    observer, cross = HessianObserver(geometry), CrossStatistics.empty(geometry, CPU)
    for x, y in zip(batches, outputs, strict=True):
        observer(x)
        cross.update(geometry, x, y)
    return observer.statistics(), cross


def assert_covariances_agree(found: Tensor, wanted: Tensor, rtol: float = 0.01) -> None:
    """In every direction, however small its variance beside others: the eigenvalues of one relative to the other are near 1."""
    factor = torch.linalg.cholesky(wanted + RIDGE * torch.eye(wanted.shape[-1], dtype=torch.float64))
    half = torch.linalg.solve_triangular(factor, found - wanted, upper=False)
    relative = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    assert float(torch.linalg.matrix_norm(relative, 2).max()) < rtol


WAYS = [(module, way) for module in LAYERS for way in ("plain", "channels last")]
WAYS += [(module, "shifted products") for module in LAYERS if applies(LayerGeometry.of(module))]


@pytest.mark.parametrize(("module", "way"), WAYS, ids=repr)
def test_a_mean_of_a_thousand_deviations(module, way, monkeypatch):
    torch.manual_seed(0)
    if way == "shifted products":
        monkeypatch.setattr(products, "autocorrelation_pays", lambda *_: True)
        monkeypatch.setattr(products, "LARGE_PRODUCT_CHANNELS", 1)
    module, geometry = module.float(), LayerGeometry.of(module)
    batches = batches_for(module)
    if way == "channels last":
        batches = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in batches]
    shift = 3000 * torch.randn(geometry.out_channels)
    outputs = [module(x).detach() for x in batches]
    outputs = [shift.reshape(-1, *[1] * len(geometry.kernel_size)) + torch.randn_like(y) + 1e-3 * y for y in outputs]
    inputs, cross = gathered(module, batches, outputs)
    x = torch.cat([naive_patches(module, x.double()) for x in batches], 1)
    y = torch.cat([geometry.output_matrix(y.double()) for y in outputs], 2)
    count, mean = x.shape[1], x.mean(1)
    assert inputs.count == cross.count == count
    torch.testing.assert_close(inputs.mean, mean, rtol=1e-7, atol=1e-4)
    torch.testing.assert_close(cross.mean, y.mean(2), rtol=1e-7, atol=1e-4)
    centred = x - mean[:, None]
    covariance = centred.mT @ centred / count
    assert_covariances_agree(inputs.hessian(centred=True), covariance)
    torch.testing.assert_close(inputs.variance, covariance.diagonal(dim1=1, dim2=2), rtol=1e-4, atol=0)
    assert not inputs.constant.any()
    assert not inputs.dead.any()
    torch.testing.assert_close(inputs.hessian(centred=False), x.mT @ x / count, rtol=1e-6, atol=1e-3)
    target = (y - y.mean(2, keepdim=True)) @ centred / count
    deviations = covariance.diagonal(dim1=1, dim2=2).sqrt()[:, None] * y.std(2)[:, :, None]
    assert float(((cross.target(inputs, None, centred=True) - target) / deviations).abs().max()) < 1e-3
    bias = torch.randn(geometry.out_channels)
    raw = (y - bias.double().reshape(geometry.groups, -1, 1)) @ x / count
    torch.testing.assert_close(cross.target(inputs, bias, centred=False), raw, rtol=1e-6, atol=1)


@pytest.mark.parametrize("ratio", [0.0, 3.0, 10.0, 30.0, 100.0, 1e4])
@pytest.mark.parametrize("module", [nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3), nn.Linear(12, 5)], ids=repr)
def test_any_mean(module, ratio):
    """Also where it is just small enough for nothing to be taken away."""
    torch.manual_seed(0)
    batches = batches_for(module, ratio=ratio)
    inputs, _ = gathered(module, batches, [module(x).detach() for x in batches])
    x = torch.cat([naive_patches(module, x.double()) for x in batches], 1)
    assert_covariances_agree(inputs.hessian(centred=True)[0], torch.cov(x[0].T, correction=0))
    assert not inputs.constant.any()


def test_batches_of_several_sizes_and_paddings_share_one_offset():
    """Bands of a layer's input come with padding of their own."""
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, 3, padding=1)
    band = nn.Conv2d(4, 6, 3, padding=(0, 1))
    observer = HessianObserver(LayerGeometry.of(module))
    seen = []
    for layer, size in ((module, (9, 11)), (band, (6, 11)), (module, (5, 4))):
        x = far_from_zero((3, 4, *size), channel_dim=1) if not seen else seen[0][1][:, :, : size[0], : size[1]]
        seen.append((layer, x))
        observer.observe(x, LayerGeometry.of(layer))
    patches = torch.cat([naive_patches(layer, x.double()) for layer, x in seen], 1)[0]
    statistics = observer.statistics()
    assert statistics.count == len(patches)
    assert_covariances_agree(statistics.hessian(centred=True)[0], torch.cov(patches.T, correction=0))


def test_the_offset_of_the_first_batch_need_not_suit_the_others():
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, 3, padding=1)
    batches = [x + shift for x, shift in zip(batches_for(module), (0.0, 5.0, -5.0), strict=True)]
    inputs, _ = gathered(module, batches, [module(x).detach() for x in batches])
    patches = torch.cat([naive_patches(module, x.double()) for x in batches], 1)[0]
    assert_covariances_agree(inputs.hessian(centred=True)[0], torch.cov(patches.T, correction=0))


def test_a_change_of_the_wanted_output_adds_up():
    """A change is seen on fewer patches, and has offsets of its own or none."""
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, 3, padding=1)
    geometry, batches = LayerGeometry.of(module), batches_for(module)
    outputs = [module(x).detach() for x in batches]
    inputs, cross = gathered(module, batches, outputs)
    for change in ([torch.randn_like(y) for y in outputs], [torch.randn_like(y) + 500 for y in outputs]):
        _, added = gathered(module, batches, change)
        _, both = gathered(module, batches, [y.double() + z for y, z in zip(outputs, change, strict=True)])
        _, part = gathered(module, batches[1:], change[1:])
        found = cross.plus(added)
        torch.testing.assert_close(found.mean, both.mean, rtol=1e-6, atol=1e-3)
        for centred in (False, True):
            wanted = both.target(inputs, module.bias, centred=centred)
            torch.testing.assert_close(found.target(inputs, module.bias, centred=centred), wanted, rtol=1e-5, atol=1e-2)
        scaled = cross.plus(part)
        assert scaled.count == cross.count
        torch.testing.assert_close(scaled.mean, cross.mean + part.mean)
    assert cross.plus(CrossStatistics.empty(geometry, CPU)) is cross


@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 600.0])
def test_a_constant_channel_is_constant_and_only_zeros_are_dead(value):
    torch.manual_seed(0)
    for others in (0.0, 1000.0):
        x = torch.randn(8, 3, 5, 5) + others
        x[:, 1] = value
        observer = HessianObserver(LayerGeometry.of(nn.Conv2d(3, 2, 1)))
        for batch in x.split(3):
            observer(batch)
        statistics = observer.statistics()
        assert statistics.constant.tolist() == [[False, True, False]]
        assert statistics.dead.tolist() == [[False, value == 0, False]]
        hessian = statistics.hessian(centred=True)[0]
        assert (hessian[1] == 0).all()
        assert (hessian[:, 1] == 0).all()
        assert statistics.mean[0, 1] == pytest.approx(value, rel=1e-7)


def test_the_steps_of_a_computed_constant_are_no_signal():
    steps = torch.randint(-2, 3, (400, 6)) * torch.finfo(torch.float32).eps
    observer = HessianObserver(LayerGeometry.of(nn.Linear(6, 2)))
    observer(600 * (1 + steps))
    assert observer.statistics().constant.all()


@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.Linear(6, 2), ()), (nn.Conv2d(6, 4, 3, padding=1), (1, 1)), (nn.Conv2d(6, 6, 3, groups=3), (3, 3))],
    ids=repr,
)
def test_a_single_patch_has_a_mean_and_no_variance(module, shape):
    geometry = LayerGeometry.of(module)
    x = torch.randn(1, 6, *shape)
    observer = HessianObserver(geometry)
    observer(x)
    statistics = observer.statistics()
    assert statistics.count == 1
    torch.testing.assert_close(statistics.mean, geometry.patches(x.double())[:, 0])
    assert (statistics.hessian(centred=True) == 0).all()


def test_batches_without_images_change_nothing():
    module = nn.Conv2d(4, 6, 3, padding=1)
    batches = batches_for(module)
    outputs = [module(x).detach() for x in batches]
    wanted, wanted_cross = gathered(module, batches, outputs)
    observer, cross = (
        HessianObserver(geometry := LayerGeometry.of(module)),
        CrossStatistics.empty(LayerGeometry.of(module), CPU),
    )
    for x, y in zip(batches, outputs, strict=True):
        observer(x[:0])
        observer.add(geometry, x[:0])
        cross.update(geometry, x[:0], y[:0])
        observer(x)
        cross.update(geometry, x, y)
    assert torch.equal(observer.statistics().hessian(centred=True), wanted.hessian(centred=True))
    assert torch.equal(cross.target(wanted, None, centred=True), wanted_cross.target(wanted, None, centred=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations_are_summed_in_float32(dtype):
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, 3, padding=1)
    batches = [(torch.randn(16, 4, 12, 12) + 3).to(dtype) for _ in range(20)]
    outputs = [torch.randn(16, 6, 12, 12).to(dtype) for _ in batches]
    inputs, cross = gathered(module, batches, outputs)
    patches = torch.cat([LayerGeometry.of(module).patches(x.double()) for x in batches], 1)[0]
    assert_covariances_agree(inputs.hessian(centred=True)[0], torch.cov(patches.T, correction=0), rtol=1e-3)
    wanted = torch.cat([LayerGeometry.of(module).output_matrix(y.double()) for y in outputs], 2)[0]
    target = (wanted - wanted.mean(1, keepdim=True)) @ (patches - patches.mean(0)) / len(patches)
    torch.testing.assert_close(cross.target(inputs, None, centred=True)[0], target, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e17, 1e25])
@pytest.mark.parametrize("mean", [0.0, 600.0])
def test_values_whose_squares_float32_cannot_hold(size, mean):
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, 3, padding=1)
    batches = [(x + mean) * size for x in torch.randn(3, 5, 4, 8, 8)]
    outputs = [torch.randn(5, 6, 8, 8) * size for _ in batches]
    inputs, cross = gathered(module, batches, outputs)
    patches = torch.cat([naive_patches(module, x.double()) for x in batches], 1)[0]
    covariance = torch.cov(patches.T, correction=0) / size**2
    assert_covariances_agree(inputs.hessian(centred=True)[0] / size**2, covariance)
    wanted = torch.cat([LayerGeometry.of(module).output_matrix(y.double()) for y in outputs], 2)[0]
    target = (wanted - wanted.mean(1, keepdim=True)) @ (patches - patches.mean(0)) / len(patches)
    scale = covariance.diagonal().sqrt() * size**2
    assert float(((cross.target(inputs, None, centred=True)[0] - target) / scale).abs().max()) < 1e-3


@pytest.mark.parametrize("shape", [(16, 4, 8, 8), (1, 4, 64, 64), (200, 4), (3, 7, 4)])
def test_the_offset_is_in_the_middle_of_every_channel(shape):
    torch.manual_seed(0)
    dim = 1 if len(shape) == 4 else -1
    x = far_from_zero(shape, channel_dim=dim)
    offset = Offset.of(x, dim)
    assert offset.values.dtype == torch.float32
    left = offset.removed(x, dim).movedim(dim, -1).flatten(0, -2)
    assert float(left.mean(0).abs().max()) < 1


@pytest.mark.parametrize(
    "x",
    [torch.randn(16, 4, 8, 8), torch.randn(16, 4, 8, 8).relu(), torch.randn(16, 4, 8, 8) + 5, torch.zeros(16, 4, 8, 8),
     torch.randn(16, 4, 8, 8).sub(1).relu()],
)  # fmt: skip
def test_usual_activations_are_left_as_they_are(x):
    offset = Offset.of(x, 1)
    assert offset.values is None
    assert offset.removed(x, 1) is x


def test_zeros_beside_the_image_do_not_move_the_offset():
    """Of a band at the border, rows of zeros are part of the input."""
    torch.manual_seed(0)
    x = far_from_zero((8, 4, 5, 9), channel_dim=1)
    x[:, :, 0] = 0
    left = Offset.of(x, 1).removed(x, 1)[:, :, 1:]
    assert float(left.mean((0, 2, 3)).abs().max()) < 1
