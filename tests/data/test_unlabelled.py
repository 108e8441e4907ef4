from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fxprune.data import calibration_loader, calibration_split, load_data
from fxprune.errors import DataError, DataWarning

COLOUR = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 7, 3), np.uint8)


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (12, 9)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 4), np.uint8)
    Image.fromarray(pixels, "RGBA").convert(mode).save(path)


def normalised(pixels: np.ndarray) -> torch.Tensor:
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (images - torch.tensor(COLOUR["mean"])[:, None, None]) / torch.tensor(COLOUR["std"])[:, None, None]


def test_a_flat_folder_of_pictures_of_all_kinds(tmp_path: Path) -> None:
    for name, mode in (
        ("a.jpg", "RGB"),
        ("b.png", "RGBA"),
        ("c.png", "L"),
        ("d.png", "LA"),
        ("e.gif", "P"),
        ("deep/f.BMP", "RGB"),
    ):
        picture(tmp_path / name, mode)
    picture(tmp_path / "long.png", size=(90, 5))
    picture(tmp_path / "one.png", size=(1, 1))
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(tmp_path / "sixteen.png")
    (tmp_path / ".DS_Store").write_text("x")
    (tmp_path / "._a.jpg").write_text("x")
    (tmp_path / "labels.txt").write_text("x")
    splits = load_data(tmp_path, image_size=8, labelled=False, mean=(0, 0, 0), std=(1, 1, 1))
    assert (splits.labelled, splits.test, splits.info.num_classes, len(splits.train)) == (False, None, 0, 9)
    batches = list(calibration_loader(splits.train, 9, 4, balanced=False))
    assert [batch.shape for batch in batches] == [(4, 3, 8, 8), (4, 3, 8, 8), (1, 3, 8, 8)]
    sixteen = splits.train[[file.name for file in splits.train.files].index("sixteen.png")]
    assert torch.allclose(sixteen, torch.full_like(sixteen, (40_000 // 256) / 255))


def test_pictures_may_be_shown_to_a_grey_model(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    assert load_data(tmp_path, image_size=8, mean=(0.5,), std=(1,), labelled=False).train[0].shape == (1, 8, 8)


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n broken", "half"])
def test_a_broken_picture_is_named(tmp_path: Path, content: bytes | str) -> None:
    picture(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "train" / "bad.png").parent.mkdir()
    (tmp_path / "train" / "bad.png").write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    data = load_data(tmp_path, image_size=8, **COLOUR, labelled=False).train
    with pytest.raises(DataError, match=r"bad\.png cannot be read"):
        data[0]


def test_a_folder_without_pictures_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no pictures in the folder .* holds notes\.txt"):
        load_data(tmp_path, image_size=8, **COLOUR, labelled=False)


def test_train_and_test_folders_without_classes(tmp_path: Path) -> None:
    for name in ("train/a.png", "train/b.png", "test/c.png"):
        picture(tmp_path / name)
    splits = load_data(tmp_path, image_size=8, **COLOUR, labelled=False)
    assert (len(splits.train), len(splits.test), splits.labelled) == (2, 1, False)


def test_labels_that_are_there_are_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            picture(tmp_path / split / name / "a.png")
    assert load_data(tmp_path, image_size=8, **COLOUR, labelled=False).info.num_classes == 2


@pytest.mark.parametrize(
    "array",
    [
        PIXELS,
        PIXELS.transpose(0, 3, 1, 2),
        PIXELS.astype(np.int64),
        PIXELS.astype(np.float32) / 255,
        PIXELS.transpose(0, 3, 1, 2).astype(np.float64) / 255,
        np.asfortranarray(PIXELS),
    ],
    ids=["bytes", "NCHW", "int64", "float", "NCHW float64", "another memory order"],
)
@pytest.mark.parametrize("form", ["npy", "images", "arr_0", "train_images"])
def test_arrays_of_any_layout_give_the_same_images(tmp_path: Path, array: np.ndarray, form: str) -> None:
    path = tmp_path / ("d.npy" if form == "npy" else "d.npz")
    if form == "npy":
        np.save(path, array)
    else:
        np.savez(path, **{form: array})
    splits = load_data(path, **COLOUR, labelled=False)
    assert (splits.info.input_shape, splits.labelled, splits.test) == ((3, 5, 7), False, None)
    torch.testing.assert_close(splits.train[:], normalised(PIXELS), atol=1e-5, rtol=1e-5)


def test_images_that_are_normalised_already_stay_as_they_are(tmp_path: Path) -> None:
    images = normalised(PIXELS).numpy()
    np.save(tmp_path / "d.npy", images)
    with pytest.warns(DataWarning, match="taken as normalised already"):
        data = load_data(tmp_path / "d.npy", labelled=False).train
    torch.testing.assert_close(data[:], torch.from_numpy(images))


def test_floats_in_0_to_255_are_refused_with_the_remedy(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", PIXELS.astype(np.float32))
    with pytest.raises(DataError, match=r"values from 0 to 255; .* write them as uint8"):
        load_data(tmp_path / "d.npy", **COLOUR, labelled=False)
    np.save(tmp_path / "d.npy", PIXELS.astype(np.float32).astype(np.uint8))
    assert len(load_data(tmp_path / "d.npy", **COLOUR, labelled=False).train) == 6


def test_an_archive_of_several_arrays_must_say_which_are_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", left=PIXELS, right=PIXELS)
    with pytest.raises(DataError, match="holds left, right; name one `images`"):
        load_data(tmp_path / "d.npz", **COLOUR, labelled=False)
    np.savez(tmp_path / "d.npz", images=PIXELS, depth=PIXELS, names=np.arange(6))
    assert len(load_data(tmp_path / "d.npz", **COLOUR, labelled=False).train) == 6


def test_without_labels_nothing_but_pruning_goes(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", PIXELS)
    with pytest.raises(DataError, match="images without labels"):
        load_data(tmp_path / "d.npy", **COLOUR)


def test_the_split_takes_every_image_once(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", PIXELS)
    data = load_data(tmp_path / "d.npy", **COLOUR, labelled=False).train
    chosen, others = calibration_split(data, 4, balanced=False)
    assert sorted([*chosen.indices, *others.indices]) == list(range(6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(calibration_split(data, 6, balanced=False)[1]) == 0
