"""Region focus beyond the shared contract: coarse to fine against a loop over cells, its loss, and its teacher."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from made_inputs import build, make_inputs
from tiny_llava import make_image

from prunezoo import PruneInputs, PruneZooError, encode, full_forward
from prunezoo.core.registry import build_pruner
from prunezoo.learned.region_focus import APART, Pyramid, RegionFocus, shares
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import Item
from trainers.training.guides import last_word_logits
from trainers.training.losses import map_loss

WIDTH = 32


def tiles_of(*shapes):
    """Cells (n, 3) of tiles of these rows and columns."""
    return torch.cat([torch.cartesian_prod(torch.tensor([i]), *map(torch.arange, own)) for i, own in enumerate(shapes)])


def pictures(*layouts, frame=False, seed=0):
    """Inputs of pictures cut into tiles so."""
    torch.manual_seed(seed)
    cells = [tiles_of(*layout) for layout in layouts]
    count = torch.tensor([len(own) for own in cells])
    valid = torch.arange(int(count.max()) + 1) < count[:, None]
    whole = torch.full((*valid.shape, 3), -1)
    for row, own in zip(whole, cells, strict=True):
        row[: len(own)] = own
    rows, words = len(layouts), 4
    return PruneInputs(
        torch.randn(*valid.shape, WIDTH),
        valid,
        whole,
        torch.randn(rows, words, WIDTH),
        torch.ones(rows, words, dtype=torch.bool),
        {"frame": whole[..., 0].clamp_min(0) if frame else torch.zeros_like(valid, dtype=torch.long)},
    )


def tiny(**options):
    torch.manual_seed(1)
    return RegionFocus(**{**RegionFocus.tiny_config(WIDTH, WIDTH), **options}).eval()


def slow_zoom(cells, first, share):
    """Which tokens are looked at, and what the whole picture says of each, cell by cell."""
    base = [i for i, cell in enumerate(cells) if cell[0] == 0]
    side = {tile: [1 + max(c[axis] for c in cells if c[0] == tile) for axis in (1, 2)] for tile in (0, 1)}
    tiles = [-(-side[1][axis] // side[0][axis]) for axis in (0, 1)]

    def tile_of(cell):
        return tuple(int(Fraction(cell[1 + axis] * tiles[axis], side[cell[0]][axis])) for axis in (0, 1))

    best = sorted(base, key=lambda i: -first[i])[: max(1, int(share * len(base)))]
    hit = {tile_of(cells[i]) for i in best}
    seen = [i for i, cell in enumerate(cells) if cell[0] == 0 or tile_of(cell) in hit]
    said = []
    for cell in cells:
        row, column = (int(Fraction(cell[1 + axis] * side[0][axis], side[cell[0]][axis])) for axis in (0, 1))
        said.append(first[cells.index([0, row, column])])
    return seen, said


@pytest.mark.parametrize("share", [0.02, 0.1, 0.25, 1.0])
def test_zooming_equals_a_loop_over_cells(share):
    inputs = pictures([(6, 6), (12, 18)], [(6, 6), (9, 11)], [(4, 4), (5, 13)])
    pyramid, first = Pyramid(inputs), torch.randn(3, inputs.valid.shape[1])
    assert pyramid.there.all()
    seen, said = pyramid.zoom(first, share)
    for image in range(3):
        real = inputs.valid[image]
        expected, below = slow_zoom(inputs.cells[image, real].tolist(), first[image].tolist(), share)
        assert seen[image].nonzero()[:, 0].tolist() == expected
        torch.testing.assert_close(said[image, real], torch.tensor(below))
    assert share == 1.0 or not seen[0][inputs.valid[0]].all()


@torch.no_grad()
def test_what_is_not_looked_at_comes_last_and_the_whole_picture_first_if_wanted():
    inputs = pictures([(6, 6), (12, 18)])
    scores, base = tiny(share=0.03).score(inputs)[0], inputs.cells[0, :, 0] == 0
    near, real = scores > -APART / 2, inputs.valid[0]
    assert near[base].all() and 0 < int(near[real].sum()) < int(real.sum())
    shared = scores[near & real].exp().sum()
    torch.testing.assert_close(shared, torch.ones(()), rtol=1e-4, atol=1e-4)
    kept = tiny(share=0.03, whole="first")(inputs, 40).index[0]
    assert (inputs.cells[0, kept, 0] == 0).sum() == 36
    assert torch.equal(kept, tiny(share=0.03, whole="first")(inputs, 40).index[0])


@torch.no_grad()
def test_one_tile_is_one_level_and_so_is_what_has_no_whole_picture():
    for layout, frame in (
        ([(6, 6)], False),
        ([(5, 5), (5, 5)], True),
        ([(5, 5), (5, 5)], False),
        ([(3, 3)] * 3, False),
    ):
        inputs = pictures(layout, frame=frame)
        scores, level = (tiny(pyramid=own).score(inputs)[inputs.valid] for own in ("auto", "never"))
        torch.testing.assert_close(scores, level)
    inputs = pictures([(6, 6)], [(6, 6), (12, 12)])  # neighbours change nothing
    single = pictures([(6, 6)])
    alone = replace(single, features=inputs.features[:1, :37], text=inputs.text[:1])
    torch.testing.assert_close(tiny().score(inputs)[0, :36], tiny().score(alone)[0, :36], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_always_refuses_what_is_no_pyramid():
    pruner = tiny(pyramid="always")
    pruner.score(pictures([(6, 6), (12, 12)], [(6, 6)]))
    for layout, frame in (([(5, 5), (9, 9)], True), ([(3, 3)] * 3, False)):
        with pytest.raises(PruneZooError, match="give pyramid='auto'"):
            pruner.score(pictures(layout, frame=frame))
    with pytest.raises(PruneZooError, match="share=0 must lie in"):
        build_pruner("region_focus", share=0)
    with pytest.raises(PruneZooError, match="pyramid"):
        build_pruner("region_focus", pyramid="sometimes")


def test_shares_are_the_mean_of_softmaxes():
    logits, seen = torch.randn(2, 2, 3, 5), torch.tensor([[True, True, True, False, True], [True] * 5])
    found = shares(logits, seen)
    for image in range(2):
        expected = logits[image][..., seen[image]].softmax(-1).mean((0, 1))
        torch.testing.assert_close(found[image, seen[image]].exp(), expected)
    assert shares(logits, torch.zeros(2, 5, dtype=torch.bool)).isfinite().all()


@torch.no_grad()
def test_the_last_word_asks():
    pruner, inputs = build("region_focus"), make_inputs()
    assert inputs.text is not None and inputs.text_valid is not None
    maps = pruner.maps(inputs, inputs.valid)
    assert maps.shape == (3, 2, 3, inputs.valid.shape[1])
    text = inputs.text.clone()
    text[:, 0] += 1.0
    assert (pruner.maps(replace(inputs, text=text), inputs.valid) - maps)[0].abs().max() > 1e-4


def test_the_loss_is_zero_for_a_copy_and_equals_a_loop():
    torch.manual_seed(0)
    teacher, valid = torch.randn(2, 2, 3, 6), torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    assert map_loss(teacher + 5.0, teacher, valid).item() == pytest.approx(0, abs=1e-6), "no softmax sees a constant"
    student = torch.randn(2, 2, 3, 6, requires_grad=True)
    terms = []
    for image in range(2):
        for one, two in zip(student[image].flatten(0, 1), teacher[image].flatten(0, 1), strict=True):
            z, t = one[valid[image]] / 2, two[valid[image]] / 2
            kl = (t.softmax(0) * (t.log_softmax(0) - z.log_softmax(0))).sum()
            terms.append((kl + ((z - z.mean()) - (t - t.mean())).square().mean()) / 2)
    torch.testing.assert_close(map_loss(student, teacher, valid), torch.stack(terms).mean())
    map_loss(student, teacher, valid).backward()
    assert student.grad is not None and student.grad.isfinite().all() and not student.grad[0, ..., 4:].any()


def test_the_teacher_is_the_models_own_attention(tiny_llava):
    turns = [(("what color is the ball ?", "red"),), (("is it left ?", "no"),)]
    items = [Item(id="x", image=make_image(n), turns=t, group="all") for n, t in enumerate(turns)]
    encoded = encode(tiny_llava.vlm, ConversationCollator(tiny_llava.processor)(items))
    found = last_word_logits(tiny_llava.vlm, encoded, [1, 0])
    tiny_llava.vlm.set_attn_implementation({"text_config": "eager"})
    maps = full_forward(tiny_llava.vlm, encoded, output_attentions=True).attentions
    tiny_llava.vlm.set_attn_implementation({"text_config": "sdpa"})
    for row in range(2):
        last = int((encoded.labels[row] != -100).int().argmax()) - 1
        for place, layer in enumerate([1, 0]):
            expected = maps[layer][row, :, last, encoded.slots[row]]
            expected = expected / expected.sum(-1, keepdim=True)
            torch.testing.assert_close(found[row, place].softmax(-1), expected, rtol=1e-4, atol=1e-6)
