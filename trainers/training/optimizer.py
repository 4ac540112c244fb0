"""The optimizer and its schedule, the same for every training here."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from prunezoo.core.errors import PruneZooError


def adamw_cosine(
    weights: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float,
    warm_up: float,
    steps: float,
    betas: tuple[float, float] = (0.9, 0.999),
    floor: float = 0.0,
) -> dict[str, Any]:
    """AdamW with warm-up and cosine, as Lightning's `configure_optimizers` returns it.

    Args:
        weights: What is trained.
        lr: Peak learning rate.
        weight_decay: Of the matrices; vectors have none.
        warm_up: Share of the steps in which the rate rises from 0; from there it falls by a cosine.
        steps: Of the whole run.
        betas: What the moving averages of the gradient and of its square keep a step.
        floor: Share of the peak that the rate falls to, in [0, 1].

    Raises:
        PruneZooError: The learning rate is none, or no such floor.
    """
    if lr < 0:
        raise PruneZooError(f"model.lr={lr}: a learning rate is at least 0")
    if not 0.0 <= floor <= 1.0:
        raise PruneZooError(f"model.floor={floor} is out of range: it is a share in [0, 1] of the learning rate")
    weights = list(weights)
    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas)

    def factor(step: int) -> float:
        done = min(step / max(steps, 1), 1.0)
        if done < warm_up:
            return (done * steps + 1) / (warm_up * steps + 1)
        fallen = 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))
        return floor + (1 - floor) * fallen

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
