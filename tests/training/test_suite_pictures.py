"""A suite's pictures as what a tokenizer is trained on."""

import pytest
import torch

from prunezoo import PruneZooError
from trainers.data.photographs import to_tensor
from trainers.data.suite import load_suite
from trainers.data.suite_pictures import SuitePictureDataModule, SuitePictures


def test_pictures_are_those_of_the_split_in_its_order():
    data = SuitePictureDataModule("scenes", size=96, batch_size=2, workers=0, train_items=4, validation_items=3)
    batches = list(data.val_dataloader())
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 96, 96), (1, 3, 96, 96)]
    held_out = load_suite("scenes", "validation", 3)
    assert torch.equal(torch.cat(batches), torch.stack([to_tensor(item.image) for item in held_out[:]]))
    assert len(data.train_set) == 4 and data.train_set.suite.split == "train"


def test_a_training_batch_has_each_picture_once():
    data = SuitePictureDataModule("scenes", size=32, batch_size=4, workers=0, train_items=4)
    batch = next(iter(data.train_dataloader()))
    own = torch.stack([data.train_set[i] for i in range(4)])
    assert batch.shape == (4, 3, 32, 32)
    places = [[bool(torch.equal(row, other)) for other in own] for row in batch]
    assert [sum(row) for row in places] == [1] * 4 == [sum(column) for column in zip(*places, strict=True)]


def test_a_picture_is_cut_to_its_square_and_scaled():
    suite = load_suite("scenes", "train", 1)
    small = SuitePictures(suite, 48)[0]
    assert small.shape == (3, 48, 48) and 0 <= float(small.min()) < float(small.max()) <= 1
    assert abs(float(small.mean()) - float(SuitePictures(suite, 96)[0].mean())) < 0.01


@pytest.mark.parametrize("wrong", [{"size": 0}, {"batch_size": 0}, {"workers": -1}])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(PruneZooError, match=next(iter(wrong))):
        SuitePictureDataModule(**{"suite": "scenes", "size": 96, **wrong})


def test_an_unknown_suite_is_refused():
    with pytest.raises(PruneZooError, match="suite 'scene' is unknown"):
        SuitePictureDataModule("scene", size=96)
