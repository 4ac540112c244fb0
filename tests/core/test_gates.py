"""Soft and hard top-k: budgets met, gradients exact."""

import pytest
import torch

from prunezoo.core.gates import budgeted_sigmoid, topk_gates, topk_mask
from prunezoo.core.plan import mask_to_index

VALID = torch.tensor([[True] * 8, [True] * 5 + [False] * 3])
KEEP = torch.tensor([3, 2])


@pytest.fixture
def scores():
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_soft_gates_meet_the_budget_with_exact_gradients(scores, temperature):
    soft = budgeted_sigmoid(scores, VALID, KEEP, temperature)
    torch.testing.assert_close(soft.sum(1), KEEP.double())
    assert (soft[~VALID] == 0).all() and (soft >= 0).all() and (soft <= 1).all()
    if temperature >= 1:
        assert torch.autograd.gradcheck(lambda s: budgeted_sigmoid(s, VALID, KEEP, temperature), (scores,))


def test_the_budget_is_a_constraint(scores):
    """Raising one score takes from the others exactly what it gains."""
    gradient = torch.autograd.grad(budgeted_sigmoid(scores, VALID, KEEP)[0, 4], scores)[0][0]
    assert gradient[4] > 0 and (gradient[:4] < 0).all() and abs(float(gradient.sum())) < 1e-9
    summed = torch.autograd.grad(budgeted_sigmoid(scores, VALID, KEEP).sum(), scores)[0]
    assert summed.abs().max() < 1e-9


def test_straight_through_is_hard_in_value_and_soft_in_gradient(scores):
    gates = topk_gates(scores, VALID, KEEP)
    assert torch.equal(gates.detach(), topk_mask(scores, VALID, KEEP).double())
    weights = torch.arange(16.0, dtype=torch.float64).view(2, 8)
    hard = torch.autograd.grad((gates * weights).sum(), scores)[0]
    soft = torch.autograd.grad((budgeted_sigmoid(scores, VALID, KEEP) * weights).sum(), scores)[0]
    assert torch.equal(hard, soft)


def test_keeping_all_or_nearly_equal_or_far_scores_stays_finite():
    for values in (torch.zeros(1, 4), torch.tensor([[1e4, -1e4, 0.0, 3.0]]), torch.full((1, 4), -1e30)):
        for keep in (1, 2, 4):
            scores = values.clone().requires_grad_()
            gates = topk_gates(scores, torch.ones(1, 4, dtype=torch.bool), torch.tensor([keep]))
            gates.square().sum().backward()
            assert gates.sum() == keep and scores.grad.isfinite().all()


def test_ties_go_to_the_lower_slot_and_padding_never_wins():
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [-torch.inf, -torch.inf, 5.0, 5.0]])
    valid = torch.tensor([[True, True, True, True], [True, True, False, False]])
    assert topk_mask(scores, valid, torch.tensor([2, 1])).tolist() == [
        [True, True, False, False],
        [True, False, False, False],
    ]
    index, kept = mask_to_index(torch.tensor([[False, True, True], [False, False, True]]))
    assert index.tolist() == [[1, 2], [2, 0]] and kept.tolist() == [[True, True], [True, False]]
