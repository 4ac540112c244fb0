"""CDPruner beside its golden figures: an independent slow choice, options, and tokens without number."""

from dataclasses import replace

import pytest
import torch
from made_inputs import GRIDS, make_inputs, take_rows
from torch.nn import functional

from prunezoo import PruneZooError, build_pruner
from prunezoo.core.roles import Role


def slow(features, words, count, blend=None):
    """One picture: the largest determinant, worked out anew for every token of every step."""
    unit = functional.normalize(features.double(), dim=-1)
    raw = (unit @ functional.normalize(words.double(), dim=-1).T).mean(1)
    r = (raw - raw.min() + 1e-6) / (raw.max() - raw.min())
    similarity = unit @ unit.T
    kernel = r[:, None] * similarity * r
    if blend is not None:
        kernel = (1 - blend) * similarity + blend * kernel
    chosen: list[int] = []
    for _ in range(count):
        worth = {
            i: torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]).item()
            for i in range(len(features))
            if i not in chosen
        }
        chosen.append(max(worth, key=worth.get))
    return sorted(chosen)


@pytest.mark.parametrize("options", [{}, {"kernel": "blend"}, {"kernel": "blend", "weight": 0.9}])
def test_it_is_the_slow_choice_of_ragged_pictures(options):
    inputs, blend = make_inputs(pad=4, text_pad=3), options.get("weight", 0.5) if options else None
    keep = torch.tensor([12, 5, 1])
    output = build_pruner("cdpruner", **options)(inputs, keep)
    for row, count in enumerate(keep.tolist()):
        words = inputs.text[row, inputs.text_valid[row]]
        expected = slow(inputs.features[row, inputs.valid[row]], words, count, blend)
        assert output.index[row, :count].tolist() == expected


def test_halves_are_chosen_from_apart():
    inputs = make_inputs(pad=2)
    for count in (1, 8, 9, 1000):
        output = build_pruner("cdpruner", halves=True)(inputs, count)
        for row, n in enumerate(inputs.valid.sum(1).tolist()):
            kept = output.index[row, : output.count[row]]
            assert int((kept < n // 2).sum()) == min(count, n) // 2
    whole = build_pruner("cdpruner")(take_rows(make_inputs(), [0], 18), 4).index
    assert torch.equal(build_pruner("cdpruner", halves=True)(make_inputs(), 8).index[:1, :4], whole)


def test_only_words_that_are_asked_count():
    inputs = make_inputs()
    roles = torch.full(inputs.text_valid.shape, int(Role.QUESTION))
    roles[:, 1:] = Role.TEMPLATE
    told = build_pruner("cdpruner")(replace(inputs, text_roles=roles), 6)
    alone = build_pruner("cdpruner")(take_rows(inputs, [0, 1, 2], None, 1), 6)
    assert torch.equal(told.index, alone.index)
    assert not torch.equal(told.index, build_pruner("cdpruner")(inputs, 6).index)


def test_tokens_of_few_dimensions_are_as_many_as_asked():
    """Where the authors' code gives fewer: rank 3, few distinct tokens, and all equally relevant."""
    inputs = make_inputs(pad=3)
    low = replace(inputs, features=inputs.features[..., :3] @ torch.randn(3, 32))
    few = replace(inputs, features=inputs.features[:, torch.arange(inputs.valid.shape[1]) % 5])
    same = replace(inputs, text=torch.zeros_like(inputs.text))
    for one in (low, few, same):
        output = build_pruner("cdpruner")(one, 20)
        assert output.count.tolist() == [20, 20, 20]
    assert slow_spread(same, build_pruner("cdpruner")(same, 6).index)
    kept = build_pruner("cdpruner")(few, 5).index
    assert all(set((row % 5).tolist()) == set(range(5)) for row in kept), "one of each, first"


def slow_spread(inputs, index):
    """Whether nothing but unlikeness chose: the first is the lowest, since all are alike."""
    for row, (h, w) in enumerate(GRIDS):
        unit = functional.normalize(inputs.features[row, : h * w].double(), dim=-1)
        chosen = [0]
        while len(chosen) < 6:
            worth = [
                -1.0 if i in chosen else torch.linalg.det(unit[[*chosen, i]] @ unit[[*chosen, i]].T).item()
                for i in range(h * w)
            ]
            chosen.append(worth.index(max(worth)))
        if sorted(chosen) != index[row].tolist():
            return False
    return True


def test_the_batch_matters_only_where_it_is_told_to():
    inputs = make_inputs()
    inputs.features[1:] *= torch.linspace(-1, 1, 32)  # another range of relevance
    alone = take_rows(inputs, [0])
    for scaling, equal in (("image", True), ("batch", False)):
        pruner = build_pruner("cdpruner", scaling=scaling, kernel="blend")
        kept = [torch.equal(pruner(inputs, k).index[0], pruner(alone, k).index[0]) for k in range(2, 30)]
        assert all(kept) == equal


@pytest.mark.parametrize(
    ("field", "value"), [("relevance", "text"), ("scaling", "tile"), ("kernel", "sum"), ("weight", 1.5)]
)
def test_fields_out_of_range_are_refused(field, value):
    with pytest.raises(PruneZooError, match=f"{field}='?{value}'? of cdpruner is"):
        build_pruner("cdpruner", **{field: value})


def test_no_prompt_is_refused():
    with pytest.raises(PruneZooError, match="'cdpruner' reads the prompt and got none"):
        build_pruner("cdpruner")(replace(make_inputs(), text=None), 3)
