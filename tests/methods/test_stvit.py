"""STViT against loops over tokens and heads: its two layers, the centres, what is recovered; and its training."""

import math

import pytest
import torch
from made_inputs import DIM, make_inputs
from tiny_llava import make_image
from torch.nn import functional
from towers import small_tower
from vision_runs import N, run

from prunezoo import PruneZooError, build_pruner
from prunezoo.core.config import fit_width
from prunezoo.host.parts.tower import Tower
from prunezoo.training_free._grid import equal_areas
from trainers.training.matryoshka import MatryoshkaModule


def moved(pruner):
    """As after some training: nothing is zero any more."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in pruner.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return pruner.eval()


def slow_attention(part, query, seen):
    """Of one image, one head and one query at a time."""
    asked, shown = part.ask(query), part.show(seen)
    width, heads = query.shape[-1], part.mix.num_heads
    q, k, v = (
        functional.linear(x, w, b)
        for x, w, b in zip(
            (asked, shown, shown), part.mix.in_proj_weight.chunk(3), part.mix.in_proj_bias.chunk(3), strict=True
        )
    )
    rows = []
    for one in q:
        out = []
        for head in range(heads):
            own = slice(head * width // heads, (head + 1) * width // heads)
            logits = [float(one[own] @ other[own]) / math.sqrt(width // heads) for other in k]
            weights = torch.tensor(logits).softmax(0)
            out.append(sum(w * other[own] for w, other in zip(weights, v, strict=True)))
        rows.append(part.mix.out_proj(torch.cat(out)))
    return torch.stack(rows)


def slow_layer(layer, made, seen, places):
    made = made + slow_attention(layer.attend, made + places, seen)
    return made + layer.feed(made)


def slow_centres(pruner, place, last):
    """One centre: what lies at a place of the grid, by the four points around it."""
    side = pruner.config.centres
    row, column = (p / max(end, 1) * (side - 1) for p, end in zip(place, last, strict=True))
    total = torch.zeros(pruner.config.tower_width)
    for i in range(side):
        for j in range(side):
            share = max(0.0, 1 - abs(row - i)) * max(0.0, 1 - abs(column - j))
            total = total + share * pruner.centres[i * side + j]
    return total


@pytest.mark.parametrize("centres", [0, 3])
@torch.no_grad()
def test_the_two_layers_are_those_of_the_loops(centres):
    inputs, pruner = make_inputs(pad=2), moved(build_pruner("stvit", tower_width=DIM, heads=2, centres=centres))
    output = pruner(inputs, 7)
    for row, valid in enumerate(inputs.valid):
        tokens, cells = inputs.features[row, valid], inputs.cells[row, valid]
        parts = sorted(equal_areas(cells, 7), key=lambda part: part[2])
        last = cells[:, 1:].amax(0).tolist()
        made = torch.stack([tokens[own].mean(0) for own, _, _ in parts])
        made = slow_layer(pruner.first, made, tokens, 0.0)
        places = 0.0
        if centres:
            places = torch.stack([slow_centres(pruner, cells[at, 1:].tolist(), last) for _, _, at in parts])
        made = slow_layer(pruner.second, made, torch.cat([made, tokens]), places)
        torch.testing.assert_close(output.features[row], made, rtol=1e-4, atol=1e-4)
        assert output.index[row].tolist() == [at for _, _, at in parts]
        for column, (own, _, _) in enumerate(parts):
            assert set(output.groups[row][: len(tokens)][own].tolist()) == {column}
        assert set(output.groups[row, ~valid].tolist()) == {-1}


@torch.no_grad()
def test_untrained_it_is_the_mean_of_each_part():
    inputs = make_inputs()
    pooled = build_pruner("pool").eval()(inputs, 6)
    output = build_pruner("stvit", tower_width=DIM, heads=2).eval()(inputs, 6)
    torch.testing.assert_close(output.features, pooled.features)


@torch.no_grad()
def test_an_image_that_keeps_all_is_not_touched_beside_one_that_does_not():
    inputs, pruner = make_inputs(), moved(build_pruner("stvit", tower_width=DIM, heads=2))
    output = pruner(inputs, torch.tensor([36, 4, 3]))
    assert torch.equal(output.features[0], inputs.features[0]) and output.counts == (36, 4, 3)


@torch.no_grad()
def test_recovered_patches_are_what_they_were_and_what_they_find_in_the_tokens():
    model, pixels = small_tower("clip"), torch.randn(2, 3, 20, 20)
    pruner, tower = moved(build_pruner("stvit", tower_width=24, heads=3, recover=True)), Tower(model, -2)
    bare = model(pixels, output_hidden_states=True).hidden_states
    seen = {}
    recover = pruner.recover
    pruner.recover = lambda gone, left, valid: recover(gone, seen.setdefault("tokens", left), valid)
    output = run(model, tower, pruner, pixels, (6, N))
    block = pruner.stages(tower.depth)[0]
    before = bare[block + 1][0, 1:]
    expected = before + slow_attention(pruner.undo, before, seen["tokens"][0, :6])
    torch.testing.assert_close(output.features[0], expected, rtol=1e-4, atol=1e-4)
    # the other picture lost nothing, so it is the bare tower's, up to the mask that its neighbour brings
    torch.testing.assert_close(output.features[1], bare[tower.depth][1, 1:], rtol=1e-4, atol=1e-4)
    assert output.index.tolist() == [list(range(N))] * 2


@torch.no_grad()
def test_recovering_all_is_the_bare_tower_bit_for_bit():
    model, pixels = small_tower("clip"), torch.randn(2, 3, 20, 20)
    pruner = moved(build_pruner("stvit", tower_width=24, heads=3, recover=True))
    bare = model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(run(model, Tower(model, -2), pruner, pixels, (N, N)).features, bare)


@pytest.mark.parametrize("recover", [False, True])
def test_it_learns_beside_a_frozen_model(recover, tiny_llava):
    pruner = build_pruner("stvit", tower_width=24, heads=2, recover=recover)
    module = MatryoshkaModule(str(tiny_llava.folder), pruner, vlm_dtype="float32", scales=(9, 4))
    module.log = lambda *_, **__: None
    batch = tiny_llava.batch(["<s> USER: <image> what color ? ASSISTANT: red"] * 2, [[make_image(0)], [make_image(1)]])
    labels = batch["input_ids"].clone()
    labels[:, :-1] = -100
    optimizer = torch.optim.Adam(pruner.parameters(), lr=3e-3)
    losses, reached = [], set()
    for _ in range(25):
        optimizer.zero_grad()
        losses.append(module.training_step({**batch, "labels": labels}, 0))
        losses[-1].backward()
        reached |= {key for key, p in pruner.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert reached == {key for key, _ in pruner.named_parameters()}
    assert all(parameter.grad is None for parameter in module.vlm.parameters())


def test_widths_depths_and_ranges(tiny_llava):
    assert build_pruner("stvit", vlm=tiny_llava.vlm).config.tower_width == 24
    assert build_pruner("stvit", vlm=tiny_llava.vlm, tower_width=16).config.tower_width == 16
    pruner = build_pruner("stvit", tower_width=16, heads=2)
    assert fit_width(pruner, 32, 24) is pruner
    assert pruner.stages(12) == (3,) and pruner.stages(24) == (7,) and pruner.stages(1) == (0,)
    with pytest.raises(PruneZooError, match=r"width 16, the model's has 32: build it with tower_width=32"):
        pruner(make_inputs(), 3)
    for bad in ({"tower_width": 17}, {"heads": 0}, {"feed": 0}, {"centres": -1}):
        with pytest.raises(PruneZooError, match=f"{next(iter(bad))}=.*stvit"):
            build_pruner("stvit", **{"tower_width": 16, "heads": 2, **bad})
