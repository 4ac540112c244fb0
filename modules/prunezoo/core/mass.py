"""Budgets from a distribution: an image keeps the fewest tokens that hold enough of the probability.

The rule is SAP's of Fast3D (arXiv 2507.09334): of the softmax over an image's tokens, sorted, the smallest k whose
cumulated probability reaches alpha. What is kept here is ``1 - alpha``, the probability that may be left out, since
with peaked scores alpha lies too close to 1 for the last digits of a number. It is calibrated on items, so that the
mean over them is the one asked for. Pure functions; no host.

Letters: B images or I items, N image tokens (padded).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from .budgets import auto_mean, setting_for
from .errors import PruneZooError


def tails(scores: Tensor, valid: Tensor) -> Tensor:
    """What each token and all that are less likely hold together.

    Args:
        scores: ``(B, N)``, logits of the distribution.
        valid: ``(B, N)`` bool.

    Returns:
        ``(B, N)`` in double precision, of the most likely token first: from 1 down, 0 where there is none.
    """
    shares = scores.double().masked_fill(~valid, -torch.inf).softmax(1).nan_to_num(0.0)  # a row may have no token
    return shares.sort(1, descending=True).values.flip(1).cumsum(1).flip(1)


@dataclass(frozen=True)
class Mass:
    """What a scorer may leave out to keep so many tokens in the mean, for several means."""

    left_out: Mapping[int, float]  # mean in tokens to probability in [0, 1); ascending and descending
    default: int  # the mean that "auto" stands for, one of these

    @classmethod
    def calibrate(cls, items: Iterable[Tensor], means: Iterable[int]) -> Self:
        """Find what may be left out.

        Args:
            items: :func:`tails` of items like those to come, each ``(N,)`` without padding; never of a test split.
            means: At least 1; the first is the default. On these items each is met to within half a token in all,
                ties apart.

        Raises:
            PruneZooError: The items have fewer tokens in the mean than one of these.
        """
        each = list(items)
        falling = torch.cat(each).sort(descending=True).values
        means, left_out = list(means), {}
        for mean in sorted(set(means)):
            kept = mean * len(each)
            if mean < 1 or kept > len(falling):
                raise PruneZooError(
                    f"a mean of {mean} tokens cannot be had: the items have {len(falling) / len(each):.1f} in the mean"
                )
            # So many of all their tokens are above it.
            left_out[mean] = float(falling[kept]) if kept < len(falling) else 0.0
        return cls(left_out, means[0])

    def counts(self, scores: Tensor, valid: Tensor, mean: float | None) -> Tensor:
        """Tokens that each image keeps.

        Args:
            scores: ``(B, N)``.
            valid: ``(B, N)`` bool.
            mean: Within the calibrated ones; None: the default.

        Returns:
            ``(B,)`` long, at least 1, at most what the image has.
        """
        wanted = self.default if mean is None else mean
        if wanted in self.left_out:
            most = self.left_out[int(wanted)]
        else:
            table = torch.tensor(list(self.left_out.items()), dtype=torch.double)
            least = torch.finfo(torch.double).tiny
            most = float(setting_for(table.new_tensor(wanted), table[:, 0], table[:, 1].clamp_min(least)))
        return (tails(scores, valid) > most).sum(1).clamp_min(1).minimum(valid.sum(1))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"default": self.default, "left_out": {str(mean): rest for mean, rest in self.left_out.items()}}

    @classmethod
    def from_dict(cls, values: object, where: str = "") -> Self:
        """From what :meth:`to_dict` gave; PruneZooError names ``where`` and the key that is wrong."""
        if not isinstance(values, Mapping) or values.keys() != {"default", "left_out"}:
            raise PruneZooError(f"{where}setting 'auto' must be an object of default, left_out")
        table = values["left_out"]
        if not isinstance(table, Mapping) or not all(
            str(mean).isdecimal() and int(mean) >= 1 and type(rest) is float and 0 <= rest < 1
            for mean, rest in table.items()
        ):
            raise PruneZooError(f"{where}'left_out' of setting 'auto' must map tokens to shares in [0, 1)")
        left_out = {int(mean): rest for mean, rest in table.items()}
        if list(left_out) != sorted(left_out) or list(left_out.values()) != sorted(left_out.values(), reverse=True):
            raise PruneZooError(f"{where}'left_out' of setting 'auto' must fall as the tokens rise; calibrate it again")
        if type(values["default"]) is not int or values["default"] not in left_out:
            raise PruneZooError(f"{where}'default' of setting 'auto' must be one of its means, {list(left_out)}")
        return cls(left_out, values["default"])


def check_mean(name: str, mass: Mass | None, keep: str) -> None:
    """Raise PruneZooError, with the command that helps, unless a distribution is calibrated for "auto" or "auto:64"."""
    mean = auto_mean(keep)
    if mass is not None:
        first, last = min(mass.left_out), max(mass.left_out)
        if mean is None or first <= mean <= last:
            return
        known = f"is calibrated for means from {first} to {last}"
    else:
        known = "is not calibrated"
    raise PruneZooError(
        f"keep='{keep}': this '{name}' {known}: python -m trainers.calibrate --vlm VLM --pruner FOLDER --suite SUITE "
        f"--mean {64 if mean is None else int(mean)}"
    )
