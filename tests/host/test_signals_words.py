"""What is known of words beside an image: which stand behind it, which it is like, how far rotation turns them away."""

import pytest
import torch
from tiny_llava import LONG, NONE, TWO, make_image

from prunezoo import PruneZooError, encode
from prunezoo.core.signals import parse_signal
from prunezoo.host.families import find_family


@pytest.fixture(params=["left", "right"])
def batch(request, deep_llava):
    """One image, two with a word between them, none; padded."""
    images = [[make_image(0)], [make_image(5), make_image(6)], []]
    return deep_llava.batch([LONG, TWO.replace("<image> <image>", "<image> ball <image>"), NONE], images,
                            padding_side=request.param)  # fmt: skip


@torch.no_grad()
def test_words_behind_an_image_and_how_like_it_they_are(deep_llava, batch):
    encoded = encode(deep_llava.vlm, batch, ("word_behind", "word_match"))
    behind, match = (encoded.inputs.signal(name) for name in ("word_behind", "word_match"))
    embedded = deep_llava.vlm.get_input_embeddings()(encoded.batch["input_ids"])
    image = deep_llava.vlm.config.image_token_id
    for row, sample in enumerate(encoded.sample.tolist()):
        ids, real = encoded.batch["input_ids"][sample].tolist(), encoded.mask[sample].tolist()
        words = [column for column, shown in enumerate(real) if shown and ids[column] != image]
        later = [column for column in words if column > int(encoded.slots[row].max())]
        assert behind[row].tolist() == [float(c in later) for c in words] + [0.0] * (behind.shape[1] - len(words))
        tokens = encoded.inputs.features[row]
        likely = torch.stack([torch.softmax(embedded[sample, later] @ token, 0) for token in tokens]).mean(0)
        found = match[row][behind[row] > 0]
        torch.testing.assert_close(found, likely, rtol=1e-4, atol=1e-6)
        assert match[row].sum() == pytest.approx(1) and found.max() > 1.1 / len(later)
    assert behind[0].sum() < behind[0].numel() and behind[1].sum() > behind[2].sum() > 0


@torch.no_grad()
def test_rotation_is_what_a_query_of_ones_gives_a_key_of_ones(deep_llava, batch):
    encoded = encode(deep_llava.vlm, batch, ("word_rotation@1",))
    found = encoded.inputs.signal("word_rotation@1")
    decoder = find_family(deep_llava.vlm).decoder()
    width = decoder.layers[0].self_attn.head_dim
    length = encoded.mask.shape[1]
    positions = (encoded.mask.long().cumsum(1) - 1).clamp_min(0)
    cos, sin = decoder.rotary(torch.zeros(1), positions)
    ones = torch.ones(length, width)
    half = torch.cat([-ones[:, width // 2 :], ones[:, : width // 2]], -1)
    for row, sample in enumerate(encoded.sample.tolist()):
        turned = ones * cos[sample] + half * sin[sample]  # query and key alike
        columns, real = encoded.words[0][sample], encoded.words[1][sample]
        expected = turned[encoded.slots[row]] @ turned[columns[real]].T / width
        torch.testing.assert_close(found[row][:, real], expected, rtol=1e-4, atol=1e-4)
        assert not found[row][:, ~real].any() and expected.min() < 0.9


@torch.no_grad()
def test_a_batch_without_images_has_none(deep_llava):
    needs = ("word_behind", "word_match", "word_rotation")
    assert not encode(deep_llava.vlm, deep_llava.batch([NONE], [[]]), needs).inputs.signals


def test_rotation_without_rotation_is_refused():
    with pytest.raises(PruneZooError, match="'word_rotation\\+norope': \\+norope is for"):
        parse_signal("word_rotation+norope")
