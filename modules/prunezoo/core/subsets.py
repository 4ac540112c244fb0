"""A distribution over subsets: Plackett-Luce, picks without replacement. Pure functions; no state, no host.

A subset of k tokens is drawn one token after the other, each with the probability that a softmax over the scores of
those not yet drawn gives it (Plackett, 1975; Luce, 1959). What is drawn is an order; its probability is exact, while
that of the mere set would be a sum over k! orders. Where a reward depends on the set alone, the gradient of the order's
log-probability is as unbiased as the set's.

Letters: B images, N image tokens of an image (padded), G draws for each image, K tokens drawn (padded).
"""

import torch
from torch import Tensor


def draw_subsets(
    scores: Tensor, valid: Tensor, keep: Tensor, draws: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw ordered subsets, by the largest of Gumbel-perturbed scores (Kool et al., arXiv 1903.06059).

    Args:
        scores: ``(B, N)`` float, the logits of the first pick.
        valid: ``(B, N)`` bool, which tokens may be drawn.
        keep: ``(B,)`` long, tokens to draw of each image, at most its valid ones.
        draws: G.
        generator: Of the random numbers; the default one of the device if None.

    Returns:
        ``order (G, B, N)`` long, all slots of an image: those drawn first, in the order of drawing, then the others
        that could have been drawn, then padding; and ``drawn (G, B, N)`` bool, true for the first ``keep``.
    """
    uniform = torch.rand(draws, *scores.shape, device=scores.device, generator=generator)
    gumbel = -(-uniform.clamp_min(torch.finfo(uniform.dtype).tiny).log()).log()
    perturbed = (scores.float() + gumbel).masked_fill(~valid, -torch.inf)
    order = perturbed.argsort(-1, descending=True)
    drawn = torch.arange(scores.shape[1], device=scores.device) < keep[:, None]
    return order, drawn.expand_as(order)


def log_probability(scores: Tensor, valid: Tensor, order: Tensor, drawn: Tensor) -> Tensor:
    """The log-probability of drawing so: the sum over picks of the score less the log-sum-exp of all still there.

    Args:
        scores: ``(B, N)``, as in :func:`draw_subsets`.
        valid: ``(B, N)`` bool.
        order: ``(G, B, N)``, from :func:`draw_subsets`.
        drawn: ``(G, B, N)`` bool.

    Returns:
        ``(G, B)`` in nats, with gradient to the scores.
    """
    floor = torch.finfo(torch.float32).min
    logits = scores.float().masked_fill(~valid, floor).expand_as(order).gather(-1, order)
    # In this order, what is still there at a pick is what stands at or after it.
    left = logits.flip(-1).logcumsumexp(-1).flip(-1)
    return ((logits - left) * drawn).sum(-1)


def subset_mask(order: Tensor, drawn: Tensor) -> Tensor:
    """Which tokens were drawn, ``(G, B, N)`` bool by slot."""
    return torch.zeros_like(drawn).scatter(-1, order, drawn)


def pick_entropy(scores: Tensor, valid: Tensor) -> Tensor:
    """Entropy of the first pick in nats, ``(B,)``: 0 where one token is certain, log n where all n are alike."""
    log_p = scores.float().masked_fill(~valid, -torch.inf).log_softmax(-1)
    return -(log_p.exp() * log_p.masked_fill(~valid, 0.0)).sum(-1)


def pick_kl(scores: Tensor, other: Tensor, valid: Tensor) -> Tensor:
    """KL(scores ‖ other) of the first pick in nats, ``(B,)``."""
    p, q = (s.float().masked_fill(~valid, -torch.inf).log_softmax(-1) for s in (scores, other))
    return (p.exp() * (p - q).masked_fill(~valid, 0.0)).sum(-1)
