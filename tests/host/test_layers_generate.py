"""Generating with the layer stage: decoding on caches of unequal length, in every way, against whole masked caches."""

import pytest
import torch
from layer_oracle import Watch, masked
from layer_pruners import RAGGED, Scripted, close, eager_copy, scripted
from tiny_llava import LONG, make_image, make_llava

from prunezoo import attach, encode

STEPS = 6
GENERATE = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, two returned": {"num_beams": 3, "num_return_sequences": 2},
    "eager": {},
    "no cache": {"use_cache": False},
    "sampling, two returned": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("options", GENERATE.items(), ids=GENERATE)
@pytest.mark.parametrize("layers", [(1,), (1, 3)], ids=str)
def test_generating_equals_the_oracle(deep_llava, mixed, options, layers):
    """The ragged trap: rows that lost different numbers of tokens must be repaired at every later step."""
    name, options = options
    vlm = eager_copy(deep_llava.vlm) if name == "eager" else deep_llava.vlm
    pruner = scripted(*layers)
    torch.manual_seed(1)
    with Watch(pruner) as watch, attach(vlm, pruner, keep=RAGGED) as run:
        kept = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True, **options}
        out = vlm.generate(**mixed, **kept)
    watch.calls = watch.calls[: len(layers)]
    gone, _ = watch.gone(encode(vlm, mixed))
    with masked(vlm, gone):
        torch.manual_seed(1)
        expected = vlm.generate(**mixed, **kept)
    assert torch.equal(out.sequences, expected.sequences)
    for step, (one, two) in enumerate(zip(out.logits, expected.logits, strict=True)):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5, msg=lambda m, step=step: f"step {step}: {m}")
    assert run.stats.before == [36] * 4 and run.stats.after == [3, 20, 1, 36] and len(run.stats.tokens) == 4
    if name == "greedy":
        bare = vlm.generate(**mixed, **kept)
        assert (out.logits[0] - bare.logits[0])[:2].abs().max() > 1e-2
        lengths = [layer.get_seq_length() for layer in out.past_key_values.layers]
        real = mixed["attention_mask"].bool()
        for layer, length in enumerate(lengths):
            away = max((k for k in gone if k <= layer), default=None)
            width = real.shape[1] if away is None else int((real & ~gone[away]).sum(1).max())
            assert length == width + STEPS - 1


def test_keeping_everything_is_the_bare_model_bit_for_bit(deep_llava, mixed):
    vlm = deep_llava.vlm
    logits = vlm(**mixed).logits
    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}):
        bare = vlm.generate(**mixed, max_new_tokens=STEPS, **options)
        with attach(vlm, scripted(1, 2), keep=1.0) as run:
            assert torch.equal(vlm.generate(**mixed, max_new_tokens=STEPS, **options), bare)
            assert torch.equal(vlm(**mixed).logits, logits)
        assert run.stats.after == [36] * 8


def test_assisted_decoding_equals_greedy(deep_llava):
    batch = deep_llava.batch([LONG + " left left left"], [[make_image(0)]])
    assistant = make_llava(num_hidden_layers=4)
    assistant.load_state_dict(deep_llava.vlm.state_dict())
    assistant.lm_head.weight.data += 0.3 * torch.randn(assistant.lm_head.weight.shape)
    widths = []  # of each forward: a step with candidates has more than one column
    handle = deep_llava.vlm.model.register_forward_pre_hook(
        lambda *call: widths.append(call[2]["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        with attach(deep_llava.vlm, scripted(1, 3), keep=9) as run:
            greedy = deep_llava.vlm.generate(**batch, max_new_tokens=12)
            assert widths[1:] == [1] * 11
            for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
                widths.clear()
                assert torch.equal(deep_llava.vlm.generate(**batch, max_new_tokens=12, **options), greedy)
                # Candidates behind the prompt, and in a later step; more than were taken, so that caches were cropped.
                assert widths[0] > batch["input_ids"].shape[1] and max(widths[1:]) > 1
                assert sum(widths) > batch["input_ids"].shape[1] + 12
    finally:
        handle.remove()
    assert run.stats.after == [9, 9, 9]
    assert not torch.equal(deep_llava.vlm.generate(**batch, max_new_tokens=12), greedy)


def test_compact_positions_are_numbered_anew_behind_each_cut(deep_llava, mixed):
    vlm, pruner = deep_llava.vlm, scripted(1, 3)
    options = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad(), Watch(pruner) as watch:
        with attach(vlm, pruner, keep=RAGGED, positions="compact"):
            out = vlm.generate(**mixed, **options)
        gone = watch.gone(encode(vlm, mixed))[0]
        with masked(vlm, gone, compact=True):
            expected = vlm.generate(**mixed, **options)
        with masked(vlm, gone):
            original = vlm.generate(**mixed, **options)
    for one, two in zip(out.logits, expected.logits, strict=True):
        close(one, two)
    assert (expected.logits[0] - original.logits[0]).abs().max() > 1e-3


def test_counts_that_a_pruner_chooses_itself(deep_llava, mixed):
    """Not exact: as many as it likes, another number for every image, none of one."""

    class Threshold(Scripted):
        exact = False

        def reduce(self, inputs, keep):
            scores = self.score(inputs).masked_fill(~inputs.valid, -1)
            scores[1] = -1
            counts = (scores > 0.4).sum(1)
            assert inputs.step or (len(set(counts.tolist())) > 1 and max(counts) > keep[0])
            return super().reduce(inputs, counts)

    pruner, vlm = Threshold().eval(), deep_llava.vlm
    pruner.layers = (1, 2)
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad(), Watch(pruner) as watch:
        with attach(vlm, pruner, keep=5):
            out = vlm.generate(**mixed, **options)
        with masked(vlm, watch.gone(encode(vlm, mixed))[0]):
            expected = vlm.generate(**mixed, **options)
    for one, two in zip(out.logits, expected.logits, strict=True):
        close(one, two)
