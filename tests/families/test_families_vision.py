"""The vision stage on every family: a matrix of families and checks, ids ``vision-FAMILY-CHECK``.

ToMe, against a tower that is run by hand, whose tokens are put into the bare model's prompt, and which no one looks at
besides. Families that join patches behind the tower are in test_families_cells.py.
"""

from dataclasses import replace

import pytest
import torch
from cell_oracle import WHY
from families import ALL, IMAGE, LARGE, MIXED, NEWER, ONE_EACH, SMALL, TALL, Sample, tiny_family
from prompt_oracle import STEPS, blind, write
from tower_oracle import by_hand, slots_of, tome_by_hand

from prunezoo import PruneZooError, attach, build_pruner, encode
from prunezoo.core.budgets import budget
from prunezoo.host.families import find_family
from prunezoo.host.run import run_pruned
from prunezoo.host.stages.cut import Timer
from prunezoo.host.stages.vision import choose

# Tokens are means of sums in another order, and go through tower and language model; logits are of order 1.
CLOSE = {"rtol": 0, "atol": 5e-5}


def project(vlm, states):
    """From the tower's projected state to tokens of the language model."""
    model = vlm.model
    if vlm.config.model_type == "paligemma":
        states = model.vision_tower.post_layernorm(states)
    return model.multi_modal_projector(states[None])[0]


def expected(tiny, batch, keep):
    """The encoded batch with what is left, by hand, in its place; and ``(B, L)`` which columns go."""
    vlm, tower, pruner = tiny.vlm, find_family(tiny.vlm).tower(), build_pruner("tome")
    encoded = encode(vlm, batch)
    features, dropped = encoded.inputs.features.clone(), batch["input_ids"] == IMAGE
    available = encoded.inputs.valid.sum(1)
    steps = pruner.schedule(budget(keep, available), available, tower.depth)
    for row, pixels in enumerate(batch["pixel_values"]):
        decide = tome_by_hand([int(step[row]) for step in steps])
        members, states = by_hand(vlm.model.vision_tower, tower, pixels, decide)
        slots = slots_of(members, int(available[row]))
        features[row, slots] = project(vlm, states)
        dropped[encoded.sample[row], encoded.slots[row, slots]] = False
    return replace(encoded, inputs=replace(encoded.inputs, features=features)), dropped


def equals_oracle(tiny, samples, keep=0.5, side="left"):
    """The prompt's last logits, and six steps of decoding."""
    vlm, batch = tiny.vlm, tiny.batch(samples, side)
    left, dropped = expected(tiny, batch, keep)
    assert dropped.any()
    last = batch["attention_mask"].shape[1] - 1 - batch["attention_mask"].flip(1).argmax(1)
    with blind(vlm, dropped):
        logits = vlm(**left.model_inputs(vlm)).logits[torch.arange(len(samples)), last]
        written = write(vlm, left.model_inputs(vlm, generating=True)) if side == "left" else None
    bare = vlm(**batch).logits[torch.arange(len(samples)), last]
    assert (bare - logits).abs().max() > 0.01
    run = run_pruned(vlm, encode(vlm, batch), build_pruner("tome").eval(), keep)
    torch.testing.assert_close(run.host.logits[:, -1], logits, **CLOSE)
    with attach(vlm, "tome", keep) as attached:
        torch.testing.assert_close(vlm(**batch).logits[:, -1], logits, **CLOSE)
        assert sum(attached.stats.before) - sum(attached.stats.after) == int(dropped.sum())
        if written is None:  # `generate` itself reads wrong positions behind padding on the right
            return
        again = write(vlm, batch)
    # Older releases of transformers give the new tokens alone where they are given a prompt embedded.
    assert torch.equal(again.sequences[:, -STEPS:], written.sequences[:, -STEPS:])
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(written.logits), **CLOSE)


def keep_all(tiny):
    """Logits and generated tokens bit for bit."""
    batch = tiny.batch(MIXED)
    bare, written = tiny.vlm(**batch).logits, write(tiny.vlm, batch)
    with attach(tiny.vlm, "tome", keep=1.0) as run:
        assert torch.equal(tiny.vlm(**batch).logits, bare)
        again = write(tiny.vlm, batch)
    assert run.stats.before == run.stats.after and len(run.stats.before) == 8
    assert torch.equal(again.sequences, written.sequences)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, written.logits, strict=True))


def half(tiny):
    """Four samples, padded on the left."""
    equals_oracle(tiny, ONE_EACH)


def one_sample(tiny):
    equals_oracle(tiny, [Sample((LARGE,), 5)], keep=3)


def ragged_counts(tiny):
    equals_oracle(tiny, MIXED, keep=torch.tensor([3, 1, 5, 7]))


def two_images(tiny):
    equals_oracle(tiny, [Sample((LARGE, TALL), 4), Sample((SMALL, SMALL), 7)])


def right_padding(tiny):
    equals_oracle(tiny, MIXED, side="right")


def detach(tiny):
    """Nothing is left behind, also when a call failed."""
    vlm, batch = tiny.vlm, tiny.batch(MIXED)
    bare, written = vlm(**batch).logits, write(vlm, batch).sequences
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in vlm.modules()]
    with attach(vlm, "tome", keep=2):
        assert vlm(**batch).logits.shape != bare.shape
        with pytest.raises(ValueError, match="typo"):
            vlm.generate(**batch, typo=1)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in vlm.modules()]
    assert torch.equal(vlm(**batch).logits, bare) and torch.equal(write(vlm, batch).sequences, written)


CHECKS = [keep_all, half, one_sample, ragged_counts, two_images, right_padding, detach]
PLAIN = ("llava", "llava_siglip", "paligemma")
CELLS = [pytest.param(name, check, id=f"vision-{name}-{check.__name__}") for name in PLAIN for check in CHECKS]
UNREADABLE = [name for name in NEWER if name not in WHY]
CELLS += [pytest.param(name, half, id=f"vision-{name}-half") for name in UNREADABLE]


@pytest.mark.parametrize(("name", "check"), CELLS)
@torch.no_grad()
def test_matrix(name, check, record_property):
    if name in PLAIN:
        check(tiny_family(name))
        record_property("outcome", "yes")
        return
    pattern = "blocks can be read or shortened: use a pruner of the prompt or layer stage that needs no signals"
    with pytest.raises(PruneZooError, match=pattern) as refusal:
        attach(ALL[name].vlm, "tome", keep=0.5)
    record_property("outcome", f"refused: {refusal.value}")


def test_the_tower_runs_once_and_gets_less_than_the_bare_one():
    """An attached pruner of the vision stage does not run the whole tower besides."""
    tiny, seen = tiny_family("llava_siglip"), []
    vlm, batch = tiny.vlm, tiny.batch(ONE_EACH)
    handles = [
        b.mlp.register_forward_hook(lambda _m, a, _o: seen.append(a[0].shape[1]))
        for b in find_family(vlm).tower().blocks
    ]
    try:
        with attach(vlm, "tome", keep=4):
            vlm(**batch)
        assert seen == [12, 8, 4]
        seen.clear()
        vlm(**batch)
        assert seen == [16, 16, 16]
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def test_what_the_tower_left_goes_on_to_the_next_stages():
    """ToMe, then VisionZip, which reads signals of the whole tower where merged tokens sit, then FastV."""
    tiny = tiny_family("llava")
    vlm, batch = tiny.vlm, tiny.batch(MIXED)
    merging, zipping = build_pruner("tome").eval(), build_pruner("visionzip").eval()
    encoded = encode(vlm, batch, zipping.needs)
    first = choose(vlm, encoded, merging, 10, Timer(vlm.device))
    second = zipping(encoded.inputs.after(first), 6)
    dropped = batch["input_ids"] == IMAGE
    features = encoded.inputs.features.clone()
    for row, slots in enumerate(first.index.gather(1, second.index)):
        features[row, slots] = second.features[row]
        dropped[encoded.sample[row], encoded.slots[row, slots]] = False
    inputs = replace(encoded, inputs=replace(encoded.inputs, features=features)).model_inputs(vlm)
    with blind(vlm, dropped):
        expected = vlm(**inputs).logits[:, -1]
    with attach(vlm, [merging, zipping], keep=[10, 6]) as run:
        torch.testing.assert_close(vlm(**batch).logits[:, -1], expected, **CLOSE)
    assert [(s.before[0], s.after[0]) for s in run.stats.stages] == [(16, 10), (10, 6)]
    assert all(stage.seconds > 0 for stage in run.stats.stages)
    with attach(vlm, [merging, zipping, "fastv"], keep=[10, 6, 2]) as run:
        assert vlm.generate(**batch, max_new_tokens=2).shape[0] == 4
    assert [(s.before[0], s.after[0]) for s in run.stats.stages] == [(16, 10), (10, 6), (6, 2)]
    with pytest.raises(PruneZooError, match="signals need the tower to run: cls_attention"):
        encode(vlm, batch, ("cls_attention",), run_tower=False)
