"""Every model of this package: shapes, tracing, layer names, and agreement with the papers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from fxprune import models
from fxprune.models.resnet_cifar import BasicBlock, resnet_cifar

SMALL = {"vgg16_cifar": {"hidden": 64}}
NAMES = ["simple_cnn", "cifar_cnn", "resnet20", "resnet32", "resnet18_cifar", "vgg16_cifar"]


@pytest.mark.parametrize("name", NAMES)
def test_default_model_matches_its_info_and_traces(name):
    info = models.model_info(name)
    model = models.create(name, **SMALL.get(name, {})).eval()
    images = torch.randn(2, *info.input_shape)
    traced = torch.fx.symbolic_trace(model)
    with torch.inference_mode():
        expected = model(images)
        assert expected.shape == (2, info.num_classes)
        assert expected.isfinite().all()
        assert torch.equal(traced(images), expected)


@pytest.mark.parametrize("name", NAMES)
def test_other_classes_and_channels(name):
    _, height, width = models.model_info(name).input_shape
    model = models.create(name, num_classes=7, in_channels=2, **SMALL.get(name, {})).eval()
    assert model(torch.zeros(1, 2, height, width)).shape == (1, 7)


@pytest.mark.parametrize("name", NAMES)
def test_all_layers_but_the_first_can_hold_two_of_four(name):
    model = models.create(name, **SMALL.get(name, {}))
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) >= 4
    assert [layer.weight.shape[1] % 4 for layer in layers[1:]] == [0] * (len(layers) - 1)


@pytest.mark.parametrize(
    ("name", "convs", "linears"), [("simple_cnn", 2, 2), ("cifar_cnn", 6, 2), ("vgg16_cifar", 13, 3)]
)
def test_layer_counts(name, convs, linears):
    model = models.create(name, **SMALL.get(name, {}))
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == convs
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == convs
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == linears


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_resnet_cifar_has_the_papers_parameter_count(depth, millions):
    # He et al. 2015, table 6.
    model = models.create(f"resnet{depth}")
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 1 if depth == 110 else 2) == millions
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth


def test_resnet_cifar_layer_names():
    names = set(models.create("resnet20").state_dict())
    for stage in (1, 2, 3):
        for block in range(3):
            for layer in ("conv1", "bn1", "conv2", "bn2"):
                assert f"layer{stage}.{block}.{layer}.weight" in names
    assert {"conv1.weight", "bn1.weight", "linear.weight", "linear.bias"} <= names
    assert not any("shortcut" in name or "downsample" in name for name in names)


def test_option_a_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides():
    block = BasicBlock(4, 8, 2).eval()
    x = torch.randn(2, 4, 6, 6)
    shortcut = torch.zeros(2, 8, 3, 3)
    for channel in range(4):
        for row in range(3):
            for column in range(3):
                shortcut[:, 2 + channel, row, column] = x[:, channel, 2 * row, 2 * column]
    with torch.inference_mode():
        main = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
        assert torch.equal(block(x), F.relu(main + shortcut))


@pytest.mark.parametrize("depth", [2, 18, 21, -4])
def test_resnet_cifar_depth_must_be_6n_plus_2(depth):
    with pytest.raises(ValueError, match="6n \\+ 2"):
        resnet_cifar(depth)


def test_resnet18_cifar_keeps_torchvisions_names_and_the_full_map():
    model = models.create("resnet18_cifar")
    reference = torchvision.models.resnet18(num_classes=10)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    expected = {name: value.shape for name, value in reference.state_dict().items()}
    expected["conv1.weight"] = torch.Size([64, 3, 3, 3])
    assert shapes == expected
    seen = []
    model.layer1.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape))
    model.eval()(torch.zeros(1, 3, 32, 32))
    assert seen == [torch.Size([1, 64, 32, 32])]


def test_vgg16_cifar_keeps_torchvisions_names():
    model = models.create("vgg16_cifar", hidden=64)
    with torch.device("meta"):
        reference = torchvision.models.vgg16_bn(num_classes=10)
    assert list(model.state_dict()) == list(reference.state_dict())
    convs = {name: value.shape for name, value in reference.state_dict().items() if name.startswith("features")}
    assert {n: v.shape for n, v in model.state_dict().items() if n.startswith("features")} == convs


def test_narrow_networks_have_the_same_layers_a_quarter_as_wide():
    for name, factor in (("resnet18_cifar", 16), ("vgg16_cifar", 16)):
        wide, narrow = models.create(name, **SMALL.get(name, {})), models.create(name, width=16)
        assert list(narrow.state_dict()) == list(wide.state_dict())
        sizes = {
            m: sum(w.numel() for n, w in m.state_dict().items() if "conv" in n or "features" in n)
            for m in (wide, narrow)
        }
        assert sizes[wide] / factor < sizes[narrow] < sizes[wide] / factor * 1.1
        assert narrow.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert [m.out_features for m in narrow.classifier if isinstance(m, nn.Linear)] == [1024, 1024, 10]


def test_vgg16_cifar_classifier_is_4096_wide():
    with torch.device("meta"):
        model = models.create("vgg16_cifar")
    assert [m.weight.shape for m in model.classifier if isinstance(m, nn.Linear)] == [
        (4096, 512),
        (4096, 4096),
        (10, 4096),
    ]
    assert model.avgpool.output_size == (1, 1)


@pytest.mark.parametrize("name", ["simple_cnn", "cifar_cnn"])
def test_plain_models_learn_one_batch(name):
    info = models.model_info(name)
    model = models.create(name, width=8).train()
    images, labels = torch.randn(16, *info.input_shape), torch.arange(16) % 10
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
