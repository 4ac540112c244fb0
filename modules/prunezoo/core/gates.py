"""From scores to a choice of k tokens, hard in value and soft in gradient. Pure functions; no state, no host.

Letters: B images, N image tokens of an image (padded).
"""

import torch
from torch import Tensor

BISECTIONS = 40  # halvings of the bracket; more than the bits of a float32 mantissa


def topk_mask(scores: Tensor, valid: Tensor, keep: Tensor) -> Tensor:
    """The ``keep`` best valid tokens of each row; ties go to the lower slot, so the choice is deterministic.

    Args:
        scores: ``(B, N)``.
        valid: ``(B, N)`` bool.
        keep: ``(B,)`` long, tokens to keep, between 0 and the number of valid tokens of the row.

    Returns:
        ``(B, N)`` bool with exactly ``keep`` ones in each row, none of them on padding.
    """
    order = torch.argsort(scores.masked_fill(~valid, -torch.inf), dim=1, descending=True, stable=True)
    # A valid token may score -inf too: put padding behind it, order among the rest kept.
    order = order.gather(1, torch.argsort((~valid).gather(1, order).to(torch.uint8), dim=1, stable=True))
    rank = torch.argsort(order, dim=1)
    return (rank < keep[:, None]) & valid


def soft_threshold(scores: Tensor, valid: Tensor, keep: Tensor, temperature: float = 1.0) -> Tensor:
    """The threshold t of each row such that ``sigmoid((score - t) / temperature)`` sums to k over the row.

    It is found by bisection without gradient; one Newton step from there, zero in value, gives it the exact implicit
    gradient, so that raising one score lowers the other gates (the budget is a constraint, not a penalty).

    Args:
        scores: ``(B, N)`` float.
        valid: ``(B, N)`` bool.
        keep: ``(B,)`` long, tokens to keep.
        temperature: > 0, in units of the score; small is nearly hard.

    Returns:
        ``(B, 1)``, at least float32; for a row that keeps all its tokens it lies far below them.
    """
    logits = _logits(scores, valid, temperature)
    budget = keep.to(logits.dtype)[:, None]

    def total(threshold: Tensor) -> Tensor:
        return ((logits - threshold).sigmoid() * valid).sum(1, keepdim=True)

    with torch.no_grad():
        # 30 units beyond the extremes a sigmoid of float32 is 0 or 1, so the root lies inside.
        low = logits.amin(1, keepdim=True) - 30.0
        high = logits.amax(1, keepdim=True) + 30.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            too_many = total(middle) > budget
            low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
        root = (low + high) / 2
        soft = (logits - root).sigmoid() * valid
        slope = (soft * (1 - soft)).sum(1, keepdim=True).clamp_min(1e-12)
        residual = total(root)
    return temperature * (root + (total(root) - residual) / slope)


def budgeted_sigmoid(scores: Tensor, valid: Tensor, keep: Tensor, temperature: float = 1.0) -> Tensor:
    """Soft top-k: ``sigmoid((score - t) / temperature)`` with the t of :func:`soft_threshold`.

    A row that keeps all its tokens is all ones and has no gradient.

    Args:
        scores: As there.
        valid: As there.
        keep: As there.
        temperature: As there.

    Returns:
        ``(B, N)`` in [0, 1], 0 on padding.
    """
    threshold = soft_threshold(scores, valid, keep, temperature)
    gates = (_logits(scores, valid, temperature) - threshold / temperature).sigmoid() * valid
    full = keep[:, None] >= valid.sum(1, keepdim=True)
    return torch.where(full, valid.to(gates.dtype), gates).to(scores.dtype)


def topk_gates(scores: Tensor, valid: Tensor, keep: Tensor, temperature: float = 1.0) -> Tensor:
    """Straight-through gates: the value is :func:`topk_mask`, the gradient that of :func:`budgeted_sigmoid`.

    Returns:
        ``(B, N)``, exactly 0 or 1 in value.
    """
    return straight_through(topk_mask(scores.detach(), valid, keep), budgeted_sigmoid(scores, valid, keep, temperature))


def threshold_mask(margins: Tensor, valid: Tensor, least: int = 1) -> Tensor:
    """The valid tokens whose margin is not below 0, and in any case the ``least`` best of each row.

    Args:
        margins: ``(B, N)``, score minus threshold.
        valid: ``(B, N)`` bool.
        least: Tokens that a row keeps however low they are; fewer where it has fewer.

    Returns:
        ``(B, N)`` bool: as many in a row as the row decides.
    """
    return (margins >= 0) & valid | topk_mask(margins, valid, valid.sum(1).clamp_max(least))


def straight_through(mask: Tensor, soft: Tensor) -> Tensor:
    """Gates whose value is the choice ``mask`` and whose gradient is that of ``soft``, both ``(B, N)``."""
    return mask.to(soft.dtype) + (soft - soft.detach())


def _logits(scores: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """Scores in units of the temperature, at least float32, 0 on padding."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~valid, 0.0) / temperature
