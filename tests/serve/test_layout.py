"""Positions of kept tokens, and images laid out for pruners; without vLLM."""

import pytest
import torch
from torch import Tensor

from prunezoo import build_pruner
from prunezoo.host.families import Visual
from prunezoo.serve.layout import prune_images
from prunezoo.serve.positions import MOST, append_offsets, correct_positions, distance, lay_positions, split_offsets

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
    assert whole[0].tolist() == [0, 1, 2, 6, 10, 12, 16, 17, 18, 19]
    assert distance(whole) == 10


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
