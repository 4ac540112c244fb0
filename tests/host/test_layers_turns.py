"""A conversation that goes on: the next turn on a cache that was pruned, by layers or by the prompt; others' caches."""

import copy

import pytest
import torch
from layer_oracle import Watch, masked
from layer_pruners import RAGGED, close, scripted
from tiny_llava import NONE

from prunezoo import attach, build_pruner, encode

NEXT = " red </s> USER: is the box left ? ASSISTANT:"


@pytest.mark.parametrize("form", ["whole", "new", "forward"])
def test_a_second_turn_on_the_same_cache(deep_llava, mixed, form):
    """The words of the next turn, padded themselves, stand behind a prompt that has another length in each layer."""
    vlm, pruner = deep_llava.vlm, scripted(1, 3)
    words = deep_llava.batch([NEXT, " no", " red </s> USER: what ?", NEXT], [[]] * 4)
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}

    def talk():
        first = vlm.generate(**mixed, **options)
        cache, held = first.past_key_values, first.sequences.shape[1] - 1
        ids = torch.cat([first.sequences, words["input_ids"]], 1)
        mask = torch.cat([mixed["attention_mask"], torch.ones(4, 4).long(), words["attention_mask"]], 1)
        if form == "forward":
            out = vlm(input_ids=ids[:, held:], attention_mask=mask, past_key_values=cache)
            step = vlm(
                input_ids=out.logits[:, -1:].argmax(-1),
                attention_mask=torch.cat([mask, torch.ones(4, 1).long()], 1),
                past_key_values=cache,
            )
            return [out.logits[:, -1], step.logits[:, -1]]
        own = ids if form == "whole" else ids[:, held:]
        return vlm.generate(own, attention_mask=mask, past_key_values=cache, **options).logits

    with torch.no_grad():
        with Watch(pruner) as watch, attach(vlm, pruner, keep=RAGGED) as run:
            logits = talk()
        with masked(vlm, watch.gone(encode(vlm, mixed))[0]):
            expected = talk()
    for one, two in zip(logits, expected, strict=True):
        close(one, two)
    assert run.stats.after == [3, 20, 1, 36]


@pytest.mark.parametrize("pruners", [["scripted"], ["uniform", "scripted"], ["uniform"]], ids=str)
def test_a_second_turn_with_several_sequences(deep_llava, mixed, pruners):
    vlm, keeps = deep_llava.vlm, [9, 4][: len(pruners)]
    pruners = [scripted(1, 3) if name == "scripted" else build_pruner(name) for name in pruners]
    options = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(0)
    with attach(vlm, pruners, keep=keeps):
        both = vlm.generate(**mixed, **options, do_sample=True, num_return_sequences=2)
        mask = torch.cat([mixed["attention_mask"].repeat_interleave(2, 0), torch.ones(8, 2).long()], 1)
        logits = vlm.generate(
            both.sequences, attention_mask=mask, past_key_values=both.past_key_values, **options
        ).logits
        # Each sequence as the only one of its prompt.
        for copy_ in range(2):
            alone = vlm(**mixed, use_cache=True, position_ids=(mixed["attention_mask"].cumsum(1) - 1).clamp_min(0))
            cache, own = alone.past_key_values, both.sequences[copy_::2, -2:]
            places = mask[copy_::2].cumsum(1)[:, -2:] - 1
            again = vlm(own, attention_mask=mask[copy_::2], past_key_values=cache, position_ids=places).logits[:, -1]
            close(logits[0][copy_::2], again)


@pytest.mark.parametrize("form", ["whole", "new", "forward"])
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("layered", [False, True])
def test_a_second_turn_on_a_shortened_prompt(deep_llava, mixed, form, positions, layered):
    """The same dialogue, with the prompt's pictures pruned first, against all of it in one prompt."""
    vlm = deep_llava.vlm
    pruners, keeps = ([build_pruner("uniform"), scripted(1, 3)], [9, 5]) if layered else (["uniform"], [9])
    words = deep_llava.batch([NEXT, " no", " red </s> USER: what ?", NEXT], [[]] * 4)
    with torch.no_grad(), attach(vlm, pruners, keep=keeps, positions=positions):
        options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
        first = vlm.generate(**mixed, **options)
        held = first.sequences.shape[1] - 1
        ids = torch.cat([first.sequences, words["input_ids"]], 1)
        mask = torch.cat([mixed["attention_mask"], torch.ones(4, 3).long(), words["attention_mask"]], 1)
        if form == "forward":
            logits = vlm(ids[:, held:], attention_mask=mask, past_key_values=first.past_key_values).logits[:, -1]
            turns = [(logits, ids, mask)]
        else:
            own = ids if form == "whole" else ids[:, held:]
            out = vlm.generate(own, attention_mask=mask, past_key_values=first.past_key_values, **options)
            turns = [(out.logits[0], ids, mask)]
            assert torch.equal(out.sequences[:, : own.shape[1]], own)
            if form == "whole":
                third = torch.cat([out.sequences, words["input_ids"]], 1)
                longer = torch.cat([mask, torch.ones(4, 3).long(), words["attention_mask"]], 1)
                again = vlm.generate(third, attention_mask=longer, past_key_values=out.past_key_values, **options)
                turns.append((again.logits[0], third, longer))
        # A direct call counts columns where `generate` counts tokens: padding of the new words moves positions.
        rows = slice(None) if form != "forward" else words["attention_mask"].all(1)
        for logits, ids, mask in turns:
            expected = vlm.generate(**{**mixed, "input_ids": ids, "attention_mask": mask}, **options).logits[0]
            close(logits[rows], expected[rows])


def test_tuples_are_remembered_too(deep_llava, mixed):
    vlm, mask = deep_llava.vlm, torch.cat([mixed["attention_mask"], torch.ones(4, 1).long()], 1)
    for pruner in ("uniform", scripted(1, 3)):
        with attach(vlm, pruner, keep=5) as run:
            logits, cache = vlm(**mixed, use_cache=True, return_dict=False)[:2]
            step = vlm(mixed["input_ids"][:, -1:], attention_mask=mask, past_key_values=cache).logits
            other = vlm(**mixed, use_cache=True)
            again = vlm(mixed["input_ids"][:, -1:], attention_mask=mask, past_key_values=other.past_key_values).logits
            assert torch.equal(logits, other.logits) and torch.equal(step, again)
        assert run.stats.kv_bytes_saved > 0


def test_other_conversations_pass_untouched(deep_llava, mixed):
    vlm, text = deep_llava.vlm, deep_llava.batch([NONE], [[]])
    whole = vlm.generate(**mixed, max_new_tokens=3, return_dict_in_generate=True)
    expected = vlm.generate(**text, max_new_tokens=4)
    mask = torch.cat([mixed["attention_mask"], torch.ones(4, 3).long()], 1)
    spare = copy.deepcopy(whole.past_key_values)
    step = vlm(whole.sequences[:, -1:], attention_mask=mask, past_key_values=spare).logits
    with attach(vlm, scripted(1, 3), keep=5) as run:
        vlm(**mixed)
        assert torch.equal(vlm.generate(**text, max_new_tokens=4), expected)
        assert torch.equal(vlm(**text).logits[:, -1].argmax(-1), expected[:, text["input_ids"].shape[1]])
        other = vlm(whole.sequences[:, -1:], attention_mask=mask, past_key_values=whole.past_key_values)
        assert torch.equal(other.logits, step)
    assert len(run.stats.before) == 4
