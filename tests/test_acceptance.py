"""What the project promises, on real weights and real images; and torchvision's networks from end to end."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxprune
from fxprune.data import load_data, make_loader
from fxprune.experiments.checkpoints import load_weights
from fxprune.experiments.evaluation import agreement, evaluate
from fxprune.models import create, model_info
from fxprune.passes import verify

TEST_IMAGES, JPEG_IMAGES, CALIBRATION_IMAGES = 846, 3000, 1024


class TrainedResNet20:
    """The public CIFAR-10 weights, the 1024 calibration images, and how a compiled model is judged."""

    def __init__(self, root: Path) -> None:
        info, cifar = model_info("resnet20"), root / "cifar10"
        self.model = load_weights(create("resnet20"), cifar / "resnet20-12fca82f.th").eval()
        splits = [
            load_data(cifar / name, mean=info.mean, std=info.std)
            for name in ("cifar10_subset.npz", "cifar10_jpeg_test.npz")
        ]
        first = torch.utils.data.Subset
        self.calibration = list(make_loader(first(splits[0].train, range(CALIBRATION_IMAGES))))
        self.test = list(make_loader(splits[0].test))
        self.jpeg = list(make_loader(first(splits[1].test, range(JPEG_IMAGES))))

    @functools.cache  # noqa: B019 - lives as long as the test module
    def scores(self, method: str) -> tuple[fxprune.CompiledModule, float, float]:
        """Compiled to 2:4: (graph, accuracy on the 846 images, agreement on the 3,000), in percent."""
        compiled = fxprune.compile(self.model, self.calibration, "2:4", method=method, device="cpu", progress=False)
        agreed = 100 * agreement(self.model, compiled, self.jpeg, "cpu").top1
        return compiled, evaluate(compiled, self.test, "cpu"), agreed


@pytest.fixture(scope="module")
def resnet20(data_root: Path) -> TrainedResNet20:
    return TrainedResNet20(data_root)


@pytest.mark.slow
class TestResNet20:
    def test_the_dense_model_is_what_it_is_said_to_be(self, resnet20):
        assert sum(len(labels) for _, labels in resnet20.test) == TEST_IMAGES
        assert evaluate(resnet20.model, resnet20.test, "cpu") == pytest.approx(91.73, abs=0.01)

    @pytest.mark.parametrize(
        ("method", "accuracy", "agreed"),
        [("magnitude", 70.0, 55.0), ("sparsegpt", 89.0, 82.0), ("exact_obs", 91.0, 89.0), ("admm", 91.5, 92.0)],
    )
    def test_accuracy_and_agreement(self, resnet20, method, accuracy, agreed):
        compiled, found_accuracy, found_agreement = resnet20.scores(method)
        print(f"{method}: {found_accuracy:.2f}% {found_agreement:.2f}% {compiled.report.seconds:.1f} s")
        assert found_accuracy >= accuracy
        assert found_agreement >= agreed
        verify(compiled)
        for layer in compiled.report.layers:
            if layer.name == "conv1":
                assert layer.status in ("kept", "reconstructed")
            else:
                assert layer.status == "pruned"
                assert fxprune.Pattern.parse("2:4").check(compiled.get_submodule(layer.name).weight).ok

    def test_every_step_of_the_method_pays(self, resnet20):
        found = [resnet20.scores(method)[2] for method in ("magnitude", "sparsegpt", "admm")]
        assert found == sorted(found)
        assert found[0] < 65

    def test_sparsegpt_takes_less_than_a_minute(self, resnet20):
        assert resnet20.scores("sparsegpt")[0].report.seconds < 60


NETWORKS = {
    "resnet18": (torchvision.models.resnet18, 32, 21),
    "vgg11_bn": (torchvision.models.vgg11_bn, 32, 11),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 32, 53),
    "densenet121": (torchvision.models.densenet121, 64, 121),
    "googlenet": (functools.partial(torchvision.models.googlenet, aux_logits=False, init_weights=False), 64, 58),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["magnitude", "admm"])
@pytest.mark.parametrize("name", NETWORKS)
def test_torchvision_networks(name, method):
    build, size, layers = NETWORKS[name]
    torch.manual_seed(0)
    model = build(weights=None, num_classes=10).train()
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, size, size)
    compiled = fxprune.compile(model, [x], "2:4", method=method, progress=False)
    verify(compiled)
    assert len(compiled.report.layers) == layers
    for layer in compiled.report.layers:
        weight = compiled.get_submodule(layer.name).weight
        if layer.status == "pruned":
            assert fxprune.Pattern.parse("2:4").check(weight).ok
        else:
            assert "3 input channels" in layer.reason or "depthwise" in layer.reason
    assert compiled.report.sparsity > 0.45
    assert compiled(x).shape == (2, 10)
    assert torch.isfinite(compiled(x)).all()
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert model.training


def test_a_small_torchvision_network():
    """The shape of the slow test above, quickly: torchvision's residual block with its `out += identity`."""
    block = torchvision.models.resnet.BasicBlock
    down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), block(8, 8), block(8, 16, 2, down)).eval()
    x = torch.randn(8, 3, 12, 12)
    compiled = fxprune.compile(model, [x], progress=False)
    dense: Tensor = model(x)
    assert [layer.status for layer in compiled.report.layers] == ["reconstructed"] + ["pruned"] * 5
    assert (compiled(x) - dense).norm() < 0.5 * dense.norm()
