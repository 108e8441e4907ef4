from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, random_split
from torchvision.transforms import v2

from fxprune.data.array_dataset import ArrayDataset, crop_and_mirror, make_loader
from fxprune.errors import DataError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def colour(count: int = 10, side: int = 8, **kwargs) -> ArrayDataset:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return ArrayDataset(images, torch.arange(count) % 3, MEAN, STD, **kwargs)


def test_one_image_is_normalised():
    dataset = colour()
    image, label = dataset[4]
    assert (image.shape, image.dtype, label) == ((3, 8, 8), torch.float32, 1)
    assert type(label) is int
    for channel in range(3):
        expected = (dataset.images[4, channel].double() / 255 - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(image[channel].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "index", [[3, 1, 7], torch.tensor([3, 1, 7]), [torch.tensor(3), torch.tensor(1), torch.tensor(7)]]
)
def test_a_batch_is_its_images(index):
    dataset = colour()
    images, labels = dataset[index]
    assert torch.equal(images, torch.stack([dataset[i][0] for i in (3, 1, 7)]))
    assert labels.tolist() == [0, 1, 1]


def test_slices_ranges_and_single_tensors():
    dataset = colour()
    assert torch.equal(dataset[2:5][0], dataset[[2, 3, 4]][0])
    assert torch.equal(dataset[range(2, 5)][0], dataset[[2, 3, 4]][0])
    assert dataset[torch.tensor(5)][1] == 2
    assert torch.equal(dataset[-1][0], dataset[9][0])
    with pytest.raises(IndexError):
        dataset[10]
    assert len(list(dataset)) == 10


def test_resize_is_torchvisions():
    dataset = colour(image_size=12)
    image, _ = dataset[0]
    resized = v2.functional.resize(dataset.images[0], [12, 12], antialias=True)
    assert torch.equal(image, v2.Normalize(MEAN, STD)(v2.functional.to_dtype(resized, torch.float32, scale=True)))


def test_grey_images_are_repeated_for_a_colour_model():
    images = torch.arange(2 * 16, dtype=torch.uint8).reshape(2, 1, 4, 4)
    image, _ = ArrayDataset(images, torch.zeros(2, dtype=torch.int64), MEAN, STD)[1]
    assert image.shape == (3, 4, 4)
    for channel in range(3):
        torch.testing.assert_close(image[channel] * STD[channel] + MEAN[channel], images[1, 0] / 255)


@pytest.mark.parametrize(
    ("images", "labels", "mean", "std", "message"),
    [
        (torch.zeros(2, 3, 4, 4).double(), torch.zeros(2), MEAN, STD, "uint8 or float32"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2), MEAN, STD, r"\(2, 4, 4\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3), MEAN, STD, "2 images but labels"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), (0.5,), (0.5,), r"3 channel\(s\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), MEAN, (0.5,), "3 mean and 1 std"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), MEAN, (0.5, 0.0, 1), "positive"),
    ],
)
def test_bad_arrays_are_refused(images, labels, mean, std, message):
    with pytest.raises(DataError, match=message):
        ArrayDataset(images, labels, mean, std)


def test_crop_and_mirror_gives_one_of_the_possible_views_of_each_image():
    images = torch.randint(1, 256, (64, 3, 5, 6), dtype=torch.uint8)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for before, frame, after in zip(images, padded, crop_and_mirror(images, 2), strict=True):
        views = {
            (top, left, mirror): frame[:, top : top + 5, left : left + 6].flip(2 if mirror else ())
            for top in range(5)
            for left in range(5)
            for mirror in (False, True)
        }
        matches = [view for view, image in views.items() if torch.equal(image, after)]
        assert len(matches) == 1
        assert torch.equal(views[2, 2, False], before)
        seen.add(matches[0])
    assert {mirror for *_, mirror in seen} == {False, True}
    assert {top for top, *_ in seen} == {left for _, left, _ in seen} == set(range(5))


def test_augmentation_follows_the_seed_and_can_be_left_out():
    dataset = colour(side=16, augment=True)
    torch.manual_seed(5)
    first = dataset[[0, 1, 2]][0]
    torch.manual_seed(5)
    assert torch.equal(dataset[[0, 1, 2]][0], first)
    assert not torch.equal(dataset[[0, 1, 2]][0], first)
    assert torch.equal(dataset.plain()[3][0], colour(side=16)[3][0])


def test_loader_gives_every_image_once_in_order():
    dataset = colour()
    batches = list(make_loader(dataset, batch_size=4))
    assert [len(images) for images, _ in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([images for images, _ in batches]), dataset[:][0])
    assert torch.equal(torch.cat([labels for _, labels in batches]), dataset.labels)


def test_loader_asks_for_whole_batches(monkeypatch):
    asked = []
    real = ArrayDataset.__getitem__
    monkeypatch.setattr(ArrayDataset, "__getitem__", lambda self, index: asked.append(index) or real(self, index))
    list(make_loader(Subset(colour(), [9, 8, 7, 6]), batch_size=3))
    assert asked == [[9, 8, 7], [6]]


def test_loader_agrees_with_torchs_own():
    dataset = random_split(colour(), [6, 4], torch.Generator().manual_seed(0))[0]
    for (a, la), (b, lb) in zip(make_loader(dataset, batch_size=4), DataLoader(dataset, 4), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(la, lb)


def test_shuffled_loader_follows_its_seed_and_changes_by_epoch():
    dataset = colour(count=30)
    loader = make_loader(dataset, batch_size=30, shuffle=True, seed=1)
    first, second = next(iter(loader))[0], next(iter(loader))[0]
    assert not torch.equal(first, second)
    assert torch.equal(first, next(iter(make_loader(dataset, batch_size=30, shuffle=True, seed=1)))[0])
    assert torch.equal(first.sum((1, 2, 3)).sort()[0], second.sum((1, 2, 3)).sort()[0])


def test_loader_of_another_data_set_goes_through_torch():
    class Pairs(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return torch.full((1, 2, 2), float(index)), index

    images, labels = next(iter(make_loader(Pairs(), batch_size=3)))
    assert images.shape == (3, 1, 2, 2)
    assert labels.tolist() == [0, 1, 2]


def test_loader_refuses_nothing_to_do():
    with pytest.raises(DataError, match="batch_size is 0"):
        make_loader(colour(), batch_size=0)
    with pytest.raises(DataError, match="empty"):
        make_loader(colour(count=0))
