from __future__ import annotations

import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from fxprune.data import ArrayDataset, calibration_loader, calibration_tensors
from fxprune.errors import DataError, DataWarning


def numbered(labels: list[int], **kwargs) -> ArrayDataset:
    """Image i is filled with the value i, so that a batch says which images are in it."""
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 8, 8)
    return ArrayDataset(images, torch.tensor(labels), (0.0,) * 3, (1 / 255,) * 3, **kwargs)


def drawn(dataset, *args, **kwargs) -> list[int]:
    return calibration_tensors(dataset, *args, **kwargs)[:, 0, 0, 0].round().int().tolist()


@pytest.mark.parametrize(
    ("counts", "images", "expected"),
    [
        ([30, 30, 30], 30, [10, 10, 10]),
        ([50, 4, 30], 30, [13, 4, 13]),
        ([50, 1, 2], 20, [17, 1, 2]),
        ([5, 5, 5], 15, [5, 5, 5]),
    ],
)
def test_classes_are_as_even_as_they_can_be(counts, images, expected):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    chosen = drawn(numbered(labels), images)
    assert len(set(chosen)) == images
    assert torch.tensor([labels[i] for i in chosen]).bincount().tolist() == expected


def test_a_remainder_differs_by_one_at_most():
    labels = [i % 3 for i in range(60)]
    counts = torch.tensor([labels[i] for i in drawn(numbered(labels), 20)]).bincount()
    assert sorted(counts.tolist()) == [6, 7, 7]


def test_the_choice_is_the_seeds_alone():
    dataset = numbered([i % 3 for i in range(60)])
    torch.manual_seed(1)
    first = drawn(dataset, 20)
    torch.manual_seed(2)
    assert drawn(dataset, 20) == first
    assert drawn(dataset, 20, seed=1) != first


def test_batches_mix_classes_and_cover_the_choice():
    dataset = numbered([i // 20 for i in range(60)])
    batches = list(calibration_loader(dataset, 30, batch_size=8))
    assert [len(images) for images, _ in batches] == [8, 8, 8, 6]
    assert all(len(labels.unique()) > 1 for _, labels in batches)
    assert torch.equal(torch.cat([images for images, _ in batches]), calibration_tensors(dataset, 30))
    again = list(calibration_loader(dataset, 30, batch_size=8))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))


def test_a_loader_gives_the_same_batches_each_time_it_is_read():
    loader = calibration_loader(numbered([0, 1] * 20, augment=True), 20, batch_size=7)
    first = torch.cat([images for images, _ in loader])
    assert torch.equal(torch.cat([images for images, _ in loader]), first)


def test_unbalanced_choice_draws_from_all_images():
    labels = [0] * 90 + [1] * 10
    chosen = drawn(numbered(labels), 40, balanced=False)
    assert len(set(chosen)) == 40
    assert sum(labels[i] for i in chosen) < 12


def test_no_seed_takes_the_first_images():
    dataset = numbered([i % 3 for i in range(20)])
    assert drawn(dataset, 7, seed=None, balanced=False) == list(range(7))
    with pytest.raises(DataError, match="balanced=False"):
        calibration_loader(dataset, 7, seed=None)


def test_augmentation_is_left_out():
    labels = [i % 3 for i in range(30)]
    plain = calibration_tensors(numbered(labels), 12)
    assert torch.equal(calibration_tensors(numbered(labels, augment=True), 12), plain)
    half = Subset(numbered(labels, augment=True), range(15))
    assert torch.equal(calibration_tensors(half, 12), calibration_tensors(Subset(numbered(labels), range(15)), 12))


def test_labels_of_a_subset_are_its_own():
    labels = [0] * 20 + [1] * 20
    chosen = drawn(Subset(numbered(labels), list(range(10, 40))), 20)
    assert min(chosen) >= 10
    assert sum(labels[i] for i in chosen) == 10


def test_data_set_without_labels():
    dataset = TensorDataset(torch.randn(10, 3, 4, 4), torch.arange(10))
    with pytest.raises(DataError, match=r"TensorDataset has neither .*balanced=False"):
        calibration_loader(dataset, 4)
    assert calibration_tensors(dataset, 4, balanced=False).shape == (4, 3, 4, 4)


def test_more_images_than_there_are():
    with pytest.warns(DataWarning, match="31 calibration images were asked for, the data set has 30; all of these"):
        loader = calibration_loader(numbered([0] * 30), 31)
    assert len(loader.dataset) == 30
    with pytest.raises(DataError, match="images is 0"):
        calibration_loader(numbered([0] * 30), 0)
