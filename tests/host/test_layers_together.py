"""Pruners of several stages at once: in a list, in one, and what they ask of the model while they are attached."""

import torch
from layer_oracle import Watch, masked
from layer_pruners import Scripted, Together, close, scripted

from prunezoo import attach, build_pruner, encode, full_forward
from prunezoo.host import run_pruned
from prunezoo.host.run import reduce_early


def test_stages_work_together(deep_llava, mixed):
    vlm, inner = deep_llava.vlm, scripted(1, 2)
    first = build_pruner("uniform").eval()
    with torch.no_grad(), Watch(inner) as watch:
        encoded = encode(vlm, mixed)
        run = run_pruned(vlm, encoded, Together(first, inner), 4)
        with attach(vlm, [first, inner], keep=[18, 4]) as listed:
            assert torch.equal(vlm(**mixed).logits, run.host.logits)
            sequences = vlm.generate(**mixed, max_new_tokens=3)
        with attach(vlm, Together(first, inner), keep=4) as combined:
            assert torch.equal(vlm.generate(**mixed, max_new_tokens=3), sequences)
    assert torch.equal(sequences[:, : mixed["input_ids"].shape[1]], mixed["input_ids"])
    # By hand: what the first one leaves is a prompt of its own.
    left = first(encoded.inputs, 18)
    inputs = watch.calls[0][0]
    assert torch.equal(inputs.cells, encoded.inputs.cells.gather(1, left.index[..., None].expand(-1, -1, 3)))
    kept = left.index.gather(1, watch.calls[0][1].index).gather(1, watch.calls[1][1].index)
    assert torch.equal(run.output.index, kept)
    seen = encoded.mask.clone()
    for row, slots in zip(encoded.sample, encoded.slots, strict=True):
        seen[row, slots] = False
    for row, slots, index in zip(encoded.sample, encoded.slots, left.index, strict=True):
        seen[row, slots[index]] = True
    gone, away = {0: encoded.mask & ~seen}, encoded.mask & ~seen
    slots = encoded.slots.gather(1, left.index)
    for inputs, output in watch.calls[:2]:
        away = away.clone()
        for row, found in zip(encoded.sample, slots, strict=True):
            away[row, found] = True
        slots = slots.gather(1, output.index)
        for row, found in zip(encoded.sample, slots, strict=True):
            away[row, found] = False
        gone[inputs.layer] = away
    with masked(vlm, gone):
        close(run.host.logits[:, -1], full_forward(vlm, encoded).logits[:, -1])
    for stats in (listed.stats, combined.stats):
        assert [(s.pruner, s.layer) for s in stats.stages] == [("uniform", None), ("scripted", 1), ("scripted", 2)]
        assert stats.before[:4] == [36] * 4 and stats.stages[1].before[:4] == [18] * 4 and stats.after[:4] == [4] * 4
    middle = combined.stats.stages[1].after[0]
    assert combined.stats.tokens[0] == run.tokens[0] == (18 + middle + 2 * 4) / 4


def test_vision_prompt_and_layer_stage_in_one(deep_llava, mixed):
    vlm, inner = deep_llava.vlm, scripted(1, 2)
    early = [(build_pruner("tome").eval(), 24), (build_pruner("uniform").eval(), 12)]
    with torch.no_grad():
        with Watch(inner) as watch, attach(vlm, [*(pruner for pruner, _ in early), inner], keep=[24, 12, 4]) as run:
            logits = vlm(**mixed).logits[:, -1]
            sequences = vlm.generate(**mixed, max_new_tokens=3)
        # What the first two leave is a prompt that the bare model reads, not looking at what the third drops.
        left = reduce_early(vlm, encode(vlm, mixed), early, "original").encoded
        watch.calls = watch.calls[:2]
        with masked(vlm, watch.gone(left)[0]):
            close(logits, full_forward(vlm, left).logits[:, -1])
    assert torch.equal(sequences[:, : mixed["input_ids"].shape[1]], mixed["input_ids"])
    assert [stage.after[0] for stage in run.stats.stages] == [24, 12, 7, 4] and run.stats.before == [36] * 8
    assert run.stats.tokens[0] == (12 + 7 + 2 * 4) / 4


def test_adapters_of_all_pruners_are_on_while_attached(deep_llava):
    states = []

    class Adapting(Scripted):
        def adapt(self, vlm):
            class Change:
                def __enter__(self):
                    states.append("on")

                def __exit__(self, *_):
                    states.append("off")

            return Change()

    pruner = Adapting()
    pruner.layers = (1,)
    with attach(deep_llava.vlm, pruner, keep=3):
        assert states == ["on"]
    assert states == ["on", "off"]
