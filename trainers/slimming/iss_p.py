"""ISS-P: small weights shrink a little after every step, until a mask is fixed.

Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution, Wang et al., ICCV 2023,
https://arxiv.org/abs/2303.09650, https://github.com/Jiamian-Wang/Iterative-Soft-Shrinkage-SR.

| | authors' code | ours |
|---|---|---|
| which are small | the N smallest of each run of M weights, M grown to a divisor | M grown to one of the size |
| shrinking | times 0.95 after each step, chosen anew each time; 0 is iterative hard thresholding | likewise |
| phases | 100,000 steps of shrinking at a constant rate, then tuned | a share of the recipe's steps, by its own rates |
| left out | mean shift and tail | the parts that `skip` names, by default the head |
| start | random weights | as the recipe says, or a trained pruner |
"""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from prunezoo.core.errors import PruneZooError

from .weights import Masks, apply_masks, check_sparsity, matrices


class ShrinkWeights(L.Callback):
    """Shrinks the small weights for a share of the steps, then sets them to zero and holds them there.

    Usable in any recipe of a pruner, as one of `trainer.callbacks`; `export.monitor: null` then, since a state of
    before the mask was fixed has no zeros.

    Args:
        sparsity: Share of the weights that go, in (0, 1).
        group: M, weights of a run within which the smallest are shrunk.
        factor: What they are multiplied by after each step, in [0, 1).
        share: Of the steps that shrink, in (0, 1).
        skip: Parts whose weights are left alone, by the first word of their names.
    """

    def __init__(
        self,
        sparsity: float,
        group: int = 20,
        factor: float = 0.95,
        share: float = 0.5,
        skip: tuple[str, ...] = ("head",),
    ) -> None:
        check_sparsity(sparsity)
        if group < 2 or not 0 < round(sparsity * group) < group:
            raise PruneZooError(f"iss_p.group={group}: of so many weights none or all would go at sparsity {sparsity}")
        if not 0.0 <= factor < 1.0:
            raise PruneZooError(f"iss_p.factor={factor} must lie in [0, 1)")
        if not 0.0 < share < 1.0:
            raise PruneZooError(f"iss_p.share={share} must lie in (0, 1)")
        self.sparsity, self.group, self.factor, self.share, self.skip = sparsity, group, factor, share, tuple(skip)
        self.step = 0  # the last one that was looked at: batches that only add to a gradient are none
        self.masks: Masks = {}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Shrink, fix the mask, or hold it."""
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        pruner: Any = pl_module.pruner
        if self.masks:
            apply_masks(pruner, self.masks)
            return
        last = self.step >= self.share * trainer.estimated_stepping_batches
        for name, weight in matrices(pruner, self.skip).items():
            small = smallest_in_groups(weight, self.sparsity, self.group)
            weight.mul_(torch.where(small, 0.0 if last else self.factor, 1.0))
            if last:
                self.masks[name] = ~small

    def state_dict(self) -> dict[str, Any]:
        """The mask, and the step."""
        return {"step": self.step, "masks": self.masks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self.step, self.masks = state_dict["step"], state_dict["masks"]


def smallest_in_groups(weight: Tensor, sparsity: float, group: int) -> Tensor:
    """Where the N smallest of each run of M weights are.

    Args:
        weight: Of any shape.
        sparsity: N is that share of M, rounded.
        group: M; it grows until it divides the number of weights.

    Returns:
        Boolean, of the weight's shape; equal weights go in their order.
    """
    group = min(group, weight.numel())
    while weight.numel() % group:
        group += 1
    rows = weight.detach().abs().reshape(-1, group)
    order = rows.argsort(dim=1, stable=True)[:, : round(sparsity * group)]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True).view_as(weight)
