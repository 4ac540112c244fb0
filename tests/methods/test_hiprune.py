"""HiPrune against a slow reading of its definition, and what neither that nor the shared tests show."""

from dataclasses import replace

import pytest
import torch
from made_inputs import make_inputs
from tiny_llava import LONG, make_image

from prunezoo import PruneZooError, attach, build_pruner, encode
from prunezoo.core.roles import Role
from prunezoo.host import run_pruned

OBJECT, LAST = "received_attention@9/24", "received_attention"
STATES, TEXT = "vision_states", "text_features"


def with_signals(inputs, **others):
    """With attention of both blocks, and what a text encoder's words meet."""
    random = torch.Generator().manual_seed(5)
    shapes = {OBJECT: inputs.valid.shape, LAST: inputs.valid.shape, STATES: (*inputs.valid.shape, 6)}
    made = {name: torch.rand(shape, generator=random) for name, shape in shapes.items()}
    made[TEXT] = torch.randn(len(inputs.valid), 6, generator=random)
    return replace(inputs, signals={**inputs.signals, **made, **others})


def in_tiles(inputs):
    """The last image, of 3 rows and 7 columns, as a thumbnail of 3 x 2 and a grid of 3 x 5."""
    cells = inputs.cells.clone()
    parts = [(tile, row, column) for tile, wide in ((0, 2), (1, 5)) for row in range(3) for column in range(wide)]
    cells[2, :21] = torch.tensor(parts)
    return replace(inputs, cells=cells, host_cells=None)


def neighbours(cells, token, kind):
    """Of one token, among the cells of its image, by rows of its own tile."""
    tile = [place for place, cell in enumerate(cells) if cell[0] == cells[token][0]]
    wide = max(cells[place][2] for place in tile) + 1
    if kind == "flat":
        at = tile.index(token)
        return {tile[min(max(at + step, 0), len(tile) - 1)] for step in (-1, 1, -wide, wide)}
    _, row, column = cells[token]
    return {p for p in tile if abs(cells[p][1] - row) + abs(cells[p][2] - column) == 1}


def best(scores, among, count):
    return sorted(sorted(among), key=lambda place: -scores[place])[:count]


def slow(inputs, row, keep, alpha=0.1, kind="flat"):
    """One image, token by token."""
    count = int(inputs.valid[row].sum())
    cells = inputs.cells[row, :count].tolist()
    first, last = (inputs.signal(name)[row, :count].tolist() for name in (OBJECT, LAST))
    anchors = best(first, range(count), round(alpha * keep / 5))
    buffers = set().union(*(neighbours(cells, token, kind) for token in anchors)) - set(anchors)
    taken = [*anchors, *best(first, buffers, keep)][:keep]
    return sorted([*taken, *best(last, set(range(count)) - set(taken), keep - len(taken))])


@pytest.mark.parametrize("kind", ["flat", "grid"])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("keep", [1, 3, 12, 20])
def test_it_is_its_definition(kind, alpha, keep):
    inputs = with_signals(in_tiles(make_inputs(pad=3)))
    output = build_pruner("hiprune", alpha=alpha, neighbours=kind)(inputs, keep)
    for row, index in enumerate(output.index.tolist()):
        assert index == slow(inputs, row, keep, alpha, kind)


def test_neighbours_run_over_ends_of_rows_or_do_not():
    inputs = make_inputs(grids=((4, 5),))
    for peak, flat, grid in (
        (9, {4, 8, 10, 14}, {4, 8, 14}),
        (0, {1, 5}, {1, 5}),
        (17, {12, 16, 18, 19}, {12, 16, 18}),
    ):
        first = torch.zeros(1, 20).index_fill(1, torch.tensor([peak]), 1.0)
        given = with_signals(inputs, **{OBJECT: first})
        for kind, expected in (("flat", flat), ("grid", grid)):
            output = build_pruner("hiprune", alpha=1.0, neighbours=kind)(given, 5)
            assert expected <= set(output.index[0].tolist()) - {peak}, kind
            assert slow(given, 0, 5, 1.0, kind) == output.index[0].tolist()


def test_what_an_earlier_stage_took_is_no_neighbour():
    inputs = with_signals(make_inputs(grids=((4, 5),)))
    first = torch.zeros(1, 20).index_fill(1, torch.tensor([7]), 1.0)
    inputs = replace(inputs, valid=inputs.valid.clone().index_fill_(1, torch.tensor([6, 12]), False))
    kept = build_pruner("hiprune", alpha=1.0)(with_signals(inputs, **{OBJECT: first}), 3).index[0].tolist()
    assert kept == [2, 7, 8]


def ordered(likeness, among, count):
    return set(best(likeness.tolist(), among, count))


@pytest.mark.parametrize("words", ["embeddings", "text_features"])
@pytest.mark.parametrize(("of", "share", "by_text"), [("budget", 0.25, 3), ("image", 0.1, 2), ("image", 1.0, 12)])
def test_the_question_has_its_share_of_the_budget(words, of, share, by_text):
    inputs = with_signals(make_inputs(grids=((4, 5), (4, 5))))
    roles = torch.full(inputs.text_valid.shape, Role.QUESTION).index_fill(1, torch.tensor([0]), Role.TEMPLATE)
    inputs = replace(inputs, text_roles=roles)
    output = build_pruner("hiprune", text=share, text_of=of, words=words)(inputs, 12)
    for row in range(2):
        plain = set(slow(inputs, row, 12 - by_text))
        asked = inputs.text_valid[row] & (roles[row] == Role.QUESTION)
        tokens, question = inputs.features[row], inputs.text[row, asked].mean(0)
        if words == "text_features":
            tokens, question = inputs.signal(STATES)[row], inputs.signal(TEXT)[row]
        likeness = torch.cosine_similarity(tokens, question[None])
        assert set(output.index[row].tolist()) == plain | ordered(likeness, set(range(20)) - plain, by_text)


@torch.no_grad()
def test_a_text_encoder_of_the_towers_width_is_taken_and_another_refused(deep_llava):
    vlm, batch = deep_llava.vlm, deep_llava.batch([LONG], [[make_image(0)]])
    width = vlm.config.vision_config.hidden_size
    with attach(vlm, build_pruner("hiprune", text=0.5, words=TEXT), 9, text_encoder=lambda *_: torch.ones(1, width)):
        vlm(**batch)
    narrow = attach(vlm, build_pruner("hiprune", text=0.5, words=TEXT), 9, text_encoder=lambda *_: torch.ones(1, 4))
    with pytest.raises(PruneZooError, match=rf"width {width}, and got 4: .*words=embeddings"), narrow:
        vlm(**batch)


def test_a_prompt_is_wanted_for_the_question():
    inputs = replace(with_signals(make_inputs()), text=None, text_valid=None)
    with pytest.raises(PruneZooError, match="give text, or set text=0"):
        build_pruner("hiprune", text=0.1)(inputs, 5)


@torch.no_grad()
def test_the_object_block_goes_with_the_depth_or_is_given(deep_llava):
    """Two blocks of the tiny tower run of three: 9/24 of three is the first."""
    vlm, batch = deep_llava.vlm, deep_llava.batch([LONG], [[make_image(0)]])
    kept = []
    for block in ("9/24", 0, 1, "2/3"):
        pruner = build_pruner("hiprune", alpha=1.0, block=block)
        kept.append(run_pruned(vlm, encode(vlm, batch, pruner.needs), pruner, 12).output.index.tolist())
    assert kept[0] == kept[1] != kept[2] == kept[3]


@pytest.mark.parametrize(
    "bad",
    [{"alpha": 1.5}, {"text": -0.1}, {"block": "middle"}, {"block": "9/0"}, {"neighbours": "round"}, {"text_of": "all"},
     {"words": "ids"}],
    ids=str,
)  # fmt: skip
def test_what_is_out_of_range_is_refused(bad):
    with pytest.raises(PruneZooError, match=f"{next(iter(bad))}=.*hiprune"):
        build_pruner("hiprune", **bad)
