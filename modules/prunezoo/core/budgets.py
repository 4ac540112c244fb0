"""Budgets: how many tokens an image keeps, as callers write it, and as counts. Nothing here knows a pruner.

Letters: B images.
"""

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import PruneZooError

Keep = int | float | str | Tensor
AUTO = re.compile(r"auto(?::([1-9]\d*))?")
"""How a budget is written that the pruner sets itself: `auto`, or `auto:64` for 64 tokens in the mean over images."""


def check_keep(keep: Keep) -> None:
    """Raise PruneZooError unless ``keep`` is an int >= 1, a float in (0, 1], "auto", "auto:N", or (B,) integers."""
    if isinstance(keep, str):
        if not AUTO.fullmatch(keep):
            raise PruneZooError(
                f"keep='{keep}' is none: tokens (64), a share (0.25, '1/9'), 'auto' or, for a mean, 'auto:64'"
            )
    elif isinstance(keep, Tensor):
        if keep.is_floating_point() or keep.dtype == torch.bool or keep.dim() != 1:
            raise PruneZooError(f"keep as a tensor must be (B,) integers, got {keep.dtype} {tuple(keep.shape)}")
    elif isinstance(keep, bool) or not isinstance(keep, int | float):
        raise PruneZooError(f"keep must be an int (tokens per image) or a float in (0, 1], got {keep!r}")
    elif isinstance(keep, int):
        if keep < 1:
            raise PruneZooError(f"keep={keep} is out of range: tokens per image must be at least 1")
    elif math.isnan(keep) or not 0.0 < keep <= 1.0:
        raise PruneZooError(f"keep={keep} is out of range: a float is a share in (0, 1]; for tokens write an int")


def read_keep(keep: Any) -> Keep:
    """A budget as callers write it: also numbers of NumPy, and "64", "1/9" or "0.25" as the commands take them.

    Raises:
        PruneZooError: It is none, or out of range.
    """
    if isinstance(keep, np.integer | np.floating):
        keep = keep.item()
    if isinstance(keep, str) and not AUTO.fullmatch(keep):
        text = keep.replace(" ", "")
        with suppress(ValueError, ZeroDivisionError, OverflowError):  # else the check below says what it is
            keep = int(text) if text.isdecimal() else float(Fraction(text))
    check_keep(keep)
    return keep


def auto_mean(keep: str) -> float | None:
    """The mean that "auto:64" asks for, in tokens; None for "auto"."""
    mean = keep.partition(":")[2]
    return float(mean) if mean else None


def counts_of(keep: Keep, available: Sequence[int]) -> tuple[int, ...]:
    """:func:`budget` for numbers that the host has, as such; only a ``keep`` on a device is read."""
    if isinstance(keep, Tensor):
        check_keep(keep)
        asked = (keep if keep.device.type == "cpu" else keep.cpu()).numpy().tolist()
        if len(asked) != len(available):
            raise PruneZooError(f"keep has {len(asked)} entries for {len(available)} images")
        if min(asked, default=1) < 1:
            raise PruneZooError(f"keep={asked} is out of range: tokens per image must be at least 1")
        return tuple(min(pair) for pair in zip(asked, available, strict=True))
    return tuple(budget(keep, torch.tensor(available, dtype=torch.long)).numpy().tolist())


def upload(counts: Sequence[int], device: torch.device) -> Tensor:
    """Numbers of the host as a tensor ``(B,)`` long, without waiting for the device."""
    values = torch.tensor(counts, dtype=torch.long)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def setting_for(mean: Tensor, means: Tensor, settings: Tensor) -> Tensor:
    """The setting that leads to a mean, between the rows of a table by its logarithm; the table's ends bound it.

    How every pruner that sets budgets finds what "auto:64" means for it.

    Args:
        mean: Of any shape.
        means: ``(rows,)``, ascending.
        settings: ``(rows,)`` that led to them, above 0.

    Returns:
        In the shape of ``mean``.
    """
    means, logs = means.contiguous(), settings.log()
    right = torch.searchsorted(means, mean.to(means).contiguous()).clamp(min(1, len(means) - 1), len(means) - 1)
    left = (right - 1).clamp_min(0)
    part = ((mean.to(means) - means[left]) / (means[right] - means[left]).clamp_min(1e-9)).clamp(0, 1)
    return (logs[left] + part * (logs[right] - logs[left])).exp()


def budget(keep: Keep, available: Tensor) -> Tensor:
    """Tokens to keep of each image.

    Args:
        keep: As in :meth:`Pruner.forward`, but for "auto", which only a pruner can tell.
        available: ``(B,)`` long, tokens that each image has.

    Returns:
        ``(B,)`` long, at least 1 and at most ``available`` (0 where there are none).
    """
    check_keep(keep)
    if isinstance(keep, str):
        raise PruneZooError(f"keep='{keep}' is for a pruner of the input or prompt stage: here give tokens or a share")
    if isinstance(keep, Tensor):
        if keep.shape != available.shape:
            raise PruneZooError(f"keep has {keep.shape[0]} entries for {available.shape[0]} images")
        counts = keep.to(available)
        if bool((counts < 1).any()):
            raise PruneZooError(f"keep={counts.tolist()} is out of range: tokens per image must be at least 1")
    elif isinstance(keep, int):
        counts = torch.full_like(available, min(keep, torch.iinfo(available.dtype).max))
    else:
        # In double precision, and halves to even as Python's round() does: the same count on every device.
        counts = (available.double() * keep).round().to(available.dtype).clamp_min(1)
    return torch.minimum(counts, available)
