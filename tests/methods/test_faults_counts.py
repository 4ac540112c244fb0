"""What a subclass of a scoring pruner asks its base for is what it gets, or it is refused: nothing is cut silently."""

import pytest
import torch
from made_inputs import make_inputs

from prunezoo import Pruner, PruneZooError
from prunezoo.core.checks import deferred, settle

COUNTS = torch.tensor([7, 3])


class Norm(Pruner):
    """The largest tokens."""

    name = "norm"

    def score(self, inputs):
        return inputs.features.norm(dim=-1)


class Alone(Norm):
    """Keeps more than it is asked for, and need not know how the base tells widths."""

    exact = False

    def reduce(self, inputs, keep):
        return super().reduce(inputs, COUNTS)


class Greedy(Norm):
    """Says that it is exact, and is not."""

    def reduce(self, inputs, keep):
        return super().reduce(inputs, keep + 1)


@pytest.fixture
def inputs():
    return make_inputs([(6, 6), (4, 5)])


@pytest.mark.parametrize("select", ["top", "mmr:0.5", "tile"])
def test_a_pruner_that_decides_alone_gets_what_it_asks_for(inputs, select):
    alone, exact = Alone().eval(), Norm().eval()
    alone.select = exact.select = select
    output, expected = alone(inputs, 2), exact(inputs, COUNTS)
    assert output.counts == tuple(COUNTS.tolist())
    assert torch.equal(output.index, expected.index) and torch.equal(output.valid, expected.valid)


def test_more_than_there_is_is_all_there_is(inputs, monkeypatch):
    monkeypatch.setitem(globals(), "COUNTS", torch.tensor([99, 99]))
    assert Alone().eval()(inputs, 2).counts == (36, 20)


def test_an_exact_pruner_that_asks_for_more_is_refused(inputs):
    with pytest.raises(PruneZooError, match=r"pruner 'norm' chose \[6, 6\] tokens where \[5, 5\] were asked for"):
        Greedy().eval()(inputs, 5)
    with deferred() as checks:
        Greedy().eval()(inputs, 5)
    with pytest.raises(PruneZooError, match="chose"):
        settle(checks)
