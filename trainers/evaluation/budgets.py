"""Token budgets as people write them: `64` is 64 tokens for each image, `1/9` or `0.111` is a share of its tokens;
`auto` is what a pruner that sets budgets thinks right for each, `auto:64` likewise with 64 in the mean over images.

What a budget bounds is what the last stage of a method leaves. A method that prunes between decoder layers reads more
in the layers before; for a comparison at equal cost :func:`keep_for_mean` finds what its last stage has to leave.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from prunezoo.core.budgets import AUTO, Keep, auto_mean, budget
from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.host.stages.cut import Cut, layer_mean

MOST_TOKENS = 10**9
"""Of a budget; more is a slip of the hand, and in the end no number that a tensor can hold."""


@dataclass(frozen=True)
class Budget:
    """One value of `--keep`.

    Attributes:
        label: as it was written; this is what tables and JSON rows show.
        keep: int = tokens for each image, at least 1; float in (0, 1] = share of the image's tokens; str = auto.
    """

    label: str
    keep: int | float | str


def parse_budget(text: str) -> Budget:
    """Read one budget: an integer, a fraction such as `1/9`, a decimal share, `auto` or `auto:64`.

    Raises:
        PruneZooError: not a number, below one token, or a share outside (0, 1].
    """
    label = text.strip()
    if AUTO.fullmatch(label):
        if (auto_mean(label) or 0) > MOST_TOKENS:
            raise PruneZooError(f"--keep {label:.40}: a budget is at most {MOST_TOKENS:,} tokens")
        return Budget(label, label)
    keep: int | float
    try:
        if "/" in label:
            keep = float(Fraction(label.replace(" ", "")))
        else:
            keep = int(label) if label.lstrip("+-").isdigit() else float(label)
    except (ValueError, ZeroDivisionError):
        raise PruneZooError(
            f"--keep {text[:40]!r} is not a budget: write tokens (64), a fraction (1/9), a share (0.25) or auto"
        ) from None
    if isinstance(keep, int) and keep < 1:
        raise PruneZooError(
            f"--keep {label}: a budget is at least 1 token (zero tokens are measured always, as `none`)"
        )
    if isinstance(keep, int) and keep > MOST_TOKENS:
        raise PruneZooError(f"--keep {label:.40}: a budget is at most {MOST_TOKENS:,} tokens")
    if isinstance(keep, float) and not (math.isfinite(keep) and 0 < keep <= 1):
        raise PruneZooError(f"--keep {label}: a share lies in (0, 1]; for a number of tokens write an integer")
    return Budget(label, keep)


def parse_budgets(texts: Iterable[str]) -> tuple[Budget, ...]:
    """Read several budgets; the same label twice counts once."""
    return tuple({budget.label: budget for budget in map(parse_budget, texts)}.values())


def planned_mean(pruner: Pruner, keep: Keep, available: Tensor, depth: int) -> Tensor:
    """Image tokens in a decoder of so many layers, mean over the layers, that a pruner is going to leave: (B,) float.

    Args:
        pruner: of any stage, or a combination.
        keep: as its `forward` takes it.
        available: (B,) tokens of each image.
        depth: number of decoder layers.
    """
    cuts, found = [Cut("prompt", None, available, available)], available
    for part, amount in pruner.parts(keep):
        left = budget(amount, found)
        is_late = part.stage == "layer"
        places: Sequence[int | None] = part.stages(depth) if is_late else (None,)
        if part.restore:  # what it leaves is of the tower
            left = found
        whole = found
        for place, step in zip(places, part.steps(left, found, depth) if is_late else [left], strict=True):
            cuts.append(Cut(part.stage, place, found, torch.minimum(step, whole if part.comes_back else found)))
            found = cuts[-1].after
    return layer_mean(cuts, depth)


def keep_for_mean(pruner: Pruner, mean: Keep, available: Tensor, depth: int) -> Tensor:
    """What a pruner has to be told to keep so that the mean over the decoder layers comes nearest to a budget: (B,).

    That is exact for all that keep what they are told; what others make of it, the measured tokens say.

    Args:
        pruner: of any stage, or a combination.
        mean: the budget, as `Pruner.forward` takes it.
        available: (B,) tokens of each image.
        depth: number of decoder layers.

    Raises:
        PruneZooError: not even with one token at the end is the mean as low as that.
    """
    wanted = budget(mean, available)
    low, high = torch.ones_like(available), available
    least = planned_mean(pruner, low, available, depth)
    if bool((least > wanted + 0.5).any()):
        worst = int((least - wanted).argmax())
        raise PruneZooError(
            f"--equal-tokens: '{pruner.name}' reads {least[worst]:.1f} of {available[worst]} tokens in the mean over "
            f"{depth} layers even if its last stage leaves one, more than the {wanted[worst]} asked for: raise --keep, "
            "or leave it out"
        )
    while bool((low < high).any()):  # the smallest that reaches the budget
        middle = (low + high) // 2
        enough = planned_mean(pruner, middle, available, depth) >= wanted
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    below = (low - 1).clamp_min(1)
    distance = [(planned_mean(pruner, keep, available, depth) - wanted).abs() for keep in (below, low)]
    return torch.where(distance[0] < distance[1], below, low)
