"""Many choices read at once equal each choice read by itself."""

import pytest
import torch
from tiny_llava import make_image

from prunezoo import encode, pruned_forward
from prunezoo.core.contract import PruneOutput
from prunezoo.core.plan import mask_to_index
from prunezoo.host.group import group_forward, repeat_samples, shared_prefix

LONG = "<s> USER: <image> what color is the ball left ? ASSISTANT: red </s>"
TWO = "<s> USER: <image> <image> what box ? ASSISTANT: 1 </s>"
NONE = "<s> USER: is the ball red ? ASSISTANT: no </s>"
DRAWS = 3


def labelled(tiny, side):
    images = [[make_image(0)], [make_image(1), make_image(2)], []]
    batch = tiny.batch([LONG, TWO, NONE], images, padding_side=side)
    labels = torch.full_like(batch["input_ids"], -100)
    for row in range(3):
        end = batch["attention_mask"][row].nonzero()[-2:, 0]
        labels[row, end] = batch["input_ids"][row, end]
    return {**batch, "labels": labels}


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_group_equals_its_members(side, tiny_llava):
    vlm = tiny_llava.vlm
    with torch.no_grad():
        encoded = encode(vlm, labelled(tiny_llava, side))
        assert shared_prefix(encoded) == (2 if side == "right" else 0)
        # Ragged: another number of tokens for each draw and each image.
        keep = torch.rand(DRAWS, 3, 36, generator=torch.Generator().manual_seed(0)) < torch.rand(DRAWS, 3, 1)
        keep[..., 0] = True
        group = group_forward(vlm, encoded, keep)
        answers = group.logits[:, :-1][group.labels[:, 1:] != -100].view(3, DRAWS, 2, -1)
        for draw in range(DRAWS):
            alone = pruned_forward(vlm, encoded, PruneOutput(*mask_to_index(keep[draw])))
            expected = alone.logits[:, :-1][alone.labels[:, 1:] != -100].view(3, 2, -1)
            torch.testing.assert_close(answers[:, draw], expected, rtol=0, atol=2e-5)
        assert (answers[0, 0] - answers[0, 1]).abs().max() > 1e-3


def test_keeping_everything_is_the_full_model(tiny_llava):
    vlm = tiny_llava.vlm
    with torch.no_grad():
        batch = labelled(tiny_llava, "right")
        encoded = encode(vlm, batch)
        group = group_forward(vlm, encoded, encoded.inputs.valid.expand(2, -1, -1))
        logits = vlm(**{k: v for k, v in batch.items() if k != "labels"}).logits.repeat_interleave(2, 0)
    torch.testing.assert_close(group.logits, logits, rtol=0, atol=2e-5)


def test_samples_are_repeated_with_their_images(tiny_llava):
    encoded = encode(tiny_llava.vlm, labelled(tiny_llava, "left"))
    many, source = repeat_samples(encoded, 2)
    assert many.sample.tolist() == [0, 1, 2, 2, 3, 3] and many.mask.shape[0] == 6
    assert (source % 3).tolist() == [0, 0, 1, 2, 1, 2]
    ids = many.batch["input_ids"][many.sample[:, None], many.slots]
    assert (ids == tiny_llava.vlm.config.image_token_id).all()
    assert torch.equal(many.inputs.features[4], encoded.inputs.features[1])
