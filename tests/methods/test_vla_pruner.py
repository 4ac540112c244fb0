"""VLA-Pruner: the choice by a slow loop, what is held of an episode, and what the held attention is."""

import dataclasses

import pytest
import torch
from made_inputs import make_inputs
from tiny_llava import make_image

from prunezoo import PruneZooError, attach, build_pruner
from prunezoo.training_free.vla_pruner import ENTERED, MAP, PROMPT

WORDS = "<s> USER: <image> what ? ASSISTANT:"


def cosine_gap(one, two):
    return 1 - float(torch.nn.functional.cosine_similarity(one, two, dim=0))


def by_hand(inputs, row, keep, history, decay=0.8):
    """Slots kept of one image; ``history``: for each step, newest first, what each slot it had received."""
    count = int(inputs.valid[row].sum())
    words = [slot for slot in range(inputs.text_valid.shape[1]) if inputs.text_valid[row, slot]]
    behind = sum(float(inputs.signal("word_behind")[row, word]) for word in words)
    received = []
    for slot in range(count):
        total = behind * float(inputs.signal(PROMPT)[row, slot])
        total += sum(float(inputs.signal(MAP)[row, other, slot]) for other in range(count))
        received.append(total / (behind + count))
    best = sorted(range(count), key=lambda slot: -received[slot])[:keep]
    past = []
    for slot in range(count):
        seen = [(decay**age, step[slot]) for age, step in enumerate(history) if slot in step]
        past.append(sum(w * a for w, a in seen) / sum(w for w, _ in seen) if seen else 0.0)
    acted = sorted(range(count), key=lambda slot: -past[slot])[:keep] if history else []
    union = sorted({*best, *acted})
    tokens = inputs.signal(ENTERED)[row]
    gaps = {(i, j): cosine_gap(tokens[i], tokens[j]) for i in union for j in union if i != j}
    chosen = [max(union, key=lambda i: min((gaps[i, j] for j in union if j != i), default=0))]
    while len(chosen) < keep:
        rest = [i for i in union if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(gaps[i, j] for j in chosen)))
    return sorted(chosen)


def state_of(inputs, row, history):
    state = {}
    for age, step in enumerate(history):
        slots = list(step)
        state[f"cells_{age}"] = inputs.cells[row, slots]
        state[f"guide_{age}"] = torch.tensor([step[slot] for slot in slots])
    return state


def test_the_choice_is_that_of_a_loop():
    """An image without history, one whose tokens were all seen, and one of which other tokens were seen each time."""
    inputs, pruner = make_inputs(seed=3), build_pruner("vla_pruner").eval()
    random = torch.Generator().manual_seed(1)
    counts = inputs.valid.sum(1).tolist()
    histories = [
        [],
        [dict(enumerate(torch.rand(counts[1], generator=random).tolist()))],
        [
            {slot: float(torch.rand((), generator=random)) for slot in slots}
            for slots in (range(8), range(5, 15), range(12, 21))
        ],
    ]
    memory = tuple(state_of(inputs, row, history) or None for row, history in enumerate(histories))
    output = pruner(dataclasses.replace(inputs, memory=memory), 6)
    bare = pruner(inputs, 6)
    for row, history in enumerate(histories):
        assert output.index[row].tolist() == by_hand(inputs, row, 6, history)
        assert bare.index[row].tolist() == by_hand(inputs, row, 6, [])
    assert not torch.equal(output.index[1:], bare.index[1:])


def test_the_newest_step_weighs_most_and_what_was_not_seen_counts_nothing():
    pruner = build_pruner("vla_pruner", decay=0.5)
    cells = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 2], [-1, -1, -1]])
    state = {
        "cells_0": cells[[0, 3]], "guide_0": torch.tensor([0.3, 0.9]),
        "cells_1": cells[[0, 1]], "guide_1": torch.tensor([0.6, 0.4]),
    }  # fmt: skip
    found = pruner.by_actions(cells, state)
    torch.testing.assert_close(found, torch.tensor([(0.3 + 0.5 * 0.6) / 1.5, 0.4, 0.0, 0.0]))


@torch.no_grad()
def test_what_is_held_is_the_last_words_attention_of_the_layer_behind(deep_llava):
    """With everything kept, by the bare model's own attention; layers 1 and 2 of 4."""
    vlm, pruner = deep_llava.vlm, build_pruner("vla_pruner").eval()
    assert pruner.stages(4) == (1, 2) and pruner.stages(32) == (3, 16)
    batch = deep_llava.batch([WORDS], [[make_image(4)]])
    with attach(vlm, pruner, keep=1.0) as run:
        vlm(**batch)
        (state,) = run.memory._held.values()
        assert set(state) == {"cells_0", "guide_0"}
        held, cells = state["guide_0"].clone(), state["cells_0"].clone()
        for _ in range(4):
            vlm(**batch)
        (state,) = run.memory._held.values()
        assert set(state) == {f"{name}_{age}" for name in ("cells", "guide") for age in range(3)}
    kernel = vlm.config._attn_implementation
    try:
        vlm.set_attn_implementation("eager")
        maps = vlm(**batch, output_attentions=True).attentions
    finally:
        vlm.set_attn_implementation(kernel)
    image = batch["input_ids"][0] == vlm.config.image_token_id
    expected = maps[1][0, :, -1].mean(0)[image]
    torch.testing.assert_close(held, expected / expected.sum(), rtol=1e-4, atol=1e-6)
    assert cells.tolist() == [[0, row, column] for row in range(6) for column in range(6)]


@torch.no_grad()
def test_an_episode_that_begins_whole_prunes_when_it_has_its_steps(deep_llava):
    vlm, pruner = deep_llava.vlm, build_pruner("vla_pruner", first="all", steps=2).eval()
    assert not pruner.exact
    frames = [deep_llava.batch([WORDS], [[make_image(seed)]]) for seed in range(4)]
    bare = [vlm(**frame).logits for frame in frames]
    with attach(vlm, pruner, keep=9) as run:
        logits = [vlm(**frame).logits for frame in frames]
        same = [torch.equal(one, two) for one, two in zip(logits, bare, strict=True)]
        assert same == [True, True, False, False]
        run.reset()
        assert torch.equal(vlm(**frames[3]).logits, bare[3])


def test_bad_settings_are_named():
    for options, said in (
        ({"layers": (1,)}, "layers=[1] of vla_pruner: name two layers"),
        ({"steps": 0}, "steps=0 of vla_pruner is out of range"),
        ({"decay": 0.0}, "decay=0.0 of vla_pruner"),
        ({"rows": "none"}, "rows='none'"),
    ):
        with pytest.raises(PruneZooError) as caught:
            build_pruner("vla_pruner", **options)
        assert said in str(caught.value)
    with pytest.raises(PruneZooError, match="2 layers has no room for two stages"):
        build_pruner("vla_pruner").stages(2)
