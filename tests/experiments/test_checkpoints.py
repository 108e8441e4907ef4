from __future__ import annotations

import pickle
import sys

import pytest
import torch
from torch import nn

from fxprune import models
from fxprune.errors import CheckpointError, FxPruneError
from fxprune.experiments.checkpoints import Checkpoint, load_checkpoint, load_weights, save_checkpoint


class Net(nn.Sequential):
    def __init__(self, classes: int = 3) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(classes))
        self(torch.zeros(1, 3, 5, 5))


@pytest.fixture
def trained():
    torch.manual_seed(1)
    return Net()


@pytest.fixture
def fresh():
    torch.manual_seed(2)
    return Net()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert list(a.state_dict()) == list(b.state_dict())
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "best_prec1": 91.0},
        lambda s: {"model_state": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {}, "args": {"lr": 0.1}},
        lambda s: {"model_state_dict": s},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
        lambda s: {"model": {f"_orig_mod.module.{k}": v for k, v in s.items()}},
    ],
)
def test_every_common_shape_loads(tmp_path, trained, fresh, wrap):
    torch.save(wrap(trained.state_dict()), tmp_path / "w.pth")
    assert load_weights(fresh, tmp_path / "w.pth") is fresh
    assert_same(fresh, trained)


def test_a_child_that_is_called_module_keeps_its_name(tmp_path, trained, fresh):
    torch.save(nn.ModuleDict({"module": trained}).state_dict(), tmp_path / "w.pt")
    load_weights(nn.ModuleDict({"module": fresh}), str(tmp_path / "w.pt"))
    assert_same(fresh, trained)


def test_a_part_that_was_compiled_loads(tmp_path, trained, fresh):
    weights = {k.replace("0.", "0._orig_mod.", 1): v for k, v in trained.state_dict().items()}
    assert "0._orig_mod.weight" in weights
    torch.save(weights, tmp_path / "w.pt")
    load_weights(fresh, tmp_path / "w.pt")
    assert_same(fresh, trained)


def test_half_precision_weights_are_cast(tmp_path, trained, fresh):
    torch.save(
        {k: v.half() if v.is_floating_point() else v for k, v in trained.state_dict().items()},
        tmp_path / "w.pt",
    )
    load_weights(fresh, tmp_path / "w.pt")
    assert fresh[0].weight.dtype == torch.float32
    assert torch.equal(fresh[0].weight, trained[0].weight.half().float())


def test_missing_num_batches_tracked_is_allowed(tmp_path, trained, fresh):
    weights = {k: v for k, v in trained.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(weights) == len(trained.state_dict()) - 1
    torch.save(weights, tmp_path / "w.pt")
    load_weights(fresh, tmp_path / "w.pt")
    assert torch.equal(fresh[3].weight, trained[3].weight)


def test_mismatch_lists_missing_unexpected_and_misshapen_and_leaves_the_model(tmp_path, fresh):
    weights = Net(classes=5).state_dict()
    weights["head.bias"] = weights.pop("1.running_mean")
    torch.save(weights, tmp_path / "w.pt")
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(fresh, tmp_path / "w.pt")
    message = str(caught.value)
    assert "1 missing: 1.running_mean" in message
    assert "1 unexpected: head.bias" in message
    assert "2 wrongly shaped: 3.weight (5, 36) in the file, (3, 36) in the model" in message
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, before[name])


def test_long_lists_are_cut_and_counted(tmp_path, trained):
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"missing: conv1\.weight, .* and \d+ more") as caught:
        load_weights(models.create("resnet20"), tmp_path / "w.pt")
    assert str(caught.value).count("layer") < 10


def test_absent_file(tmp_path, fresh):
    with pytest.raises(CheckpointError, match="there is no file"):
        load_weights(fresh, tmp_path / "none.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"])
def test_damaged_file(tmp_path, fresh, content):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"w\.pt"):
        load_weights(fresh, tmp_path / "w.pt")


def test_cut_off_file(tmp_path, trained, fresh):
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"w\.pt"):
        load_weights(fresh, tmp_path / "w.pt")


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj, 2))])
def test_no_code_in_a_file_is_run(tmp_path, fresh, save):
    save({"state_dict": Touch(tmp_path / "ran")}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"Python objects|cannot be read"):
        load_weights(fresh, tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, {"state_dict": {}}, [torch.zeros(2)], torch.zeros(2)])
def test_file_without_weights(tmp_path, fresh, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="holds"):
        load_weights(fresh, tmp_path / "w.pt")


def test_safetensors(tmp_path, trained, fresh):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(trained.state_dict(), tmp_path / "w.safetensors")
    load_weights(fresh, tmp_path / "w.safetensors")
    assert_same(fresh, trained)
    (tmp_path / "w.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="safetensors file"):
        load_weights(fresh, tmp_path / "w.safetensors")


def test_safetensors_not_installed(tmp_path, fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "w.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not installed"):
        load_weights(fresh, tmp_path / "w.safetensors")


def test_checkpoint_round_trip_resumes_training(tmp_path, trained, fresh):
    def step(model, optimizer):
        model(torch.ones(2, 3, 5, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    optimizer = torch.optim.SGD(trained.parameters(), 0.01, momentum=0.9)
    step(trained, optimizer)
    path = tmp_path / "new" / "last.pt"
    save_checkpoint(path, trained, optimizer=optimizer, epoch=4, accuracy=90.5, extra={"seed": 0})
    resumed = torch.optim.SGD(fresh.parameters(), 0.5)
    found = load_checkpoint(path, fresh, resumed)
    assert found == Checkpoint(epoch=4, accuracy=90.5, extra={"seed": 0})
    step(trained, optimizer)
    step(fresh, resumed)
    assert_same(fresh, trained)


def test_checkpoint_without_optimizer_state_cannot_resume(tmp_path, trained, fresh):
    save_checkpoint(tmp_path / "w.pt", trained)
    assert load_checkpoint(tmp_path / "w.pt", fresh) == Checkpoint()
    with pytest.raises(CheckpointError, match="no optimizer state"):
        load_checkpoint(tmp_path / "w.pt", fresh, torch.optim.SGD(fresh.parameters(), 0.1))


def test_checkpoint_of_another_optimizer(tmp_path, trained, fresh):
    save_checkpoint(tmp_path / "w.pt", trained, optimizer=torch.optim.SGD(trained.parameters(), 0.1))
    with pytest.raises(CheckpointError, match="another optimizer"):
        load_checkpoint(tmp_path / "w.pt", fresh, torch.optim.SGD([fresh[0].weight], 0.1))


def test_interrupted_save_leaves_the_previous_file_and_no_litter(tmp_path, trained, fresh, monkeypatch):
    path = tmp_path / "best.pt"
    save_checkpoint(path, trained)

    def fail(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, fresh)
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]
    load_weights(fresh, path)
    assert_same(fresh, trained)


@pytest.mark.parametrize(("name", "file"), [("resnet20", "resnet20-12fca82f.th"), ("resnet56", "resnet56-4bfd9763.th")])
def test_public_cifar_weights_load(data_root, name, file):
    path = data_root / "cifar10" / file
    model = load_weights(models.create(name), path)
    stored = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    assert torch.equal(model.layer3[2].conv2.weight, stored["module.layer3.2.conv2.weight"])
    assert torch.equal(model.linear.bias, stored["module.linear.bias"])


def test_errors_share_the_base():
    assert issubclass(CheckpointError, FxPruneError)
