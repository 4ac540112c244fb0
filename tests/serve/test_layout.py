"""Positions of kept tokens, and images laid out for pruners; without vLLM."""

import pytest
import torch
from families import FAMILIES as TINY
from families import SIDE, Sample
from torch import Tensor

from prunezoo import build_pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.host.families import Visual
from prunezoo.serve.layout import prune_images
from prunezoo.serve.positions import (
    MOST,
    append_offsets,
    correct_positions,
    distance,
    lay_positions,
    move_tokens,
    split_offsets,
)
from prunezoo.serve.settings import Settings
from prunezoo.serve.shapes import AXES, Shape, family_of, most_newlines, offsets_of, shapes_of

PLACEHOLDER = 4


def prompt(*parts: int) -> Tensor:
    """Tokens: words 1, and for each negative number so many placeholders."""
    return torch.tensor([token for part in parts for token in ([PLACEHOLDER] * -part if part < 0 else [1] * part)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_offsets_survive_any_type(dtype):
    offsets = torch.stack([torch.arange(MOST), torch.arange(MOST).flip(0)], -1)
    features = torch.randn(MOST, 3).to(dtype)
    found, back = split_offsets(append_offsets(features, offsets), axes=2)
    assert torch.equal(back, offsets) and torch.equal(found, features) and found.dtype == dtype


def test_words_stand_where_they_would_and_kept_tokens_too():
    """Two images next to one another, of 9 and 6 tokens, of which 3 and 2 are left; then words."""
    ids = prompt(2, -3, -2, 3)
    table = lay_positions(len(ids), [(2, 3, 9), (5, 2, 6)])
    assert table[0].tolist() == [0, 1, 2, 2, 2, 11, 11, 17, 18, 19] and distance(table) == 10
    offsets = torch.tensor([[0], [4], [8], [1], [5]])
    whole = correct_positions(table, ids == PLACEHOLDER, offsets, 0)
    assert whole[1].tolist() == [0, 1, 2, 6, 10, 12, 16, 17, 18, 19]
    assert distance(whole) == 10


def test_two_axes_are_height_and_width_at_the_time_of_the_image():
    """An image of 3 rows and 2 columns, of which three tokens are left, between words."""
    ids = prompt(2, -3, 2)
    table = lay_positions(len(ids), [(2, 3, 3)])
    assert distance(table) == 0
    whole = correct_positions(table, ids == PLACEHOLDER, torch.tensor([[0, 1], [1, 0], [2, 1]]), 0)
    assert whole.tolist() == [[0, 1, 2, 2, 2, 5, 6], [0, 1, 2, 3, 4, 5, 6], [0, 1, 3, 2, 3, 5, 6]]
    assert distance(whole) == 0
    part = correct_positions(table, ids == PLACEHOLDER, torch.tensor([[0, 1]]), 2)  # as in a small step
    then = correct_positions(part, ids == PLACEHOLDER, torch.tensor([[1, 0], [2, 1]]), 3)
    assert torch.equal(then, whole)
    assert torch.equal(move_tokens(whole, torch.tensor([4]), torch.tensor([[2, 1]])), whole)


def test_positions_may_be_corrected_chunk_by_chunk_and_again():
    """As with a small budget of a step, after a prefix that was cached, and after a request was put off."""
    ids = prompt(2, -3, 1, -2)
    table = lay_positions(len(ids), [(2, 3, 9), (6, 2, 6)])
    offsets = torch.tensor([[0], [4], [8], [1], [3]])
    whole = correct_positions(table, ids == PLACEHOLDER, offsets, 0)
    first = correct_positions(table, ids == PLACEHOLDER, offsets[:2], 2)
    then = correct_positions(first, ids == PLACEHOLDER, offsets[2:], 4)
    assert torch.equal(then, whole)
    assert torch.equal(correct_positions(whole, ids == PLACEHOLDER, offsets, 0), whole)
    assert distance(first) == distance(whole) == 2 + 9 + 1 + 6 - 8  # behind all tokens, though the image comes last


def test_images_of_several_sizes_and_budgets_are_pruned_as_alone():
    torch.manual_seed(0)
    visuals = []
    for rows, columns in ((4, 5), (3, 3), (4, 5)):
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        cells = torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1)
        signals = {"cls_attention": torch.rand(rows * columns)}
        visuals.append(Visual("image", torch.randn(rows * columns, 8), cells, signals=signals))
    text = [torch.randn(words, 8) for words in (3, 5, 1)]
    for name in ("divprune", "fastervlm", "pool", "asked"):
        pruner = build_pruner(name)
        together = prune_images(pruner, visuals, [6, 9, 2], text)
        for i, count in enumerate((6, 9, 2)):
            (alone,) = prune_images(pruner, visuals[i : i + 1], [count], text[i : i + 1])
            assert torch.equal(alone.slots, together[i].slots) and len(alone.slots) == len(alone.features) == count
            torch.testing.assert_close(alone.features, together[i].features)
        assert together[0].slots.tolist() != together[2].slots.tolist()


def test_newlines_stay_and_patches_are_chosen_as_without_them():
    """Two images of 3 rows, of 4 and 2 columns, each row with a newline."""
    torch.manual_seed(0)
    visuals, bare = [], []
    for columns in (4, 2):
        cells = torch.tensor([[0, row, column] for row in range(3) for column in [*range(columns), -1]])
        features, signal = torch.randn(len(cells), 8), torch.rand(len(cells))
        visuals.append(Visual("image", features, cells, signals={"cls_attention": signal}))
        own = cells[:, 2] >= 0
        bare.append(Visual("image", features[own], cells[own], signals={"cls_attention": signal[own]}))
    for name in ("divprune", "fastervlm", "pool"):
        pruner = build_pruner(name)
        together = prune_images(pruner, visuals, [3 + 5, 3 + 2], None)
        for kept, visual, alone in zip(together, visuals, prune_images(pruner, bare, [5, 2], None), strict=True):
            lines = visual.cells[:, 2] < 0
            assert kept.slots.tolist() == sorted(kept.slots.tolist())
            ends = lines[kept.slots]
            assert torch.equal(kept.features[ends], visual.features[lines]) and int(ends.sum()) == 3
            torch.testing.assert_close(kept.features[~ends], alone.features)
            assert torch.equal((~lines).nonzero()[:, 0][alone.slots], kept.slots[~ends])


@pytest.mark.parametrize("name", ["llava_siglip", *AXES])
def test_an_image_takes_what_its_size_says(name):
    """Patches, newlines and positions by the config alone, against the model's own prompt and positions."""
    family, sizes = TINY[name], [(48, 48), (48, 24), (24, 40)]
    batch = family.batch([Sample((size,), 3) for size in sizes], side="right")
    config = family.config()
    shapes = shapes_of(config, batch)
    own = [family.image_ids(size).count(config.image_token_id) for size in sizes]
    assert [shape.patches + shape.newlines for shape in shapes] == own
    vlm = family_of(config, family.vlm)
    positions = vlm.positions(batch, batch["attention_mask"].bool(), generating=False)
    for row, (shape, mask) in enumerate(zip(shapes, batch["attention_mask"].bool(), strict=True)):
        furthest = int(positions[..., row, :][..., mask].max())
        assert furthest == shape.extent + int(mask.sum()) - own[row] - 1
        assert shape.left(Settings("uniform", 2)) == 2 + shape.newlines <= 2 + most_newlines(config)
        assert shape.left(Settings("uniform", 1.0)) == own[row]
    assert any(shape.newlines for shape in shapes) == (name in ("llava_next", "llava_onevision"))


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_offsets_are_those_of_the_model(name):
    """Tokens of an image from where it begins."""
    family = TINY[name]
    batch = family.batch([Sample(((48, 2 * SIDE - 8),), 3)])
    config, vlm = family.config(), family_of(family.config(), family.vlm)
    (cells,) = vlm.cells("image", batch)
    image = batch["input_ids"][0] == config.image_token_id
    positions = vlm.positions(batch, batch["attention_mask"].bool(), generating=False)[..., 0, image]
    begin = positions.reshape(-1, len(cells))[0, 0]
    found = offsets_of(config, cells, torch.arange(len(cells)))
    assert torch.equal(begin + found.T, positions.reshape(-1, len(cells))[-found.shape[1] :])
    assert Shape.of(config, cells).extent == int(found.max()) + 1


def test_families_that_are_not_served_are_refused_with_the_reason():
    for name, why in {
        "qwen3_vl": "as its deepstack needs; llava, ",
        "gemma3": "'gemma3' cannot be served; llava, ",
    }.items():
        with pytest.raises(PruneZooError, match=why):
            family_of(TINY[name].config())
