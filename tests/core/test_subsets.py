"""The distribution over subsets against brute-force enumeration, and what a policy gradient through it does."""

import itertools
import math

import pytest
import torch

from prunezoo.core.subsets import draw_subsets, log_probability, pick_entropy, pick_kl, subset_mask

SCORES = torch.tensor([[0.3, -1.2, 2.0, 0.0, 0.7]], dtype=torch.float64)
N, K = 5, 3


def enumerate_orders(scores):
    """Every order of K of N tokens, and its probability by the definition: one softmax after the other."""
    orders = list(itertools.permutations(range(N), K))
    probabilities = []
    for order in orders:
        left, p = list(range(N)), scores.new_ones(())
        for pick in order:
            p = p * scores[left].softmax(-1)[left.index(pick)]
            left.remove(pick)
        probabilities.append(p)
    return orders, torch.stack(probabilities)


def as_draws(orders):
    """The same orders as `draw_subsets` would give them."""
    whole = [list(order) + [i for i in range(N) if i not in order] for order in orders]
    return torch.tensor(whole)[:, None], (torch.arange(N) < K).expand(len(orders), 1, N)


def test_log_probability_and_its_gradient_equal_the_enumeration():
    scores = SCORES[0].clone().requires_grad_()
    orders, probabilities = enumerate_orders(scores)
    assert probabilities.sum().item() == pytest.approx(1.0)
    order, drawn = as_draws(orders)
    log_p = log_probability(scores[None], torch.ones(1, N, dtype=torch.bool), order, drawn)[:, 0]
    torch.testing.assert_close(log_p.double(), probabilities.log(), rtol=0, atol=1e-5)
    weights = torch.randn(len(orders), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (ours,) = torch.autograd.grad((weights * log_p).sum(), scores)
    (exact,) = torch.autograd.grad((weights * probabilities.log()).sum(), scores)
    assert exact.abs().max() > 0.1
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


def test_subsets_are_drawn_as_often_as_their_probability_says():
    draws = 40_000
    order, drawn = draw_subsets(
        SCORES, torch.ones(1, N, dtype=torch.bool), torch.tensor([K]), draws, torch.Generator().manual_seed(1)
    )
    assert drawn.sum(-1).eq(K).all()
    code = (order[:, 0, :K] * torch.tensor([25, 5, 1])).sum(-1)
    orders, probabilities = enumerate_orders(SCORES[0])
    for which, p in zip(orders, probabilities.tolist(), strict=True):
        share = (code == which[0] * 25 + which[1] * 5 + which[2]).float().mean().item()
        assert share == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / draws))


def test_the_gradient_of_draws_is_unbiased():
    """The mean of reward x gradient of log-probability goes to the exact gradient of the expected reward."""
    scores = SCORES[0].clone().requires_grad_()
    orders, probabilities = enumerate_orders(scores)
    worth = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], dtype=torch.float64)

    def reward(sets):  # depends on the set alone, and not by sums: tokens 0 and 3 are worth more together
        return (sets * worth).sum(-1) + 2 * sets[..., 0] * sets[..., 3]

    sets = torch.stack([torch.isin(torch.arange(N), torch.tensor(order)).double() for order in orders])
    (exact,) = torch.autograd.grad((probabilities * reward(sets)).sum(), scores)
    valid, generator = torch.ones(1, N, dtype=torch.bool), torch.Generator().manual_seed(2)
    order, drawn = draw_subsets(scores.detach()[None], valid, torch.tensor([K]), 60_000, generator)
    gains = reward(subset_mask(order, drawn).double()[:, 0])
    log_p = log_probability(scores[None], valid, order, drawn)[:, 0]
    (ours,) = torch.autograd.grad(((gains - gains.mean()) * log_p).mean(), scores)
    torch.testing.assert_close(ours, exact, rtol=0.03, atol=0.02)


def test_a_bandit_with_a_known_best_subset_is_solved():
    scores = torch.zeros(1, 8, requires_grad=True)
    valid, best = torch.ones(1, 8, dtype=torch.bool), torch.tensor([1, 4, 6])
    optimizer, generator = torch.optim.Adam([scores], lr=0.2), torch.Generator().manual_seed(3)
    for _ in range(150):
        order, drawn = draw_subsets(scores.detach(), valid, torch.tensor([3]), 16, generator)
        reward = subset_mask(order, drawn)[:, 0, best].all(-1).float() + 0.1 * subset_mask(order, drawn)[
            :, 0, best
        ].float().sum(-1)
        advantage = (reward - reward.mean()) / (reward.std() + 1e-4)
        loss = -(advantage * log_probability(scores, valid, order, drawn)[:, 0]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert scores[0].topk(3).indices.sort().values.tolist() == best.tolist()


def test_padding_is_never_drawn_and_changes_nothing():
    scores = torch.tensor([[1.0, 0.5, 99.0, 99.0], [0.1, 0.2, 0.3, 0.4]])
    valid = torch.tensor([[True, True, False, False], [True] * 4])
    keep = torch.tensor([1, 3])
    order, drawn = draw_subsets(scores, valid, keep, 50, torch.Generator().manual_seed(4))
    mask = subset_mask(order, drawn)
    assert not mask[:, 0, 2:].any() and mask.sum(-1).eq(keep).all()
    log_p = log_probability(scores, valid, order, drawn)
    alone = log_probability(scores[:1, :2], valid[:1, :2], order[:, :1, :2], drawn[:, :1, :2])
    torch.testing.assert_close(log_p[:, :1], alone)
    assert log_p.isfinite().all()


def test_entropy_and_kl_of_the_first_pick():
    valid = torch.tensor([[True, True, True, False], [True, True, False, False]])
    scores = torch.tensor([[0.0, 0.0, 0.0, 50.0], [100.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(pick_entropy(scores, valid), torch.tensor([math.log(3), 0.0]))
    assert pick_kl(scores, scores, valid).abs().max() < 1e-6
    other = torch.tensor([[1.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0]])
    expected = -math.log(3) - (other[0, :3].log_softmax(-1)).mean()
    torch.testing.assert_close(pick_kl(scores, other, valid)[0], expected)
