"""What every registered pruner promises of layers: of all tokens that may go, and of tokens that come back.

As in `test_contract.py` a new method is tested here the moment it is registered.
"""

from itertools import pairwise

import pytest
import torch
from layer_oracle import Watch, masked
from made_inputs import ALL, build
from return_oracle import away_by_layer, write
from tiny_llava import make_image

from prunezoo import attach, encode
from prunezoo.core.registry import pruner_class
from prunezoo.host import encode_needs, run_pruned

STEPS = 3
LAYER = [name for name in ALL if pruner_class(name).stage == "layer"]
RESTORING = [name for name in ALL if pruner_class(name).restore]
COMING_BACK = [name for name in LAYER if build(name).comes_back]
OPTIONS = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture
def several(deep_llava):
    """Two images, one, none; padded."""
    prompts = ["<s> <image> <image> what ? ASSISTANT:", "<s> <image> left ASSISTANT:", "<s> what is red ? ASSISTANT:"]
    return deep_llava.batch(prompts, [[make_image(0), make_image(1)], [make_image(2)], []])


def test_all_three_kinds_are_there():
    assert "withdraw" in LAYER and COMING_BACK and RESTORING


@pytest.mark.parametrize("name", [name for name in LAYER if name not in COMING_BACK])
def test_what_leaves_between_layers_leaves_the_cache_too(name, deep_llava, several):
    """Down to no token at all, where a method goes so far; decoding goes on as if nobody looked at what is gone."""
    vlm, pruner = deep_llava.vlm, build(name)
    with torch.no_grad():
        with Watch(pruner) as watch, attach(vlm, pruner, keep=5) as run:
            run.memory.streams = ("two", "one", "none")  # for who remembers
            out = vlm.generate(**several, **OPTIONS)
        gone, made = watch.gone(encode(vlm, several))
        with masked(vlm, gone, made):
            expected = vlm.generate(**several, **OPTIONS)
    for one, two in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-5)
    assert run.stats.after == [5, 5, 5] or not pruner.exact
    real = several["attention_mask"].bool()
    for layer, kept in enumerate(out.past_key_values.layers):
        away = gone[max((k for k in gone if k <= layer), default=min(gone))] & (layer >= min(gone))
        assert kept.get_seq_length() == (real & ~away).sum(1).max() + STEPS - 1


@pytest.mark.parametrize("name", COMING_BACK)
def test_what_comes_back_equals_layers_run_by_hand(name, deep_llava, several):
    vlm, pruner = deep_llava.vlm, build(name)
    with torch.no_grad():
        with Watch(pruner) as watch, attach(vlm, pruner, keep=5) as run:
            out = vlm.generate(**several, **OPTIONS)
        encoded = encode(vlm, several)
        away = away_by_layer(watch.calls, encoded)
        expected = write(vlm, encoded, away, pruner.comes_back, STEPS)
    for one, two in zip(out.logits, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-5)
    layers = sorted(away)
    assert any((away[one] & ~away[two]).any() for one, two in pairwise(layers))
    assert run.stats.after == [5, 5, 5] or not pruner.exact


@pytest.mark.parametrize("name", RESTORING)
def test_a_tower_that_restores_puts_out_every_patch(name, deep_llava, several):
    vlm, pruner = deep_llava.vlm, build(name)
    with torch.no_grad():
        encoded = encode(vlm, several, encode_needs(pruner))
        run, whole = run_pruned(vlm, encoded, pruner, 5), run_pruned(vlm, encoded, pruner, 1.0)
    assert run.tokens.tolist() == [36.0] * 3 and torch.equal(run.output.valid, encoded.inputs.valid)
    assert torch.equal(whole.output.features, encoded.inputs.features)
    assert (run.output.features - encoded.inputs.features).abs().max() > 1e-3
