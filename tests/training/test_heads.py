"""Heads in a frozen tower learn what the tower says further on."""

import pytest
import torch
from tiny_llava import make_image

from prunezoo import PruneZooError, build_pruner
from prunezoo.host import encode, run_pruned
from prunezoo.learned._patch_facts import patch_facts
from trainers.training.heads import HeadsModule


def module_of(tiny_llava, name, **options):
    return HeadsModule(str(tiny_llava.folder), build_pruner(name, **options), vlm_dtype="float32")


def batch_of(tiny_llava):
    batch = tiny_llava.batch(["<s> USER: <image> what color ? ASSISTANT: red"] * 3, [[make_image(i)] for i in range(3)])
    return {**batch, "labels": batch["input_ids"].clone()}


@pytest.mark.parametrize("name", ["dtop", "a_clip"])
def test_a_head_learns(name, tiny_llava):
    module, batch = module_of(tiny_llava, name), batch_of(tiny_llava)
    module.log = module.log_dict = lambda *_, **__: None
    optimizer = torch.optim.Adam(module.pruner.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(module.training_step(dict(batch), 0))
        losses[-1].backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.pruner.parameters())
    assert losses[-1] < losses[0] - 1e-3


@pytest.mark.parametrize("name", ["dtop", "a_clip"])
def test_in_training_it_is_shown_what_it_finds_in_use(name, tiny_llava):
    """Behind the first block where it acts, in front of which nothing has gone."""
    module, batch = module_of(tiny_llava, name), batch_of(tiny_llava)
    block, seen = module.pruner.stages(module.depth)[0], []
    wanted = (*(f"{kind}@{block}" for kind in (*module.pruner.needs, "vision_states")), *module.pruner.learns_from(2))
    encoded = encode(module.vlm, batch, wanted)
    shown = module.found_behind(encoded, block)
    score = module.pruner.score
    module.pruner.score = lambda inputs: (seen.append(inputs), score(inputs))[1]
    with torch.no_grad():
        run_pruned(module.vlm, encode(module.vlm, batch), module.pruner.eval(), 5)
    attention = module.pruner.config.attention
    torch.testing.assert_close(patch_facts(shown, attention), patch_facts(seen[0], attention), rtol=1e-3, atol=1e-3)
    assert seen[0].layer == shown.layer == block and shown.depth == module.depth == 2


def test_blocks_that_do_not_run_are_refused(tiny_llava):
    with pytest.raises(PruneZooError, match=r"acts behind blocks \[5\], and 2 run"):
        module_of(tiny_llava, "a_clip", block=5)
