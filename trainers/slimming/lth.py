"""Late rewinding: train, take the smallest weights away, go back to a state early in the training, train again.

Stabilizing the Lottery Ticket Hypothesis, Frankle et al., 2019, https://arxiv.org/abs/1903.01611,
https://github.com/facebookresearch/open_lth. Each round takes a fifth of the weights that are left, by global
magnitude, and rewinds the others to what they were at step k; the learning rate goes on as from k. What differs: the
optimizer's averages are those of step k too, since a round goes on from a whole checkpoint of that step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L

from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.hub import CONFIG_FILE
from prunezoo.core.registry import load_pruner

from .masks import HoldMasks
from .weights import keep_largest, matrices

Train = Callable[..., Pruner]
"""Trains by the recipe: `train(out, callbacks, point=checkpoint)`; goes on where it was stopped."""


@dataclass(frozen=True)
class Tickets:
    """How tickets are drawn."""

    each: float = 0.2  # share of the weights left that a round takes, in (0, 1); the last one takes what is due
    rewind: float = 0.05  # share of the steps after which the state is kept that rounds go back to, in (0, 1)

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("each", "rewind"):
            if not 0 < getattr(self, name) < 1:
                raise PruneZooError(f"lth.{name}={getattr(self, name)} must lie in (0, 1)")

    def sparsities(self, sparsity: float) -> list[float]:
        """Of all weights, what share is zero in each round; the first, which takes none, is not among them."""
        rounds = max(1, math.ceil(math.log(1 - sparsity) / math.log(1 - self.each) - 1e-9))
        return [1 - (1 - self.each) ** number for number in range(1, rounds)] + [sparsity]


class RewindPoint(L.Callback):
    """Keeps the whole state of a training at one step.

    Args:
        step: Which.
        path: Of the checkpoint.
    """

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Keep it."""
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def find_ticket(sparsity: float, tickets: Tickets, steps: int, folder: Path, train: Train) -> Path:
    """Train and rewind, round after round; rounds that are done are not done again.

    Args:
        sparsity: Share of the weights that go in the end, in (0, 1).
        tickets: How.
        steps: Of a training.
        folder: Where rounds lie.
        train: Trains by the recipe.

    Returns:
        The folder of the last round's pruner.
    """
    rewind, done = folder / "rewind.ckpt", folder / "round-0"
    step = max(1, round(tickets.rewind * steps))
    if step >= steps:
        raise PruneZooError(f"lth.rewind={tickets.rewind}: of {steps} steps none would be left")
    if not (done / CONFIG_FILE).is_file():
        train(done, [RewindPoint(step, rewind)])
    for number, share in enumerate(tickets.sparsities(sparsity), start=1):
        trained, out = load_pruner(str(done)), folder / f"round-{number}"
        if not (out / CONFIG_FILE).is_file():
            # what is zero already is the smallest of all, so that masks lie within one another
            masks = keep_largest(trained, share, tuple(matrices(trained)))
            train(out, [HoldMasks(masks)], point=rewind)
        done = out
    return done
