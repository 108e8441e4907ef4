from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrizations, weight_norm

from fxprune.channels import Channels, analyse_channels, new_places, permute_channels, value_shapes
from fxprune.graph import input_of
from fxprune.models import create
from fxprune.passes import FoldBatchNorm, RemoveInplace
from fxprune.tracing import trace


class Fn(nn.Module):
    """A model whose forward is a function of its layers and the input."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self._of = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self._of(self, x)


def conv(a: int, b: int, k: int = 3, **kwargs: int) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, **kwargs)


def prepared(model: nn.Module, *, fold: bool = False) -> GraphModule:
    """The traced graph in float64, with normalisation layers that differ from channel to channel."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm)):
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
            if isinstance(module, _NormBase) and module.running_mean is not None:
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
    graph_module = trace(model)
    RemoveInplace()(graph_module)
    if fold:
        FoldBatchNorm()(graph_module)
    return graph_module


def analysed(graph_module: GraphModule, x: Tensor, **kwargs: tuple[str, ...]) -> Channels:
    return analyse_channels(graph_module, value_shapes(graph_module, x), **kwargs)


def scramble(graph_module: GraphModule, channels: Channels, seed: int = 0) -> set[str]:
    """Permute every atom at random; the names of the parameters and buffers that changed."""
    before = {name: value.clone() for name, value in graph_module.state_dict().items()}
    source, random = np.arange(channels.count), np.random.default_rng(seed)
    for atom in channels.atoms:
        source[atom] = np.roll(random.permutation(atom), 1) if len(atom) > 2 else atom[::-1]
    permute_channels(graph_module, channels, source)
    return {name for name, value in graph_module.state_dict().items() if not torch.equal(value, before[name])}


@torch.no_grad()
def check(
    model: nn.Module, x: Tensor, *, fold: bool = False, **kwargs: tuple[str, ...]
) -> tuple[Counter[int], set[str]]:
    """Scramble a model's channels, check that its function is the same; sizes of the atoms, and names changed."""
    graph_module, x = prepared(model, fold=fold), x.double()
    before = graph_module(x)
    channels = analysed(graph_module, x, **kwargs)
    changed = scramble(graph_module, channels)
    after = graph_module(x)
    assert bool(changed) == bool(channels.atoms)
    assert float((after - before).abs().max()) <= 1e-10 * float(before.abs().max())
    return Counter(map(len, channels.atoms)), changed


def node(graph_module: GraphModule, name: str) -> Node:
    return next(n for n in graph_module.graph.nodes if n.name == name)


def reason(model: nn.Module, x: Tensor, name: str) -> str:
    """Why the input channels of the layer called `name` stay in place."""
    graph_module = prepared(model)
    return analysed(graph_module, x.double()).reason(input_of(node(graph_module, name)))


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_new_places_moves_the_kth_occurrence_to_the_kth() -> None:
    classes = np.array([5, 7, 5, 6, 7, 6])
    source = np.arange(8)
    source[[5, 6, 7]] = [6, 7, 5]
    places = new_places(classes, source)
    assert classes[places].tolist() == source[classes].tolist()
    assert places.tolist() == [3, 0, 5, 1, 2, 4]
    assert new_places(classes, np.arange(8)).tolist() == list(range(6))


def test_a_chain_of_layers() -> None:
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.PReLU(6), conv(6, 5))
    sizes, changed = check(model, IMAGES)
    assert sizes == {8: 1, 6: 1}
    assert changed == {
        "0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "3.weight", "3.bias", "4.weight",
        "5.weight",
    } - ({"4.weight"} if torch.equal(model[4].weight, model[4].weight.flip(0)) else set())  # fmt: skip


def test_prelu_with_a_slope_a_channel() -> None:
    prelu = nn.PReLU(6)
    nn.init.uniform_(prelu.weight)
    assert "1.weight" in check(nn.Sequential(conv(3, 6), prelu, conv(6, 5)), IMAGES)[1]
    assert "1.weight" not in check(nn.Sequential(conv(3, 6), nn.PReLU(), conv(6, 5)), IMAGES)[1]


def test_the_change_is_the_permutation_of_rows_and_columns() -> None:
    graph_module = prepared(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 5)))
    channels = analysed(graph_module, IMAGES.double())
    first, second = graph_module.get_submodule("0").weight.clone(), graph_module.get_submodule("2").weight.clone()
    classes = channels.layouts[node(graph_module, "_1")].classes
    order = [2, 0, 3, 1]
    source = np.arange(channels.count)
    source[classes] = classes[order]
    permute_channels(graph_module, channels, source)
    assert torch.equal(graph_module.get_submodule("0").weight, first[order])
    assert torch.equal(graph_module.get_submodule("2").weight, second[:, order])


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(
    ("name", "atoms"),
    [
        ("resnet18", {64: 3, 128: 3, 256: 3, 512: 3}),
        ("squeezenet1_1", {16: 2, 32: 2, 48: 2, 64: 7, 128: 4, 192: 4, 256: 4}),
    ],
)
def test_torchvision_models(name: str, atoms: dict[int, int], fold: bool) -> None:
    model = getattr(torchvision.models, name)(num_classes=10).eval()
    assert check(model, torch.randn(1, 3, 32, 32), fold=fold)[0] == atoms


@pytest.mark.parametrize("fold", [False, True])
def test_inverted_residuals(fold: bool) -> None:
    setting = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 40, 2, 2]]
    model = torchvision.models.MobileNetV2(num_classes=4, inverted_residual_setting=setting)
    sizes, changed = check(model, torch.randn(1, 3, 32, 32), fold=fold)
    # Streams of 16, 24 and 40 channels; widths inside the blocks; stem and head.
    assert sizes == {32: 1, 16: 1, 96: 1, 24: 1, 144: 2, 40: 1, 240: 1, 1280: 1}
    assert "features.3.conv.1.0.weight" in changed  # depthwise


def test_bottlenecks_with_downsample() -> None:
    model = torchvision.models.resnet.ResNet(torchvision.models.resnet.Bottleneck, [2, 2, 1, 1], num_classes=7)
    sizes, changed = check(model, torch.randn(2, 3, 32, 32))
    # A stream a stage; two inner widths a block; the stem.
    assert sizes == {64: 1 + 4, 256: 1 + 2, 128: 4, 512: 1 + 2, 1024: 1, 2048: 1}
    assert {"layer2.0.downsample.0.weight", "layer2.0.downsample.1.running_var", "fc.weight"} <= changed
    assert "fc.bias" not in changed


def test_resnet20_option_a() -> None:
    graph_module = prepared(create("resnet20"), fold=True)
    channels = analysed(graph_module, torch.randn(2, 3, 32, 32).double())
    # Three stages of three inner widths; the stream, to which each wider stage adds new channels that were zeros.
    assert Counter(map(len, channels.atoms)) == {16: 3 + 1 + 1, 32: 3 + 1, 64: 3}
    stages = [channels.layouts[node(graph_module, f"add{i}")].classes.tolist() for i in ("_2", "_5", "_8")]
    assert stages[1][8:24] == stages[0]
    assert stages[2][16:48] == stages[1]
    check(create("resnet20"), torch.randn(2, 3, 32, 32), fold=True)


@pytest.mark.parametrize(("before", "after"), [(4, 4), (0, 8), (3, 5), (8, 0)])
def test_constants_before_and_after_may_change_places(before: int, after: int) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.first(x)
        return m.last(F.relu(F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, before, after), value=0.5) + m.strided(y)))

    sizes, _ = check(Fn(forward, first=conv(3, 8), strided=conv(8, 16, stride=2), last=conv(16, 2)), IMAGES)
    assert sizes == {8: 2}


def test_a_constant_tied_to_a_channel_beside_it() -> None:
    """The constants before hold the place of the first channels, so they are told apart from those after."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.first(x)
        return m.last(F.pad(y, (0, 0, 0, 0, 4, 0)) + F.pad(y, (0, 0, 0, 0, 0, 4)))

    sizes, _ = check(Fn(forward, first=conv(3, 8), last=conv(12, 2)), IMAGES)
    assert sum(n * size for size, n in sizes.items()) <= 4


def test_padding_of_pixels_keeps_channels_and_reflection_of_channels_does_not() -> None:
    def constant(m: nn.Module, x: Tensor) -> Tensor:
        return m.b(F.pad(m.pad(m.a(x)), (1, 1, 2, 0)))

    assert check(Fn(constant, a=conv(3, 8), b=conv(8, 2), pad=nn.ReflectionPad2d(1)), IMAGES)[0] == {8: 1}

    def channels(m: nn.Module, x: Tensor) -> Tensor:
        return m.b(F.pad(m.a(x), (0, 0, 0, 0, 1, 1), mode="replicate" if False else "constant", value=1.0)[:, :8])

    assert check(Fn(channels, a=conv(3, 8), b=conv(8, 2)), IMAGES)[0] == {7: 1}


def test_concatenated_inputs_are_permuted_within_their_segments() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        z = torch.cat([y, m.b(y)], 1)
        return m.d(torch.cat((z, m.c(z)), dim=-3))

    model = Fn(forward, a=conv(3, 4), b=conv(4, 6), c=conv(10, 8), d=conv(18, 2))
    graph_module = prepared(model)
    channels = analysed(graph_module, IMAGES.double())
    assert Counter(map(len, channels.atoms)) == {4: 1, 6: 1, 8: 1}
    assert len(set(channels.layouts[node(graph_module, "cat_1")].classes.tolist())) == 18
    check(model, IMAGES)


def test_dense_blocks() -> None:
    model = torchvision.models.DenseNet(4, (3, 2), num_init_features=8, bn_size=2, num_classes=5)
    sizes, _ = check(model, torch.randn(2, 3, 32, 32))
    assert sizes == {8: 1 + 5, 4: 5, 10: 1}


@pytest.mark.parametrize(
    "join",
    [
        lambda y, z: torch.cat([y, y], 1),
        lambda y, z: torch.cat([y, -y], 1),
        lambda y, z: torch.cat([y, z], 1) + torch.cat([z, y], 1),
        lambda y, z: torch.cat([y, y + z, z], 1),
        lambda y, z: torch.cat([torch.cat([y, z], 1), y + z], 1)[:, 4:20],
    ],
)
def test_channels_that_occur_twice(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.c(F.relu(join(m.a(x), m.b(x))))

    width = join(torch.zeros(1, 8, 1, 1), torch.zeros(1, 8, 1, 1)).shape[1]
    sizes, _ = check(Fn(forward, a=conv(3, 8), b=conv(3, 8), c=conv(width, 2)), IMAGES)
    assert sizes


def test_concatenation_of_pixels_ties_channels() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.c(torch.cat([m.a(x), m.b(x)], 2))

    graph_module = prepared(Fn(forward, a=conv(3, 8), b=conv(3, 8), c=conv(8, 2)))
    assert [len(a) for a in analysed(graph_module, IMAGES.double()).atoms] == [8]
    check(Fn(forward, a=conv(3, 8), b=conv(3, 8), c=conv(8, 2)), IMAGES)


@pytest.mark.parametrize(
    "flat",
    [
        lambda m, x: torch.flatten(x, 1),
        lambda m, x: x.view(x.size(0), -1),
        lambda m, x: x.reshape((x.shape[0], 512)),
        lambda m, x: m.flatten(x),
    ],
)
def test_flatten_repeats_channels(flat: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = Fn(lambda m, x: m.b(F.relu(flat(m, m.a(x)))), a=conv(3, 8), b=nn.Linear(512, 5), flatten=nn.Flatten())
    graph_module = prepared(model)
    channels = analysed(graph_module, IMAGES.double())
    classes = channels.layouts[input_of(node(graph_module, "b"))].classes
    assert classes.tolist() == np.repeat(classes[::64], 64).tolist()
    assert check(model, IMAGES)[0] == {8: 1}


@pytest.mark.parametrize(
    "pool",
    [
        lambda m, x: x.mean([2, 3]),
        lambda m, x: x.mean(3).mean(-1),
        lambda m, x: torch.mean(x, dim=(-2, -1), keepdim=True).squeeze(-1).squeeze(-1),
        lambda m, x: F.adaptive_avg_pool2d(x, (1, 1)).flatten(1),
        lambda m, x: F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1),
        lambda m, x: m.pool(x).squeeze(),
        lambda m, x: x.flatten(2).amax(-1),
        lambda m, x: F.max_pool2d(x, 8)[:, :, 0, 0],
        lambda m, x: F.interpolate(x, scale_factor=2)[..., 3, 5],
    ],
)
def test_global_pooling_keeps_channels(pool: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = Fn(lambda m, x: m.b(pool(m, m.a(x))), a=conv(3, 8), b=nn.Linear(8, 5), pool=nn.AdaptiveAvgPool2d(1))
    assert check(model, IMAGES)[0] == {8: 1}


def test_depthwise_with_a_multiplier() -> None:
    model = nn.Sequential(conv(3, 6), conv(6, 12, groups=6), nn.ReLU6(), conv(12, 4, 1))
    sizes, changed = check(model, IMAGES)
    assert sizes == {6: 1}
    assert {"1.weight", "1.bias"} <= changed


def test_grouped_convolutions_permute_within_their_groups() -> None:
    model = nn.Sequential(conv(3, 12), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 8, groups=2), nn.ReLU(), conv(8, 3))
    sizes, changed = check(model, IMAGES)
    assert sizes == {6: 2, 4: 2}
    assert {"0.weight", "3.weight", "3.bias", "5.weight"} <= changed


def test_group_norm_and_instance_norm() -> None:
    model = nn.Sequential(
        conv(3, 12), nn.GroupNorm(3, 12), conv(12, 8), nn.InstanceNorm2d(8, affine=True, track_running_stats=True), conv(8, 3)
    )  # fmt: skip
    sizes, changed = check(model, IMAGES)
    assert sizes == {4: 3, 8: 1}
    assert {"1.weight", "1.bias", "3.weight", "3.running_var"} <= changed


def test_tokens_with_layer_norm() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 12), nn.Linear(12, 3))
    sizes, changed = check(model, torch.randn(2, 7, 5))
    assert sizes == {8: 1, 12: 1}
    assert "1.weight" in changed


def test_linear_layers_mix_whatever_they_read() -> None:
    """As in ConvNeXt: what follows the first Linear has channels of its own again."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.b(F.gelu(m.a(m.norm(m.stem(x).permute(0, 2, 3, 1)))))
        return m.c(y.permute(0, 3, 1, 2))

    model = Fn(forward, stem=conv(3, 6), norm=nn.LayerNorm(6), a=nn.Linear(6, 12), b=nn.Linear(12, 6), c=conv(6, 2))
    assert check(model, IMAGES)[0] == {12: 1}
    assert "LayerNorm" in reason(model, IMAGES, "a")


def test_a_grouped_convolution_over_another_dimension() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Conv1d(6, 4, 3, groups=2, padding=1), nn.Linear(8, 6), nn.Linear(6, 2))
    assert check(model, torch.randn(2, 6, 5))[0] == {6: 1}
    model[1] = nn.Conv1d(6, 4, 3, padding=1)
    assert check(model, torch.randn(2, 6, 5))[0] == {6: 1}


def test_layer_norm_over_pixels_keeps_everything() -> None:
    model = nn.Sequential(conv(3, 8), nn.LayerNorm((8, 8, 8)), conv(8, 2))
    assert check(model, IMAGES)[0] == {}
    assert "LayerNorm" in reason(model, IMAGES, "_2")


def test_squeeze_and_excite() -> None:
    model = Fn(lambda m, x: m.b(m.se(m.a(x))), a=conv(3, 8), se=torchvision.ops.SqueezeExcitation(8, 4), b=conv(8, 2))
    assert check(model, IMAGES)[0] == {8: 1, 4: 1}

    def linear(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        n, c = y.shape[:2]
        gate = torch.sigmoid(m.up(F.relu(m.down(y.mean((2, 3)))))).view(n, c, 1, 1)
        return m.b(y * gate.expand_as(y)) if False else m.b(gate * y)

    model = Fn(linear, a=conv(3, 8), down=nn.Linear(8, 4), up=nn.Linear(4, 8), b=conv(8, 2))
    assert check(model, IMAGES)[0] == {8: 1, 4: 1}


def test_spatial_attention_reads_all_channels_alike() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y * torch.sigmoid(m.gate(y.mean(1, keepdim=True))))

    assert check(Fn(forward, a=conv(3, 8), gate=conv(1, 1), b=conv(8, 2)), IMAGES)[0] == {8: 1}


def test_unet_with_transposed_convolution() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        z = m.up(F.relu(m.down(y)))
        return m.b(torch.cat([y, z], 1))

    model = Fn(
        forward,
        a=conv(3, 8),
        down=conv(8, 12, stride=2),
        up=nn.ConvTranspose2d(12, 6, 2, stride=2),
        b=conv(14, 2),
    )
    sizes, changed = check(model, IMAGES)
    assert sizes == {8: 1, 12: 1, 6: 1}
    assert {"up.weight", "up.bias"} <= changed


@pytest.mark.parametrize("kind", [nn.ConvTranspose2d])
def test_transposed_convolution_with_groups_stays(kind: type[nn.Module]) -> None:
    model = nn.Sequential(conv(3, 8), kind(8, 6, 2, stride=2, groups=2), conv(6, 2))
    assert check(model, IMAGES)[0] == {}


@pytest.mark.parametrize(
    "split",
    [
        lambda y: y.chunk(2, 1),
        lambda y: torch.split(y, [4, 4], dim=1),
        lambda y: torch.chunk(y, 2, dim=-3),
        lambda y: (y[:, :4], y[:, 4:]),
        lambda y: (y[:, 4:], y[:, :-4, ...]),
    ],
)
def test_split_channels_stay_in_their_parts(split: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        left, right = split(m.a(x))
        return m.c(torch.cat([right, m.b(left)], 1))

    assert check(Fn(forward, a=conv(3, 8), b=conv(4, 6), c=conv(10, 2)), IMAGES)[0] == {4: 2, 6: 1}


def test_split_pixels() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        top, bottom = m.a(x).chunk(2, 2)
        return m.b(top + bottom)

    assert check(Fn(forward, a=conv(3, 8), b=conv(8, 2)), IMAGES)[0] == {8: 1}


def shuffle(x: Tensor, groups: int = 2) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


@pytest.mark.parametrize(
    ("mix", "named"),
    [
        (shuffle, "view"),
        (lambda x: x.flip(1), "flip"),
        (lambda x: x.transpose(1, 2).transpose(1, 2), "transpose"),
        (lambda x: x[:, ::2], "every 2th channel"),
        (lambda x: x[:, [1, 0, 3, 2]], "picks channels"),
        (lambda x: x.roll(1, 1), "roll"),
        (lambda x: x.cumsum(1), "cumsum"),
        (lambda x: x.transpose(1, 3), "transpose"),
        (lambda x: F.local_response_norm(x, 3), "local_response_norm"),
        (lambda x: x * torch.arange(8.0, dtype=torch.float64).view(1, 8, 1, 1), ""),
        (lambda x: x + x.mean((2, 3))[:1], "combines channels"),
        (lambda x: torch.stack([x, x], 2)[:, :, 0], "stack"),
        (lambda x: F.pixel_shuffle(x, 2), "pixel_shuffle"),
        (lambda x: F.max_pool3d(x, (2, 1, 1)), "max_pool3d"),
    ],
)  # fmt: skip
def test_what_mixes_channels_fixes_them(mix: Callable[[Tensor], Tensor], named: str) -> None:
    width = mix(torch.zeros(2, 8, 8, 8)).shape[1]
    model = Fn(lambda m, x: m.c(mix(m.b(F.relu(m.a(x))))), a=conv(3, 8), b=conv(8, 8), c=conv(width, 2))
    x = torch.randn(2, 3, 8, 8)
    assert check(model, x)[0] == {8: 1}  # Those between a and b.
    assert named in reason(model, x, "c")


def test_shuffled_units_are_permuted_inside_their_branches_only() -> None:
    model = torchvision.models.ShuffleNetV2([2, 2, 1], [8, 16, 32, 64, 128], num_classes=4)
    graph_module = prepared(model)
    x = torch.randn(1, 3, 32, 32).double()
    channels = analysed(graph_module, x)
    read = [node(graph_module, f"stage2_1_branch2_{i}") for i in (0, 5)]
    assert "view" in channels.reason(input_of(read[0]))
    assert {c for atom in channels.atoms for c in atom.tolist()} >= set(channels.layouts[input_of(read[1])].classes)
    check(model, x)


def test_inputs_and_outputs_stay() -> None:
    model = Fn(lambda m, x: (m.a(x), m.b(F.relu(m.a2(x)))), a=conv(3, 8), a2=conv(3, 8), b=conv(8, 2))
    graph_module = prepared(model)
    channels = analysed(graph_module, IMAGES.double())
    assert [len(atom) for atom in channels.atoms] == [8]
    assert channels.reason(node(graph_module, "x")) == "they are the channels of the model's input 'x'"
    assert channels.reason(node(graph_module, "a")) == "they are the channels of the model's output"


def test_a_module_called_twice_fixes_its_channels() -> None:
    model = Fn(lambda m, x: m.c(m.b(F.relu(m.b(m.a(x))))), a=conv(3, 8), b=conv(8, 8), c=conv(8, 2))
    assert check(model, IMAGES)[0] == {}
    assert reason(model, IMAGES, "c") == "'b' (Conv2d) is called at 2 places"


def test_an_activation_called_twice_does_not() -> None:
    relu = nn.ReLU()
    assert check(nn.Sequential(conv(3, 8), relu, conv(8, 6), relu, conv(6, 2)), IMAGES)[0] == {8: 1, 6: 1}


def test_a_shared_parameter_fixes_its_channels() -> None:
    model = nn.Sequential(conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 2))
    model[2].weight = model[1].weight
    assert check(model, IMAGES)[0] == {}
    assert "shares a parameter" in reason(model, IMAGES, "_2")


def test_parameters_read_directly_fix_channels() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(3, 8), conv(8, 6), conv(6, 2)
            self.scale = nn.Parameter(torch.rand(8, 1, 1))
            self.register_buffer("factor", torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x) * self.scale) * self.factor)

    assert check(Scaled(), IMAGES)[0] == {6: 1}
    assert "combines channels" in reason(Scaled(), IMAGES, "b")


def test_functional_layers_are_layers() -> None:
    model = Fn(lambda m, x: m.c(F.conv2d(m.a(x), m.b.weight, padding=1)), a=conv(3, 8), b=conv(8, 6), c=conv(6, 2))
    assert check(model, IMAGES)[0] == {8: 1, 6: 1}


def test_computed_weights_and_hooks_fix_channels() -> None:
    with pytest.warns(FutureWarning):
        normed = weight_norm(conv(8, 8))
    for layer in (normed, parametrizations.weight_norm(conv(8, 8))):
        graph_module = GraphModule(
            root := nn.Sequential(conv(3, 8), layer, conv(8, 2)).double().eval(), torch.fx.symbolic_trace(root).graph
        )
        assert not analysed(graph_module, IMAGES.double()).atoms
    hooked = nn.Sequential(conv(3, 8), conv(8, 2)).eval()
    hooked[1].register_forward_pre_hook(lambda module, args: (args[0].flip(1),))
    assert not analysed(torch.fx.symbolic_trace(hooked), IMAGES).atoms


def test_excluded_layers_keep_their_parameters() -> None:
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), conv(8, 6), nn.ReLU(), conv(6, 4), conv(4, 2))
    sizes, changed = check(model, IMAGES, exclude=("2", "3"))
    assert sizes == {4: 1}
    assert changed == {"4.weight", "4.bias", "5.weight"}
    assert check(model, IMAGES, exclude=("1",))[0] == {6: 1, 4: 1}


def test_dropout_and_other_elementwise_operations() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = F.dropout(torch.clamp(m.a(x), -1, 1), 0.5, training=m.training)
        y = F.hardswish(y).contiguous() * 2 + 1
        y = 1 - y / (1 + y.abs()) + y**2
        return m.b(m.drop(torchvision.ops.stochastic_depth(y, 0.1, "row", False)))

    model = Fn(forward, a=conv(3, 8), b=conv(8, 2), drop=nn.Dropout2d())
    assert check(model, IMAGES)[0] == {8: 1}


def test_three_and_one_dimensional_convolutions() -> None:
    one = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.MaxPool1d(2), nn.Conv1d(8, 2, 1))
    assert check(one, torch.randn(2, 3, 9))[0] == {8: 1}
    three = nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.AvgPool3d(2), nn.Conv3d(8, 2, 1))
    assert check(three, torch.randn(2, 3, 6, 6, 6))[0] == {8: 1}


def test_linear_then_batch_norm() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    assert check(model, torch.randn(4, 5))[0] == {8: 1}


def test_float32_stays_within_rounding() -> None:
    model = create("resnet20").eval()
    graph_module = trace(model)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert scramble(graph_module, analysed(graph_module, x))
        before = model(x)
        assert float((graph_module(x) - before).abs().max()) <= 1e-5 * float(before.abs().max())


def test_the_function_changes_if_the_analysis_is_wrong() -> None:
    """The checks above can fail: permute channels that a flip has tied to others."""
    graph_module = prepared(nn.Sequential(conv(3, 8), conv(8, 6), conv(6, 2)))
    x = IMAGES.double()
    before = graph_module(x)
    channels = analysed(graph_module, x)
    weight = graph_module.get_submodule("1").weight.detach().clone()
    scramble(graph_module, channels)
    graph_module.get_submodule("1").weight.data = weight
    assert not torch.allclose(graph_module(x), before, rtol=1e-3)
