"""What is taken of a loader's batches."""

from __future__ import annotations

import pytest
import torch

from fxprune.calibration.batches import first_images


def test_so_many_images_are_taken_and_the_rest_is_not_read():
    x, read = torch.randn(20, 3, 4, 4), []

    def loader():
        for batch in x.split(8):
            read.append(len(batch))
            yield batch

    assert torch.equal(torch.cat(list(first_images(loader(), 12))), x[:12])
    assert read == [8, 8]
    assert torch.equal(torch.cat(list(first_images(loader(), 16))), x[:16])
    assert torch.equal(torch.cat(list(first_images(loader(), 50))), x)


def test_all_that_has_one_entry_for_each_image_is_cut_in_batches_of_every_kind():
    x, labels, scale = torch.randn(8, 3), torch.arange(8), torch.tensor(2.0)
    (pair,) = first_images([(x, labels)], 5)
    assert torch.equal(pair[0], x[:5])
    assert torch.equal(pair[1], labels[:5])
    (named,) = first_images([{"image": x, "scale": scale, "weights": torch.ones(3), "id": "a"}], 5)
    assert torch.equal(named["image"], x[:5])
    assert (named["scale"], named["id"], len(named["weights"])) == (scale, "a", 3)


@pytest.mark.parametrize("images", [8, 9])
def test_a_batch_that_is_wanted_whole_is_handed_on_as_it_is(images):
    batch = torch.randn(8, 3)
    (taken,) = first_images([batch], images)
    assert taken is batch
