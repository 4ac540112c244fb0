"""Counts of zero in the layer stage: all tokens of some images, or of all, leave between two layers."""

import pytest
import torch
from layer_oracle import Watch, masked
from layer_pruners import Scripted, close, eager_copy
from tiny_llava import NONE

from prunezoo import PruneZooError, attach, build_pruner, encode
from prunezoo.host import full_forward, run_pruned

STEPS = 3
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "eager": {},
    "no cache": {"use_cache": False},
}
SCRIPTS = {
    "all": ((2,), ([0, 0, 0, 0],)),
    "some": ((1,), ([0, 36, 4, 0],)),
    "one by one": ((1, 2, 3), ([9, 0, 36, 1], [0, 0, 5, 1], [0, 0, 0, 0])),
    "all at first": ((1, 3), ([0, 0, 0, 0], [0, 0, 0, 0])),
}


class Counted(Scripted):
    """Leaves of the four images of `mixed` what a script says, stage by stage."""

    exact = False
    script: tuple[list[int], ...] = ()
    needs = ("last_attention",)

    def reduce(self, inputs, keep):
        assert inputs.signal("last_attention").shape == inputs.valid.shape
        counts = self.script[inputs.step]
        return super().reduce(inputs, torch.tensor(counts))


def counted(name):
    pruner = Counted().eval()
    pruner.layers, pruner.script = SCRIPTS[name]
    return pruner


@pytest.mark.parametrize(
    ("name", "way"), [*((name, "greedy") for name in SCRIPTS), *(("some", way) for way in list(WAYS)[1:])]
)
def test_generating_without_the_tokens_equals_the_oracle(deep_llava, mixed, name, way):
    vlm = eager_copy(deep_llava.vlm) if way == "eager" else deep_llava.vlm
    pruner = counted(name)
    options = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True, **WAYS[way]}
    with Watch(pruner) as watch, attach(vlm, pruner, keep=5) as run:
        out = vlm.generate(**mixed, **options)
    watch.calls = watch.calls[: len(pruner.layers)]
    gone, _ = watch.gone(encode(vlm, mixed))
    with masked(vlm, gone):
        expected = vlm.generate(**mixed, **options)
    bare = vlm.generate(**mixed, **options)
    assert torch.equal(out.sequences, expected.sequences)
    for one, two in zip(out.logits, expected.logits, strict=True):
        close(one, two)
    assert (out.logits[0] - bare.logits[0]).abs().max() > 1e-3
    assert run.stats.after[:4] == pruner.script[-1]
    if way == "greedy":  # caches really are shorter
        images = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]])  # of each sample
        words = (mixed["attention_mask"].bool() & (mixed["input_ids"] != vlm.config.image_token_id)).sum(1)
        longest = int((words + images @ torch.tensor(pruner.script[-1])).max())
        assert out.past_key_values.get_seq_length(3) == longest + STEPS - 1


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_second_turn_behind_no_tokens(deep_llava, mixed, positions):
    vlm, pruner = deep_llava.vlm, counted("one by one")
    words = deep_llava.batch([" red </s> USER: is the box left ? ASSISTANT:", " no", " what ?", " red ?"], [[]] * 4)
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}

    def talk():
        first = vlm.generate(**mixed, **options)
        ids = torch.cat([first.sequences, words["input_ids"]], 1)
        mask = torch.cat([mixed["attention_mask"], torch.ones(4, 3).long(), words["attention_mask"]], 1)
        return vlm.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **options).logits

    with torch.no_grad():
        with Watch(pruner) as watch, attach(vlm, pruner, keep=5, positions=positions):
            logits = talk()
        with masked(vlm, watch.gone(encode(vlm, mixed))[0], compact=positions == "compact"):
            expected = talk()
    for one, two in zip(logits, expected, strict=True):
        close(one, two)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_withdraw_leaves_the_words_alone_from_its_layer_on(deep_llava, mixed, layer):
    vlm, pruner = deep_llava.vlm, build_pruner("withdraw", layer=layer).eval()
    with torch.no_grad():
        encoded = encode(vlm, mixed)
        run = run_pruned(vlm, encoded, pruner, 7)
        image = mixed["input_ids"] == vlm.config.image_token_id
        with masked(vlm, {layer: image}):
            expected = full_forward(vlm, encoded).logits[:, -1]
    close(run.host.logits[:, -1], expected)
    assert run.layers.tolist() == [[36] * layer + [0] * (4 - layer)] * 4
    assert run.tokens.tolist() == [9.0 * layer] * 4 and run.output.count.tolist() == [0] * 4
    assert build_pruner("withdraw").stages(4) == (2,) and build_pruner("withdraw").stages(33) == (16,)


def test_where_nothing_can_be_withdrawn_is_refused(deep_llava):
    vlm = deep_llava.vlm
    with pytest.raises(PruneZooError, match=r"layer=0: tokens can leave from layer 1 on; .* take `none`"):
        build_pruner("withdraw", layer=0)
    with pytest.raises(PruneZooError, match=r"layers \[4\], the decoder has 4"):
        attach(vlm, build_pruner("withdraw", layer=4), keep=1.0)
    with pytest.raises(PruneZooError, match="a decoder of 1 layer has no half"):
        build_pruner("withdraw").stages(1)


def test_a_prompt_of_which_nothing_is_left_is_refused(deep_llava, mixed):
    """Of pictures alone: no word is there to go on from. In a batch as well, where the others would hide it."""
    vlm, picture = deep_llava.vlm, mixed["input_ids"] == deep_llava.vlm.config.image_token_id
    alone = {
        "input_ids": mixed["input_ids"][:1][picture[:1]][None],
        "attention_mask": torch.ones(1, 36).long(),
        "pixel_values": mixed["pixel_values"][:1],
    }
    rows = {**mixed, "attention_mask": mixed["attention_mask"].clone()}
    rows["attention_mask"][0] = picture[0].long()
    words = deep_llava.batch([NONE], [[]])
    bare = vlm(**words).logits
    for batch in (alone, rows):
        with attach(vlm, "withdraw", keep=1.0):
            for call in (vlm, vlm.generate):
                with pytest.raises(PruneZooError, match="'withdraw' left nothing of a prompt in front of layer 2"):
                    call(**batch)
            assert torch.equal(vlm(**words).logits, bare)
