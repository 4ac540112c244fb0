"""Several tokens a step of `select="mmr"`."""

import pytest
import torch
from made_inputs import build, make_inputs

from prunezoo import PruneZooError
from prunezoo.core.select import Select


def slow(scores, features, count, weight, step):
    """One picture, from the formula, in double precision."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    shares = (scores.double() - scores.min()) / (scores.max() - scores.min() + 1e-6)
    chosen = [int(scores.argmax())]
    while len(chosen) < count:
        gain = weight * shares - (1 - weight) * (unit @ unit[chosen].T).amax(1)
        gain[chosen] = -torch.inf
        chosen += gain.argsort(descending=True)[: min(step, count - len(chosen))].tolist()
    return sorted(chosen)


@pytest.mark.parametrize("step", [1, 2, 4, 100])
def test_so_many_are_chosen_a_step_by_the_same_values(step):
    inputs, pruner = make_inputs(pad=2), build("fastervlm")
    pruner.select = f"mmr:0.3:{step}"
    keep = torch.tensor([17, 1, 10])
    output = pruner(inputs, keep)
    for row, count in enumerate(keep.tolist()):
        own = inputs.valid[row]
        expected = slow(output.scores[row, own], inputs.features[row, own], count, 0.3, step)
        assert output.index[row, :count].tolist() == expected


def test_twins_may_come_in_together():
    inputs, pruner = make_inputs(), build("fastervlm")
    inputs.features[:, 1:3] = inputs.features[:, :1] @ torch.linalg.qr(torch.randn(32, 32))[0]  # alike, and new
    inputs.signals["cls_attention"][:, :3] = torch.tensor([2.0, 1.9, 1.9])
    for select, both in (("mmr", False), ("mmr:0.5:2", True)):
        pruner.select = select
        assert all(({1, 2} <= set(kept)) == both for kept in pruner(inputs, 3).index.tolist())


def test_it_reads_as_it_was_written():
    texts = {"mmr:0.5:4": "mmr:0.5:4", "mmr:.25:2": "mmr:0.25:2", "mmr:0.7:1": "mmr:0.7", "mmr:0.5:1": "mmr"}
    assert {text: str(Select.parse(text)) for text in texts} == texts
    for wrong in ("mmr:0.5:0", "mmr:0.5:", "mmr:0.5:1.5", "mmr::4", "tile:0.5:2", "mmr:0.5:-1", "mmr:0.5:2:2"):
        with pytest.raises(PruneZooError, match="select="):
            Select.parse(wrong)
