from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fxprune.errors import DataError, ModelError, OptionsError
from fxprune.experiments.checkpoints import save_checkpoint
from fxprune.experiments.tasks import Task, import_user_code, scoring_loader
from fxprune.models import create, model_info


@pytest.fixture
def npz(tmp_path: Path) -> str:
    arrays = {}
    for split, count in (("train", 8), ("test", 6)):
        arrays[f"{split}_images"] = np.random.default_rng(0).integers(0, 255, (count, 28, 28), np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 3
    np.savez(tmp_path / "data.npz", **arrays)
    return str(tmp_path / "data.npz")


def test_images_are_normalised_as_the_model_has_it(npz: str) -> None:
    assert Task("simple_cnn", npz).load_data().info.mean == (0.1307,)
    assert Task("resnet20", npz).load_data().info.input_shape == (3, 28, 28)
    assert Task("simple_cnn", npz, mean=(0.5,), std=(2.0,), image_size=14).load_data().info.input_shape == (1, 14, 14)
    with pytest.raises(DataError, match="mean= and std= are needed"):
        Task(None, npz).load_data()
    with pytest.raises(DataError, match="no data set is named"):
        Task("simple_cnn").load_data()


def test_a_model_with_other_channels_has_no_figures_of_its_own(npz: str) -> None:
    with pytest.raises(DataError, match="mean= and std= are needed"):
        Task("resnet20", npz, in_channels=1).load_data()
    task = Task("resnet20", npz, in_channels=1, mean=(0.5,), std=(1.0,))
    assert task.load_data().info.input_shape == (1, 28, 28)
    assert task.new_model(3).conv1.in_channels == 1


def test_the_output_is_as_wide_as_the_data_has_classes(npz: str) -> None:
    assert Task("simple_cnn", npz).new_model(3).fc2.out_features == 3
    assert Task("simple_cnn", npz, num_classes=7).new_model(3).fc2.out_features == 7


def test_weights_are_loaded_or_asked_for(npz: str, tmp_path: Path) -> None:
    model = create("simple_cnn", num_classes=3)
    save_checkpoint(tmp_path / "w.pt", model)
    loaded = Task("simple_cnn", npz, weights=str(tmp_path / "w.pt")).trained_model(3)
    assert torch.equal(loaded.fc2.weight, model.fc2.weight)
    assert not loaded.training
    with pytest.raises(ModelError, match="simple_cnn has no weights"):
        Task("simple_cnn", npz).trained_model(3)
    with pytest.raises(ModelError, match="exclude each other"):
        Task("resnet18", npz, weights="w.pt", pretrained=True).trained_model(3)
    with pytest.raises(ModelError, match="no model is named"):
        Task(None, npz).new_model(3)


def test_scoring_on_the_first_test_images(npz: str) -> None:
    splits = Task("simple_cnn", npz).load_data()
    images, labels = zip(*scoring_loader(splits, images=4, batch_size=3), strict=True)
    assert torch.cat(labels).tolist() == [0, 1, 2, 0]
    assert torch.equal(torch.cat(images)[0], splits.test[0][0])
    assert sum(len(y) for _, y in scoring_loader(splits, images=100)) == 6
    with pytest.raises(OptionsError, match="test_images is 0"):
        scoring_loader(splits, images=0)


CODE = """
from torch import nn
from fxprune.models import register


@register("{name}")
def make(num_classes: int = 2) -> nn.Module:
    return nn.Linear(1, num_classes)
"""


def test_user_code_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "by_path.py").write_text(CODE.format(name="by_path"))
    (tmp_path / "by_name.py").write_text(CODE.format(name="by_name"))
    monkeypatch.syspath_prepend(tmp_path)
    import_user_code([str(tmp_path / "by_path.py"), "by_name"])
    assert model_info("by_path").num_classes == model_info("by_name").num_classes == 1000
    (tmp_path / "broken.py").write_text("def")
    for name in (str(tmp_path / "absent.py"), "no_such_module", str(tmp_path / "broken.py")):
        with pytest.raises(ModelError, match="cannot import"):
            import_user_code([name])
