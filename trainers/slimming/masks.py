"""Masks that stay as they are while a pruner is trained on."""

from typing import Any

import lightning as L

from .weights import Masks, apply_masks


class HoldMasks(L.Callback):
    """Sets to zero, before the first step and after each, what masks leave out.

    Args:
        masks: By the names of the pruner's weights.
    """

    def __init__(self, masks: Masks) -> None:
        self.masks = masks

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the first step; where a run goes on its weights have been read by now."""
        apply_masks(pl_module.pruner, self.masks)  # type: ignore[arg-type]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """After a step, and before its checkpoint."""
        apply_masks(pl_module.pruner, self.masks)  # type: ignore[arg-type]
