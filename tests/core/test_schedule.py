"""Schedules: files that are read strictly, the shape that is taken over, and PreCrop's closed form."""

import json
from itertools import pairwise

import pytest
import torch

from prunezoo import PruneZooError
from prunezoo.core.schedule import MOST_TOKENS, Schedule, precrop

GOOD = {"stage": "vision", "available": 576, "counts": [576, 300, 300, 64], "made_by": "hand"}


def test_saved_and_loaded_is_the_same(tmp_path):
    schedule = Schedule("layer", 36, (36, 20, 9), "a search")
    assert Schedule.load(schedule.save(tmp_path / "s.json")) == schedule


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "must be an object of stage, available, counts, made_by, and nothing else"),
        ({"stage": "visoin"}, r"stage='visoin'.*did you mean 'vision'"),
        ({"stage": 1}, "must be strings"),
        ({"available": 0}, "available=0 .*out of range"),
        ({"available": MOST_TOKENS + 1}, "out of range"),
        ({"available": 576.0}, "whole numbers"),
        ({"counts": "64"}, "whole numbers"),
        ({"counts": [True, 1]}, "whole numbers"),
        ({"counts": []}, "0 counts"),
        ({"counts": [9] * 257}, "257 counts"),
        ({"counts": [64, 65]}, "never rise"),
        ({"counts": [577, 64]}, "never rise"),
        ({"counts": [64, 0]}, "at least 1"),
        ({"made_by": "x" * 201}, "201 characters"),
    ],
    ids=str,
)
def test_what_is_no_schedule_is_refused_in_one_line(change, message, tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(PruneZooError, match=message) as error:
        Schedule.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2]", "{", '{"stage": "vision"}', json.dumps(GOOD)[:-1] + ', "stage": "layer"}'])
def test_files_that_are_something_else_are_refused(text, tmp_path):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(PruneZooError, match=r"s\.json"):
        Schedule.load(tmp_path / "s.json")
    with pytest.raises(PruneZooError, match=r"trainers\.schedule"):
        Schedule.load(tmp_path / "none.json")


def test_its_own_budget_is_met_exactly_and_others_in_shape():
    schedule = Schedule.from_dict(GOOD)
    keep, available = torch.tensor([64, 16, 576, 1]), torch.tensor([576, 144, 576, 25])
    steps = torch.stack(schedule.at((0, 1, 2, 3), keep, available, 4))
    assert steps[:, 0].tolist() == GOOD["counts"] and steps[:, 1].tolist() == [144, 75, 75, 16]
    assert steps[:, 2].tolist() == [576] * 4 and steps[0, 3] == 25 and steps[3, 3] == 1
    assert (steps.diff(dim=0) <= 0).all()
    # A method with fewer places has what is left there, and ends at what it is asked for.
    assert [int(s[0]) for s in schedule.at((1, 3), keep, available, 4)] == [300, 64]
    assert [int(s[0]) for s in schedule.at((0, 1), keep, available, 4)] == [576, 64]


@pytest.mark.parametrize(
    ("places", "depth", "message"),
    [((0, 1), 5, "of 4 vision blocks does not fit 5"), ((3,), 4, "acts at one"), ((0,), 4, "acts at one")],
)
def test_what_does_not_fit_is_refused(places, depth, message):
    with pytest.raises(PruneZooError, match=message):
        Schedule.from_dict(GOOD).at(places, torch.tensor([9]), torch.tensor([36]), depth)
    with pytest.raises(PruneZooError, match="drops nothing up to the last of the vision blocks"):
        Schedule("vision", 36, (36, 36, 4)).at((0, 1), torch.tensor([9]), torch.tensor([36]), 3)


def slow_precrop(costs, budget, steps=60):
    """The best of a grid over shares that never rise."""
    grid = [i / steps for i in range(1, steps + 1)]
    best, found = -torch.inf, None
    for one in grid:
        for two in [g for g in grid if g <= one]:
            left = budget - costs[0] * one - costs[1] * two
            third = min(left / costs[2], two)
            if third > 0:
                value = torch.tensor([one, two, third]).log().sum()
                if value > best:
                    best, found = value, (one, two, third)
    return found


@pytest.mark.parametrize("costs", [(1, 2, 4), (4, 2, 1), (1, 1, 1), (1, 9, 2), (3, 1, 8)], ids=str)
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_precrop_is_the_best_of_a_grid(costs, share):
    budget = share * sum(costs)
    found = precrop(costs, budget)
    assert all(one >= two - 1e-12 for one, two in pairwise(found)) and max(found) <= 1
    assert sum(c * p for c, p in zip(costs, found, strict=True)) == pytest.approx(budget)
    slow = slow_precrop(costs, budget)
    ours, theirs = (torch.tensor(one).log().sum() for one in (found, slow))
    assert ours >= theirs - 1e-6 and ours - theirs < 0.1


def test_precrop_is_even_where_costs_are_and_keeps_all_where_that_is_paid_for():
    assert precrop([5, 5, 5], 7.5) == pytest.approx([0.5] * 3)
    assert precrop([1, 2], 3) == precrop([1, 2], 9) == [1.0, 1.0]
    for costs, budget in (([], 1), ([1, 0], 1), ([1, -1], 1), ([1, 2], 0)):
        with pytest.raises(PruneZooError, match=r"costs|budget"):
            precrop(costs, budget)
