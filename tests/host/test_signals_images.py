"""Signals whose softmax is over an image's own tokens alone, ``+images``, against the rows of eager maps."""

import pytest
import torch
from layer_oracle import Watch, masked
from layer_pruners import eager_copy, scripted
from tiny_llava import LONG, NONE, TWO, make_image

from prunezoo import PruneZooError, encode, full_forward
from prunezoo.core.signals import parse_signal
from prunezoo.host import encode_needs, run_pruned

KINDS = ("last_attention", "prompt_attention", "prompt_head_attention")


def shares(maps, words, slots):
    """(n, H): of each word and each head (H, L, L) by itself, what share of its look at the image a token has."""
    rows = maps[:, words][:, :, slots]
    return (rows / rows.sum(-1, keepdim=True)).mean(1).T


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_each_head_and_word_counts_alike_among_the_tokens_that_are_left(deep_llava, side):
    """In front of the second of two cuts, which left images of 5, 20 and 9 tokens: what is padded has no share."""
    images = [[make_image(0)], [make_image(5), make_image(6)], []]
    batch = deep_llava.batch([LONG, TWO, NONE], images, padding_side=side)
    pruner = scripted(2, 3)
    pruner.needs = tuple(f"{kind}+images" for kind in KINDS)
    with Watch(pruner) as watch:
        encoded = encode(deep_llava.vlm, batch, encode_needs(pruner))
        pruner.schedule = lambda keep, available, depth: [keep, (keep - 1).clamp_min(1)]
        run_pruned(deep_llava.vlm, encoded, pruner, torch.tensor([5, 20, 9]))
    inputs, gone = watch.calls[1][0], watch.gone(encoded)[0]
    assert inputs.valid.sum(1).tolist() == [5, 20, 9]
    eager = eager_copy(deep_llava.vlm)
    with masked(eager, {2: gone[2]}):
        maps = full_forward(eager, encoded, output_attentions=True).attentions[3]
    for row, sample in enumerate(encoded.sample.tolist()):
        cells = inputs.cells[row][inputs.valid[row]]
        slots, columns = encoded.slots[row][cells[:, 1] * 6 + cells[:, 2]], torch.arange(maps.shape[-1])
        ids = encoded.batch["input_ids"][sample]
        words = encoded.mask[sample] & (ids != deep_llava.vlm.config.image_token_id) & (columns > slots.max())
        heads = shares(maps[sample], words, slots)
        last = shares(maps[sample], words & (columns == int(words.nonzero().max())), slots)
        for kind, expected in zip(KINDS, (last.mean(1), heads.mean(1), heads), strict=True):
            found = inputs.signal(f"{kind}+images")[row]
            torch.testing.assert_close(found[inputs.valid[row]], expected, rtol=1e-4, atol=1e-6)
            assert not found[~inputs.valid[row]].any()
        assert (heads.mean(1) - maps[sample][:, words][:, :, slots].mean((0, 1))).abs().max() > 1e-3


@torch.no_grad()
def test_heads_that_do_not_look_at_the_image_count_too(deep_llava, mixed):
    """Queries so large that float32 leaves an image nothing of the whole row; its keys are all zero, so all equal."""
    vlm = eager_copy(deep_llava.vlm)
    encoded = encode(vlm, mixed)
    entered = full_forward(vlm, encoded, output_hidden_states=True).hidden_states[0]
    entered[encoded.sample[:, None], encoded.slots] = 0
    block = vlm.get_decoder().layers[0]
    block.self_attn.q_proj.weight.mul_(1e6)
    block.register_forward_pre_hook(lambda _, args, kwargs: ((entered, *args[1:]), kwargs), with_kwargs=True)
    signals = encode(vlm, mixed, ("last_attention+images", "last_attention")).inputs.signals
    assert (signals["last_attention"].sum(1) == 0).any()
    torch.testing.assert_close(signals["last_attention+images"], torch.full((4, 36), 1 / 36))


def test_names():
    signal = parse_signal("last_attention@previous+norope+images")
    assert (signal.kind, signal.at, signal.rotary, signal.images) == ("last_attention", "previous", False, True)
    assert parse_signal("prompt_attention@2+images").rotary and not parse_signal("prompt_attention@2").images
    for name in ("self_attention+images", "cls_attention+images", "hidden_states@1+images", "relevance+images"):
        with pytest.raises(PruneZooError, match=r"\+images is for prompt_attention, prompt_head_attention, last_att"):
            parse_signal(name)
    with pytest.raises(PruneZooError, match="unknown signal"):
        parse_signal("last_attention+images+norope")
