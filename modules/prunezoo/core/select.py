"""From the scores of any method to which tokens stay: the best, the best that differ, or the best of each tile.

``top`` takes the best scores. ``mmr`` is greedy maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998;
for visual tokens IDPruner, arXiv 2602.13315): the best score first, then the token for which ``weight`` times its
score, brought to [0, 1] over the image, less ``1 - weight`` times its cosine to the nearest one chosen, is largest.
``mmr:0.5:4`` is its weight, and how many tokens are chosen a step behind the first: all by the same values, so that two
which are alike may come in together, in a quarter of the steps (``parallel_k`` of IDPruner's code).
``tile`` deals the budget out over the tiles of an image (crops, thumbnail, frames) in proportion to their tokens, and
takes the best of each. Pure functions; no state, no host.

Letters: B images, N image tokens of an image (padded), D width, M tiles.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .cosines import Cosines
from .errors import PruneZooError
from .near import near
from .plan import picks_mask

SELECTS = ("top", "mmr", "tile")
WEIGHT = 0.5
"""Of the score against the likeness, for `mmr`, as published."""


@dataclass(frozen=True)
class Select:
    """A way to choose by scores, as it is written: "top", "mmr", "mmr:0.7", "mmr:0.7:4", "tile"."""

    kind: str = "top"
    weight: float = WEIGHT  # mmr: of the score, in [0, 1]; 1 is top, 0 looks at the likeness alone after the first
    step: int = 1  # mmr: tokens that are chosen at a time, behind the first

    @classmethod
    def parse(cls, text: object) -> "Select":
        """Read it.

        Raises:
            PruneZooError: Not a way to choose; the message lists them.
        """
        match = re.fullmatch(r"([a-z]+)(?::(\d*\.?\d+)(?::(\d{1,6}))?)?", text) if isinstance(text, str) else None
        if match is None or match[1] not in SELECTS or (match[2] and match[1] != "mmr"):
            raise PruneZooError(
                f"select={text!r} is none; 'mmr:0.7' is with another weight, 'mmr:0.7:4' with four tokens a step"
                f"{near(text, SELECTS)}"
            )
        weight, step = float(match[2]) if match[2] else WEIGHT, int(match[3] or 1)
        if not 0 <= weight <= 1:
            raise PruneZooError(f"select={text!r}: the weight of the score must lie in [0, 1]")
        if step < 1:
            raise PruneZooError(f"select={text!r}: at least one token must be chosen a step")
        return cls(match[1], weight, step)

    def __str__(self) -> str:
        if self.step > 1:
            return f"{self.kind}:{self.weight:g}:{self.step}"
        return self.kind if self.weight == WEIGHT else f"{self.kind}:{self.weight:g}"


def mmr_mask(
    scores: Tensor, features: Tensor, valid: Tensor, keep: Tensor, most: int, weight: float = WEIGHT, step: int = 1
) -> Tensor:
    """Maximal marginal relevance: choose one token of each image a step, in all images at once.

    Args:
        scores: ``(B, N)``, higher is better.
        features: ``(B, N, D)``, by which tokens are compared.
        valid: ``(B, N)`` bool. What the others hold where it is False does not matter.
        keep: ``(B,)`` long, between 0 and the number of valid tokens of the row.
        most: The largest of them.
        weight: See :class:`Select`.
        step: See there.

    Returns:
        ``(B, N)`` bool with exactly ``keep`` ones in each row, none on padding; ties go to the lower slot.
    """
    scores = scores.float()
    # What scores -inf is for when nothing else is left; a gain is never below -1.
    worth = (weight * unit_range(scores, valid)).masked_fill(scores == -torch.inf, -4.0).masked_fill(~valid, -torch.inf)
    cosines = Cosines(features, valid, most)
    gain = scores.clamp_min(torch.finfo(scores.dtype).min).masked_fill(~valid, -torch.inf)  # of the first: its score
    nearest = torch.full_like(worth, -1.0)
    picks = valid.new_empty(len(valid), most, dtype=torch.long)
    done = 0
    while done < most:
        best = _best(gain, min(step, most - done) if done else 1)
        picks[:, done : done + best.shape[1]] = best
        done += best.shape[1]
        worth.scatter_(1, best, -torch.inf)
        nearest = nearest.maximum(cosines.rows(best).amax(1))
        gain = worth.sub(nearest, alpha=1 - weight)
    return picks_mask(picks, keep, valid.shape[1])


def _best(values: Tensor, count: int) -> Tensor:
    """The slots ``(B, count)`` of the largest of ``values (B, N)``, best first; of ties the lower one."""
    if count == 1:
        return values.argmax(1, keepdim=True)
    return values.argsort(dim=1, descending=True, stable=True)[:, :count]


def unit_range(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores ``(B, N)`` from 0, the lowest finite one of the image, to just under 1, the highest."""
    real = valid & scores.isfinite()
    low = scores.masked_fill(~real, torch.inf).amin(1, keepdim=True)
    high = scores.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
    shares = (scores.clamp(low, high) - low) / (high - low + 1e-6)
    return shares.nan_to_num(0.0)  # rows without a finite score


def tile_mask(scores: Tensor, tiles: Tensor, valid: Tensor, keep: Tensor, count: int) -> Tensor:
    """The best of each tile, as many as :func:`tile_quotas` says.

    Args:
        scores: As in :func:`mmr_mask`, and so are ``valid``, ``keep`` and the result.
        tiles: ``(B, N)`` long, from 0; anything on padding.
        valid: As there.
        keep: As there.
        count: M, tiles of the image that has most.
    """
    tiles = tiles.masked_fill(~valid, 0)
    quotas, _ = tile_quotas(tiles, valid, keep, count)
    return (rank_in_groups(scores, tiles, valid) < quotas.gather(1, tiles)) & valid


def rank_in_groups(scores: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """How many tokens of its group are better than each.

    Args:
        scores: ``(B, N)``; anything on padding.
        group: ``(B, N)`` long; anything on padding.
        valid: ``(B, N)`` bool.

    Returns:
        ``(B, N)`` long, 0 for the best of each group; of equal ones the lower slot is the better. Arbitrary on padding.
    """
    order = scores.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    key = group.masked_fill(~valid, torch.iinfo(group.dtype).max).gather(1, order)  # padding is the last group
    key, within = key.sort(dim=1, stable=True)
    begins = torch.cat([torch.ones_like(key[:, :1], dtype=torch.bool), key[:, 1:] != key[:, :-1]], 1)
    places = torch.arange(key.shape[1], device=key.device).expand_as(key)
    rank = places - places.masked_fill(~begins, 0).cummax(1).values
    return torch.empty_like(rank).scatter(1, order.gather(1, within), rank)


def tile_quotas(tiles: Tensor, valid: Tensor, keep: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Deal ``keep (B,)`` out over tiles in proportion to their tokens; what is left goes to the largest rests.

    Args:
        tiles: ``(B, N)`` long, at least 0.
        valid: ``(B, N)`` bool.
        keep: At most the number of valid tokens.
        count: M.

    Returns:
        Tokens that each tile keeps, ``(B, M)`` long, and those that it has, ``(B, M)`` long. Of equal rests the lower
        tile's comes first; no tile is asked for more than it has.
    """
    counts = tiles.new_zeros(len(tiles), count).scatter_add(1, tiles, valid.long())
    whole = counts.sum(1, keepdim=True).clamp_min(1)
    dealt = keep[:, None] * counts
    quotas, rests = dealt // whole, dealt % whole
    left = keep - quotas.sum(1)
    rank = torch.argsort(torch.argsort(rests, dim=1, descending=True, stable=True), dim=1)
    return quotas + (rank < left[:, None]), counts
