"""Budgets that are the mean over the decoder's layers, for pruners of every stage."""

import pytest
import torch
from fake_suite import tiny_pruner
from families import Sample, tiny_family

from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import build_pruner
from prunezoo.host import encode
from prunezoo.host.run import run_pruned
from prunezoo.host.signals.language import encode_needs
from trainers.evaluation.budgets import keep_for_mean, planned_mean


class Late(Pruner):
    """In front of the second and third layer; as a combination, behind a pruner of the prompt stage that keeps half."""

    name = "late"
    stage = "layer"
    combined = False

    def stages(self, depth):
        return (1, 2)

    def score(self, inputs):
        return inputs.features.norm(dim=-1)

    def parts(self, keep):
        return ((build_pruner("uniform").eval(), 0.5), (self, keep)) if self.combined else ((self, keep),)


@pytest.mark.parametrize("kind", ["uniform", "fastv", "late", "combined"])
def test_a_budget_can_be_the_mean_over_the_layers(kind):
    tiny = tiny_family("llava")
    pruner = Late().eval() if kind in ("late", "combined") else tiny_pruner(kind)
    pruner.combined = kind == "combined"
    encoded = encode(tiny.vlm, tiny.batch([Sample(((24, 24),), 5), Sample(((24, 24),), 3)]), encode_needs(pruner))
    available, depth = encoded.inputs.valid.sum(1), 3
    count = int(available[0])
    for keep in (1, 7, 0.5):
        measured = run_pruned(tiny.vlm, encoded, pruner, keep).tokens
        torch.testing.assert_close(measured, planned_mean(pruner, keep, available, depth))
    possible = [float(planned_mean(pruner, keep, available, depth)[0]) for keep in range(1, count + 1)]
    assert possible == sorted(possible)
    for wanted in range(1, count + 1):
        if possible[0] > wanted + 0.5:
            with pytest.raises(
                PruneZooError, match=f"reads {possible[0]:.1f} of {count} tokens in the mean over 3 lay"
            ):
                keep_for_mean(pruner, wanted, available, depth)
        else:
            mean = planned_mean(pruner, keep_for_mean(pruner, wanted, available, depth), available, depth)
            assert set((mean - wanted).abs().tolist()) == {min(abs(one - wanted) for one in possible)}
    least = {"uniform": 1, "fastv": (16 + 1 + 1) / 3, "late": (16 + 4 + 1) / 3, "combined": (8 + 3 + 1) / 3}
    assert count == 16 and possible[0] == pytest.approx(least[kind])
