"""What the layer stage refuses, since it would fail without a word; and a call that failed leaves nothing behind."""

import copy

import pytest
import torch
from layer_pruners import RAGGED, Ranked, scripted
from tiny_llava import NONE, make_llava

from prunezoo import PruneZooError, attach


def test_what_would_fail_silently_is_refused(deep_llava, mixed):
    vlm, pruner = deep_llava.vlm, scripted(1, 3)
    bare = vlm(**mixed).logits
    options = {"max_new_tokens": 2, "return_dict_in_generate": True}
    with attach(vlm, pruner, keep=RAGGED):
        with pytest.raises(PruneZooError, match="static one cannot be"):
            vlm.generate(**mixed, **options, cache_implementation="static")
        with pytest.raises(PruneZooError, match="leave prefill_chunk_size unset"):
            vlm.generate(**mixed, **options, prefill_chunk_size=16)
        out = vlm.generate(**mixed, **options)
        cache, last = out.past_key_values, out.sequences[:, -1:]
        mask = torch.cat([mixed["attention_mask"], torch.ones(4, 2).long()], 1)
        with pytest.raises(PruneZooError, match="images cannot be added to a filled cache"):
            vlm(**mixed, past_key_values=cache)
        with pytest.raises(PruneZooError, match="attention_mask of the whole conversation"):
            vlm(last, attention_mask=mask[:, -3:], past_key_values=cache)
        with pytest.raises(PruneZooError, match="pruned elsewhere"):
            vlm(last, attention_mask=mask, past_key_values=copy.deepcopy(cache))
        fewer = vlm.generate(**mixed, **options).past_key_values
        fewer.batch_select_indices(torch.tensor([0, 1]))
        with pytest.raises(PruneZooError, match="not as the pruner left it"):
            vlm(last[:2], attention_mask=mask[:2], past_key_values=fewer)
        cache.crop(-8)
        with pytest.raises(PruneZooError, match="cropped into its pruned prompt"):
            vlm(last, attention_mask=mask, past_key_values=cache)
    assert torch.equal(vlm(**mixed).logits, bare)


def test_a_failed_call_does_not_reach_into_the_next(deep_llava, mixed):
    vlm, text = deep_llava.vlm, deep_llava.batch([NONE], [[]])
    bare = vlm(**text).logits
    with attach(vlm, ["uniform", scripted(1)], keep=[9, 3]) as run:
        for options in ({"typo": 1}, {"cache_implementation": "static"}, {"logits_processor": [1]}):
            with pytest.raises((ValueError, AttributeError, PruneZooError)):
                vlm.generate(**mixed, **options)
            assert torch.equal(vlm(**text).logits, bare)
    assert run.stats.after == [3] * 4  # of the last, which failed behind the prompt


def test_models_and_stages_that_do_not_fit_are_refused(deep_llava):
    for layers, message in (
        ((), "configure layers that it has"),
        ((4,), r"layers \[4\], the decoder has 4"),
        ((2, 1), "ascending"),
        ((0, 0), "needs all image tokens in front of layer 1 .*: configure layers from 1 on"),
    ):
        with pytest.raises(PruneZooError, match=message):
            attach(deep_llava.vlm, scripted(*layers), keep=3)
    late = scripted(1, 3)
    late.needs = ("last_attention@2",)
    with pytest.raises(PruneZooError, match="'last_attention@2' in front of layer 1: that layer runs later"):
        attach(deep_llava.vlm, late, keep=3)
    with pytest.raises(PruneZooError, match=r"ranked \(prompt\), ranked \(prompt\)"):
        attach(deep_llava.vlm, [Ranked(), Ranked()], keep=[3, 3])
    with pytest.raises(PruneZooError, match="input, vision, prompt, layer in turn"):
        attach(deep_llava.vlm, [scripted(1), Ranked()], keep=[3, 3])
    with pytest.raises(PruneZooError, match="2 pruners need a list of 2 keeps, got 3"):
        attach(deep_llava.vlm, [Ranked(), scripted(1)], keep=3)
    flex = make_llava(num_hidden_layers=4)
    flex.config.text_config._attn_implementation = "flex_attention"
    with pytest.raises(PruneZooError, match="'flex_attention' cannot be cut"):
        attach(flex, scripted(1), keep=3)
