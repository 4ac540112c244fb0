"""Token budgets as people write them: `64` is 64 tokens for each image, `1/9` or `0.111` is a share of its tokens."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from modules.core.errors import PruneZooError


@dataclass(frozen=True)
class Budget:
    """One value of `--keep`.

    Attributes:
        label: as it was written; this is what tables and JSON rows show.
        keep: int = tokens for each image, at least 1; float in (0, 1] = share of the image's tokens.
    """

    label: str
    keep: int | float


def parse_budget(text: str) -> Budget:
    """Read one budget: an integer, a fraction such as `1/9`, or a decimal share.

    Raises:
        PruneZooError: not a number, below one token, or a share outside (0, 1].
    """
    label = text.strip()
    keep: int | float
    try:
        if "/" in label:
            keep = float(Fraction(label.replace(" ", "")))
        else:
            keep = int(label) if label.lstrip("+-").isdigit() else float(label)
    except (ValueError, ZeroDivisionError):
        raise PruneZooError(
            f"--keep {text!r} is not a budget: write tokens (64), a fraction (1/9) or a share (0.25)"
        ) from None
    if isinstance(keep, int) and keep < 1:
        raise PruneZooError(
            f"--keep {label}: a budget is at least 1 token (zero tokens are measured always, as `none`)"
        )
    if isinstance(keep, float) and not (math.isfinite(keep) and 0 < keep <= 1):
        raise PruneZooError(f"--keep {label}: a share lies in (0, 1]; for a number of tokens write an integer")
    return Budget(label, keep)


def parse_budgets(texts: Iterable[str]) -> tuple[Budget, ...]:
    """Read several budgets; the same label twice counts once."""
    return tuple({budget.label: budget for budget in map(parse_budget, texts)}.values())
