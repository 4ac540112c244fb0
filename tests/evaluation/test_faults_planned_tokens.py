"""What `--equal-tokens` plans with is what a run then measures: for tokens that all go, come back, or are restored."""

import pytest
import torch
from made_inputs import ALL, build

from prunezoo import encode
from prunezoo.core.registry import pruner_class
from prunezoo.host import encode_needs, run_pruned
from trainers.evaluation.budgets import keep_for_mean, planned_mean

BY_SIGHT = ("catp", "todre")
"""Whose second stage sees how much it leaves: of this only the measured tokens can tell."""
BETWEEN = [name for name in ALL if pruner_class(name).stage != "prompt" and name not in BY_SIGHT]


@pytest.mark.parametrize("name", BETWEEN)
def test_planned_tokens_are_measured_tokens(name, deep_llava, mixed):
    pruner, available = build(name, vlm=deep_llava.vlm), torch.tensor([36] * 4)
    with torch.no_grad():
        run = run_pruned(deep_llava.vlm, encode(deep_llava.vlm, mixed, encode_needs(pruner)), pruner, 5)
    assert planned_mean(pruner, 5, available, 4).tolist() == run.tokens.tolist()


def test_as_many_tokens_in_the_mean_are_found_where_some_come_back():
    pruner, available = build("lvlm_csp"), torch.tensor([36])
    keep = keep_for_mean(pruner, 24, available, 4)
    assert abs(float(planned_mean(pruner, keep, available, 4)) - 24) <= 0.25
