from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import CheckpointError
from fxprune.options import Options
from tests.fine_tuning.small_net import IMAGES, Net, randomized, zero_masks


class Block(nn.Module):
    """One layer (or two) with BatchNorm, then a readout."""

    def __init__(self, layer: nn.Module, norm: nn.Module, second: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.norm, self.second = layer, norm, second
        self.unused = nn.Linear(3, 3)
        self.readout = nn.Conv2d(8, 4, 1)
        self.same = self.readout

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.layer(x)))
        if self.second is not None:
            y = y + self.norm(self.second(x))
        return self.same(y)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "net": Net,
    "bias": lambda: Block(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)),
    "no factors, bias": lambda: Block(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, affine=False)),
    "no factors, no bias": lambda: Block(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False)),
    "transposed": lambda: Block(nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)),
    "grouped": lambda: Block(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)),
    "shared norm": lambda: Block(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(4, 8, 3)),
}


def compiled_of(model: nn.Module, **options: object) -> fxprune.CompiledModule:
    images = torch.randn(64, *IMAGES).split(32)
    return fxprune.compile(model, images, device="cpu", progress=False, options=Options(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("instance", ["the dense model", "a new one"])
def test_the_class_computes_what_the_compiled_model_does(name: str, instance: str) -> None:
    model = randomized(BLOCKS[name]())
    compiled = compiled_of(model)
    assert any(change.action == "folded" for change in fxprune.passes.changes(compiled))
    again = copy.deepcopy(model) if instance == "the dense model" else BLOCKS[name]()
    before = copy.deepcopy(again.state_dict())
    state = fxprune.state_dict_for(compiled, again)
    assert all(torch.equal(tensor, before[key]) for key, tensor in again.state_dict().items())
    again.load_state_dict(state)
    again.eval()
    x = torch.randn(8, *IMAGES)
    torch.testing.assert_close(again(x), compiled(x), rtol=1e-4, atol=1e-5)
    assert (again(x) - model(x)).abs().max() > 1e-3
    kept = zero_masks(compiled)
    assert {key for key in zero_masks(again) if not key.startswith("same")} >= set(kept)
    assert all(torch.equal(zero_masks(again)[key], mask) for key, mask in kept.items())


@pytest.mark.slow
def test_it_trains_on_as_the_dense_model_could(data_root: Path) -> None:
    from fxprune.data import load_npz
    from fxprune.experiments.checkpoints import load_weights

    cifar = data_root / "cifar10"
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images, labels = load_npz(cifar / "cifar10_subset.npz", "train", first=512, mean=mean, std=std)[:]
    dense = load_weights(fxprune.models.create("resnet20"), cifar / "resnet20-12fca82f.th").eval()
    compiled = fxprune.compile(dense, images.split(128), method="sparsegpt", device="cpu", progress=False,
                               options=Options(permute=True))  # fmt: skip
    assert any(change.action == "permuted" for change in fxprune.passes.changes(compiled))
    again = copy.deepcopy(dense)
    again.load_state_dict(fxprune.state_dict_for(compiled, dense))
    with torch.no_grad():
        torch.testing.assert_close(again(images[:64]), compiled(images[:64]), rtol=1e-3, atol=1e-3)
        accuracy = (again.train()(images).argmax(1) == labels).double().mean()
    assert (
        accuracy > 0.85
    )  # from the batch's own statistics, which are right if factors and shifts are those of the channels


def test_channels_that_batchnorm_multiplies_by_zero() -> None:
    model = randomized(Net())
    model.bn1.weight.data[2:4] = 0
    compiled = compiled_of(model)
    compiled.get_submodule("conv1").weight.data[2] += 0.5  # trained on, a channel comes alive
    fxprune.restore_zeros(compiled)
    again = copy.deepcopy(model)
    again.load_state_dict(fxprune.state_dict_for(compiled, model))
    x = torch.randn(8, *IMAGES)
    torch.testing.assert_close(again(x), compiled(x), rtol=1e-4, atol=1e-5)


def test_a_file_is_enough(tmp_path: Path) -> None:
    compiled = compiled_of(randomized(Net()))
    fxprune.save(compiled, tmp_path / "model.pt")
    again = Net().eval()
    again.load_state_dict(fxprune.state_dict_for(fxprune.load(tmp_path / "model.pt"), again))
    x = torch.randn(8, *IMAGES)
    torch.testing.assert_close(again(x), compiled(x), rtol=1e-4, atol=1e-5)


def test_models_compiled_without_folding() -> None:
    model, x = randomized(Net()), torch.randn(8, *IMAGES)
    plain = compiled_of(model, fold_batchnorm=False, bias_correction=False)
    again = Net().eval()
    again.load_state_dict(plain.state_dict())
    torch.testing.assert_close(again(x), plain(x))
    biased = compiled_of(model, fold_batchnorm=False)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*conv1\.bias"):
        again.load_state_dict(biased.state_dict())
    again.load_state_dict(fxprune.state_dict_for(biased, again))
    torch.testing.assert_close(again(x), biased(x), rtol=1e-4, atol=1e-5)


def test_what_the_class_cannot_hold() -> None:
    model = randomized(Net())
    images = torch.randn(64, *IMAGES).split(32)
    factored = fxprune.low_rank(model, images, "ratio:0.6", device="cpu", progress=False)
    with pytest.raises(CheckpointError, match=r"'conv1', .*low_rank makes two layers of one.*fxprune\.save"):
        fxprune.state_dict_for(factored, model)
    bare = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False))
    with pytest.raises(CheckpointError, match=r"compiling gave layer '2' a bias, and Sequential's has none.*bias=True"):
        fxprune.state_dict_for(compiled_of(bare), bare)
    fxprune.state_dict_for(compiled_of(bare, bias_correction=False), bare)
    with pytest.raises(
        CheckpointError, match=r"nothing for 'bn1\.weight' of Net.*compile the original model in one go"
    ):
        fxprune.state_dict_for(compiled_of(compiled_of(model)), model)
    with pytest.raises(CheckpointError, match=r"has no place for 'conv1\.weight'.*instance of the class"):
        fxprune.state_dict_for(compiled_of(model, fold_batchnorm=False, bias_correction=False), nn.Sequential())
    wider = Net()
    wider.fc = nn.Linear(8, 5)
    with pytest.raises(CheckpointError, match=r"'fc\.weight' is \(4, 8\) in the compiled model and \(5, 8\) in Net"):
        fxprune.state_dict_for(compiled_of(model), wider)
