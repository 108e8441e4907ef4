from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fxprune.data import load_data, load_npz
from fxprune.errors import DataError

GREY = {"mean": (0.5,), "std": (0.25,)}
COLOUR = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
RNG_SEED = 7


def arrays(shape: tuple[int, ...] = (6, 5, 5, 3), labels: tuple[int, ...] = (6,)) -> dict:
    rng = np.random.default_rng(RNG_SEED)
    return {
        "train_images": rng.integers(0, 256, shape, dtype=np.uint8),
        "train_labels": rng.integers(0, 4, labels, dtype=np.uint8),
        "test_images": rng.integers(0, 256, (3, *shape[1:]), dtype=np.uint8),
        "test_labels": np.arange(3, dtype=np.int64).reshape(3, *labels[1:]),
    }


def jpegs(count: int, size: tuple[int, int] = (8, 6), mode: str = "RGB") -> dict:
    """`count` smooth images as a row of JPEG files, every file of another length."""
    files = []
    for i in range(count):
        rows, columns = np.mgrid[: size[1], : size[0]]
        planes = [(20 * i + 9 * rows + 5 * columns + 30 * c) % 200 for c in range(3)]
        pixels = np.stack(planes, -1).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels if mode == "RGB" else pixels[..., 0]).save(buffer, "JPEG", quality=70 + 5 * i)
        files.append(buffer.getvalue())
    offsets = np.cumsum([0] + [len(file) for file in files])
    row = np.frombuffer(b"".join(files), dtype=np.uint8)
    return {"jpeg": row, "offsets": offsets, "labels": np.arange(count, dtype=np.uint8) % 3}


def decoded(data: dict, index: int) -> np.ndarray:
    file = data["jpeg"][data["offsets"][index] : data["offsets"][index + 1]].tobytes()
    return np.asarray(Image.open(io.BytesIO(file)))


@pytest.mark.parametrize("labels", [(6,), (6, 1)])
def test_colour_file_in_medmnists_layout(tmp_path, labels):
    data = arrays(labels=labels)
    np.savez_compressed(tmp_path / "d.npz", **data)
    splits = load_data(tmp_path / "d.npz", **COLOUR)
    assert splits.info.input_shape == (3, 5, 5)
    assert splits.info.num_classes == 4
    assert splits.info.name == str(tmp_path / "d.npz")
    assert splits.val is None
    assert torch.equal(splits.train.images, torch.from_numpy(data["train_images"]).permute(0, 3, 1, 2))
    assert splits.train.labels.tolist() == data["train_labels"].ravel().tolist()
    assert splits.test[2][1] == 2


@pytest.mark.parametrize("shape", [(6, 5, 7), (6, 5, 7, 1)])
def test_grey_file(tmp_path, shape):
    data = arrays(shape)
    np.savez(tmp_path / "d.npz", **data)
    splits = load_data(str(tmp_path / "d.npz"), **GREY)
    assert splits.info.input_shape == (1, 5, 7)
    assert torch.equal(splits.test.images[:, 0], torch.from_numpy(data["test_images"].reshape(3, 5, 7)))
    assert load_data(tmp_path / "d.npz", **COLOUR).info.input_shape == (3, 5, 7)


def test_validation_split_is_kept(tmp_path):
    data = arrays()
    np.savez(tmp_path / "d.npz", **data, val_images=data["test_images"][:2], val_labels=[7, 0])
    splits = load_data(tmp_path / "d.npz", **COLOUR)
    assert splits.val.labels.tolist() == [7, 0]
    assert splits.info.num_classes == 8


def test_one_split_alone(tmp_path):
    data = arrays()
    np.savez(tmp_path / "d.npz", train_images=data["train_images"], train_labels=data["train_labels"])
    dataset = load_npz(tmp_path / "d.npz", "train", first=4, image_size=10, **COLOUR)
    assert len(dataset) == 4
    assert dataset[0][0].shape == (3, 10, 10)
    with pytest.raises(DataError, match=r"lacks test_images, test_labels; it holds train_images"):
        load_data(tmp_path / "d.npz", **COLOUR)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train_images": np.full((6, 5, 5, 3), 200, np.float32)},
            r"train_images .*float32 \(6, 5, 5, 3\) .* as uint8",
        ),
        ({"train_images": np.full((6, 5, 5, 3), np.nan)}, "holds NaN"),
        ({"train_images": np.full((6, 5, 5, 3), 256)}, r"values from 256 to 256; whole numbers must be in 0..255"),
        ({"train_images": np.zeros((6, 5, 5, 3), bool)}, "bool .* bytes"),
        ({"train_images": np.zeros((6, 4, 5, 5), np.uint8)}, r"\(6, 4, 5, 5\)"),
        ({"train_images": np.zeros((6, 5), np.uint8)}, r"\(6, 5\)"),
        ({"train_images": np.zeros((5, 5, 5, 3), np.uint8)}, "5 train images but 6 labels"),
        ({"train_labels": np.zeros((6, 14), np.uint8)}, r"labels are uint8 \(6, 14\)"),
        ({"train_labels": np.zeros(6, np.float64)}, "labels are float64"),
        ({"train_labels": np.full(6, -1)}, "smallest label is -1"),
        ({"train_labels": np.array([None] * 6)}, "allow_pickle"),
        (
            {"test_images": np.zeros((3, 4, 4, 3), np.uint8)},
            r"train images are \(3, 5, 5\), test images \(3, 4",
        ),
        (
            {"test_images": np.zeros((0, 5, 5, 3), np.uint8), "test_labels": np.zeros(0, int)},
            "no images for test",
        ),
    ],
)
def test_malformed_file(tmp_path, change, message):
    np.savez(tmp_path / "d.npz", **(arrays() | change))
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / "d.npz", **COLOUR)


def test_colour_images_do_not_take_grey_figures(tmp_path):
    np.savez(tmp_path / "d.npz", **arrays())
    with pytest.raises(DataError, match=r"images of 3 channel\(s\) but mean and std have 1"):
        load_data(tmp_path / "d.npz", **GREY)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04nonsense"])
def test_unreadable_file(tmp_path, content):
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError, match="not a readable"):
        load_data(tmp_path / "d.npz", **COLOUR)


def test_single_array_and_absent_file(tmp_path):
    with (tmp_path / "d.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="single array"):
        load_data(tmp_path / "d.npz", **COLOUR)
    with pytest.raises(DataError, match="no data file"):
        load_data(tmp_path / "none.npz", **COLOUR)


@pytest.mark.parametrize("which", ["x_train.npz", "x_test.npz"])
def test_jpeg_pair_by_either_name(tmp_path, which):
    train, test = jpegs(5), jpegs(3)
    np.savez(tmp_path / "x_train.npz", **train)
    np.savez(tmp_path / "x_test.npz", **test)
    splits = load_data(tmp_path / which, **COLOUR)
    assert (len(splits.train), len(splits.test)) == (5, 3)
    assert splits.info.input_shape == (3, 6, 8)
    for i in range(5):
        assert torch.equal(splits.train.images[i], torch.tensor(decoded(train, i)).permute(2, 0, 1))
    assert splits.train.labels.tolist() == [0, 1, 2, 0, 1]


def test_one_jpeg_file_alone_and_its_first_images(tmp_path):
    data = jpegs(5)
    data["jpeg"] = data["jpeg"].copy()
    data["jpeg"][data["offsets"][3] :] = 0  # what comes after the first three is not decoded
    np.savez(tmp_path / "x_test.npz", **data)
    with pytest.raises(DataError, match=r"\*_train\.npz and \*_test\.npz.*load_npz"):
        load_data(tmp_path / "x_test.npz", **COLOUR)
    dataset = load_npz(tmp_path / "x_test.npz", first=3, **COLOUR)
    assert dataset.labels.tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="image 3 cannot be decoded"):
        load_npz(tmp_path / "x_test.npz", **COLOUR)
    with pytest.raises(DataError, match="first is 0"):
        load_npz(tmp_path / "x_test.npz", first=0, **COLOUR)


def test_grey_jpegs_have_one_channel(tmp_path):
    np.savez(tmp_path / "x.npz", **jpegs(2, mode="L"))
    assert load_npz(tmp_path / "x.npz", **GREY).images.shape == (2, 1, 6, 8)


def test_jpegs_of_unequal_size(tmp_path):
    small, large = jpegs(1), jpegs(1, size=(9, 9))
    np.savez(
        tmp_path / "x.npz",
        jpeg=np.concatenate([small["jpeg"], large["jpeg"]]),
        offsets=[0, len(small["jpeg"]), len(small["jpeg"]) + len(large["jpeg"])],
        labels=[0, 1],
    )
    with pytest.raises(DataError, match=r"differ in shape, \(6, 8, 3\) and \(9, 9, 3\)"):
        load_npz(tmp_path / "x.npz", **COLOUR)


@pytest.mark.parametrize("offsets", [[0, 5], [0, 5, 4, 9], [1, 2, 3, 9], [0, 1, 2, 8]])
def test_wrong_offsets(tmp_path, offsets):
    np.savez(tmp_path / "x.npz", jpeg=np.zeros(9, np.uint8), offsets=offsets, labels=[0, 1, 2])
    with pytest.raises(DataError, match="offsets must rise from 0 to 9"):
        load_npz(tmp_path / "x.npz", **COLOUR)


def test_real_cifar_subset(data_root):
    splits = load_data(data_root / "cifar10" / "cifar10_subset.npz", **COLOUR)
    assert (len(splits.train), len(splits.test)) == (4660, 846)
    assert splits.info.input_shape == (3, 32, 32)
    assert splits.info.num_classes == 10
