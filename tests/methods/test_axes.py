"""The axes of the survey: every method of ours says by what it decides, and what else is shown is what it does."""

import io
from typing import get_args

import pytest

from prunezoo.core.choosing import Criterion
from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.files import read_object
from prunezoo.core.registry import list_pruners, pruner_class, register_pruner
from trainers.cards.axes import KEEP, UNKNOWN, axes, lines_of
from trainers.cards.parts import CARDS, SPEED_FILE
from trainers.cli.terminal import Terminal
from trainers.list import print_axes


@pytest.mark.parametrize("name", list_pruners())
def test_every_method_says_by_what_it_decides(name):
    criteria = pruner_class(name).criteria
    assert criteria, f"{name}: say `criteria`; there are {get_args(Criterion)}"
    assert set(criteria) <= set(get_args(Criterion)) and len(set(criteria)) == len(criteria)
    assert len(criteria) == 1 or "none" not in criteria


def test_criteria_that_are_not_known_are_refused():
    class Guess(Pruner):
        criteria = ("feeling",)

        def score(self, inputs):
            return inputs.features.sum(-1)

    with pytest.raises(PruneZooError, match=r"Guess: criteria \['feeling'\] are unknown; there are: attention, "):
        register_pruner("guess")(Guess)
    assert "guess" not in list_pruners()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ppm", {"acts": "prompt", "leaves": "for good", "data": "training", "made": "trained", "prompt": "read"}),
        ("divprune", {"criterion": "diversity", "data": "none", "made": "one-shot", "prompt": "no"}),
        ("lvlm_csp", {"acts": "layer", "leaves": "for some layers", "prompt": "read"}),
        ("dtop", {"acts": "vision", "leaves": "in the tower", "made": "trained"}),
        ("vflowopt", {"data": "optional", "made": "one-shot", "count": "own"}),
        ("combined", {"criterion": "parts", "acts": "several", "prompt": "its parts"}),
    ],
)
def test_the_rest_is_what_the_class_does(name, expected):
    found = axes(name)
    assert {axis: found[axis] for axis in expected} == expected


def test_the_time_is_the_one_that_was_measured():
    rows = read_object(CARDS / SPEED_FILE, "rows", what="a measurement", remedy="measure it")["rows"]
    (row,) = (row for row in rows if (row["pruner"], row["keep"], row["part"]) == ("ppm", KEEP, "end_to_end"))
    assert axes("ppm")["time"] == f"{row['speedup']:.2f} ({row['speedup_spread']:.2f})"
    assert axes("aim")["time"] == UNKNOWN and "aim" not in {row["pruner"] for row in rows}


def test_the_table_fits_where_the_list_does():
    console = Terminal(file=io.StringIO(), width=144)
    print_axes(list_pruners(), console)
    lines = console.file.getvalue().splitlines()
    header, cells = lines_of(list_pruners())
    assert max(map(len, lines)) <= 144
    for line in (header, *cells):
        assert any(all(cell in shown for cell in line) for shown in lines), line
