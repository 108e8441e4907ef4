from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
from torch import nn

from fxprune import models
from fxprune.errors import FxPruneError, ModelError, UnknownModelError
from fxprune.models import registry

OWN = ["cifar_cnn", "resnet110", "resnet18_cifar", "resnet20", "resnet32", "resnet44", "resnet56",
       "simple_cnn", "vgg16_cifar"]  # fmt: skip


@pytest.fixture
def _clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))


def test_list_holds_own_models_first_then_torchvisions():
    names = models.list_models()
    assert [name for name in names if name in OWN] == OWN
    assert names.index("alexnet") > names.index("vgg16_cifar")
    assert {"resnet50", "mobilenet_v2", "vgg16_bn", "convnext_tiny"} <= set(names)
    assert len(names) == len(set(names))
    # Detection and segmentation models are no classifiers.
    assert not any("rcnn" in name or "deeplab" in name for name in names)


def test_list_takes_a_pattern():
    assert models.list_models("resnet*_cifar") == ["resnet18_cifar"]
    assert "resnet50" in models.list_models("resnet*")


def test_every_listed_model_is_described_without_a_download(monkeypatch):
    def no_network(*_args, **_kwargs):
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    own = [
        *models.list_models("resnet*"),
        *models.list_models("*net_*"),
        "simple_cnn",
        "cifar_cnn",
        "vgg16_cifar",
        "mobilenet_v2",
    ]
    for name in own:
        info = models.model_info(name)
        assert info.name == name
        assert len(info.mean) == len(info.std) == info.input_shape[0]
        assert info.num_classes in (10, 1000)
    assert models.model_info("resnet50").input_shape == (3, 224, 224)
    assert models.model_info("inception_v3").input_shape == (3, 299, 299)


def test_info_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        models.model_info("resnet20").num_classes = 3


@pytest.mark.parametrize("name", ["resnt20", "Resnet20", "resnet20 "])
def test_unknown_name_lists_close_matches(name):
    for ask in (models.create, models.model_info):
        with pytest.raises(UnknownModelError, match=r"did you mean .*resnet20"):
            ask(name)


def test_unknown_name_with_nothing_close_points_to_the_list():
    with pytest.raises(UnknownModelError, match="list_models"):
        models.create("qqqqqqq")
    assert issubclass(UnknownModelError, FxPruneError)


@pytest.mark.usefixtures("_clean_registry")
def test_one_decorator_registers_a_class():
    @models.register("mine", input_shape=(1, 4, 4), num_classes=3, mean=(0.5,), std=(0.25,))
    class Mine(nn.Sequential):
        def __init__(self, num_classes: int = 3, hidden: int = 5) -> None:
            super().__init__(nn.Flatten(), nn.Linear(16, hidden), nn.Linear(hidden, num_classes))

    assert "mine" in models.list_models()
    assert models.model_info("mine") == models.ModelInfo("mine", (1, 4, 4), 3, (0.5,), (0.25,), "")
    assert isinstance(models.create("mine"), Mine)
    built = models.create("mine", num_classes=7, hidden=11)
    assert (built[2].in_features, built[2].out_features) == (11, 7)


@pytest.mark.usefixtures("_clean_registry")
def test_one_decorator_registers_a_function_and_returns_it():
    def build() -> nn.Module:
        return nn.Conv2d(3, 4, 1)

    assert models.register("plain")(build) is build
    assert models.model_info("plain").input_shape == (3, 224, 224)
    assert models.create("plain").out_channels == 4
    with pytest.raises(ModelError, match=r"'plain'.*num_classes.*takes \(\)"):
        models.create("plain", num_classes=2)


@pytest.mark.usefixtures("_clean_registry")
def test_a_name_is_not_given_twice():
    def one() -> nn.Module:
        return nn.Identity()

    def two() -> nn.Module:
        return nn.Identity()

    models.register("taken")(one)
    models.register("taken")(one)  # a notebook cell run again
    with pytest.raises(ModelError, match=r"'taken' is taken by .*one"):
        models.register("taken")(two)
    with pytest.raises(ModelError, match="torchvision"):
        models.register("resnet50")(one)
    with pytest.raises(ModelError, match="timm/"):
        models.register("timm/mine")


def test_normalisation_needs_one_figure_a_channel():
    with pytest.raises(ModelError, match=r"1 channel\(s\) but has 3 mean"):
        models.register("grey", input_shape=(1, 8, 8))


def test_create_refuses_unknown_arguments():
    with pytest.raises(ModelError, match=r"'resnet20'.*depht"):
        models.create("resnet20", depht=3)
    with pytest.raises(ModelError, match="resnet18"):
        models.create("resnet18", depht=3)


def test_torchvision_model_with_other_classes_and_channels():
    model = models.create("mobilenet_v3_small", num_classes=7, in_channels=1).eval()
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 7)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert (first.in_channels, first.stride, first.padding, first.bias) == (1, (2, 2), (1, 1), None)


def test_torchvision_weights_keep_their_channels_and_classes(monkeypatch):
    with pytest.raises(ModelError, match="3 input channels, not 1"):
        models.create("resnet18", in_channels=1, weights="DEFAULT")
    with pytest.raises(ModelError, match="num_classes"):
        models.create("resnet18", num_classes=10, weights="DEFAULT")


def test_weights_are_fetched_only_when_asked_for(monkeypatch):
    asked = []

    def fetch(url, *_args, **_kwargs):
        asked.append(url)
        return trained

    trained = models.create("squeezenet1_1").state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    models.create("squeezenet1_1")
    assert asked == []
    model = models.create("squeezenet1_1", weights="DEFAULT")
    assert len(asked) == 1
    assert torch.equal(model.classifier[1].weight, trained["classifier.1.weight"])


def test_googlenet_builds_without_the_slow_initialisation(recwarn):
    models.create("googlenet")
    assert not [w for w in recwarn if "weight initialization" in str(w.message)]


def test_timm_models_where_timm_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match="need timm"):
        models.create("timm/resnet18")
    assert not any(name.startswith("timm/") for name in models.list_models())


def test_timm_models_go_through_timm(monkeypatch):
    config = types.SimpleNamespace(input_size=(3, 64, 64), num_classes=5, mean=(0.5,) * 3, std=(0.5,) * 3)

    def create_model(name, num_classes=5, in_chans=3):
        return nn.Conv2d(in_chans, num_classes, 1)

    stand_in = types.SimpleNamespace(
        __version__="0",
        list_models=lambda: ["tiny_net", "other"],
        create_model=create_model,
        get_pretrained_cfg=lambda name: config,
    )
    monkeypatch.setitem(sys.modules, "timm", stand_in)
    model = models.create("timm/tiny_net.some_tag", num_classes=9, in_channels=1)
    assert model.weight.shape == (9, 1, 1, 1)
    assert models.model_info("timm/tiny_net").input_shape == (3, 64, 64)
    assert models.list_models("timm/*") == ["timm/tiny_net", "timm/other"]
    with pytest.raises(UnknownModelError, match=r"did you mean timm/tiny_net\?"):
        models.create("timm/tinynet")
    with pytest.raises(ModelError, match="does not take"):
        models.create("timm/other", pretraind=True)
