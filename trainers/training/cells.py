"""Train a patch classifier on drawn sheets: which cells are printed on. No vision-language model takes part.

The loss is the binary cross-entropy over cells; the setting is that of the authors' code (arXiv 2509.06415).
"""

import math
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torchmetrics import Metric

from prunezoo.core.contract import PruneInputs
from prunezoo.core.errors import PruneZooError
from prunezoo.learned.patch_classifier import CHANNELS, PatchClassifier

from .optimizer import adamw_cosine


class CellsModule(L.LightningModule):
    """The classifier and its loss.

    Args:
        pruner: What is trained.
        lr: Peak learning rate.
        warm_up: Share of the steps in which it rises from 0; from there it falls by a cosine.
        weight_decay: Of the matrices; vectors have none.
    """

    def __init__(
        self, pruner: PatchClassifier, lr: float = 1e-3, warm_up: float = 0.05, weight_decay: float = 0.01
    ) -> None:
        super().__init__()
        if not 0.0 <= warm_up < 1.0:
            raise PruneZooError(f"warm_up={warm_up} must lie in [0, 1)")
        self.pruner, self.lr, self.warm_up, self.weight_decay = pruner, lr, warm_up, weight_decay
        self.counts = Counts()

    def setup(self, stage: str) -> None:
        """Know the end of the schedule."""
        self.total_steps = self.trainer.estimated_stepping_batches
        if stage == "fit" and not math.isfinite(self.total_steps):
            raise PruneZooError("the schedule needs an end: set trainer.max_steps or trainer.max_epochs")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """One step on ``(B, rows, columns, pixels)`` and ``(B, rows, columns)``."""
        pixels, printed = batch
        if pixels.shape[-1] != CHANNELS * self.pruner.config.side**2:
            side = math.isqrt(pixels.shape[-1] // CHANNELS)
            raise PruneZooError(f"data.cell={side} must be the pruner's side={self.pruner.config.side}")
        loss = F.binary_cross_entropy_with_logits(self.pruner.logits(pixels), printed.float())
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(pixels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Count what `keep="auto"` keeps."""
        self.counts.update(*judge(self.pruner, *batch))

    def on_validation_epoch_end(self) -> None:
        """Log the shares; the score is that of printed cells that stay and of bare ones that go, in the mean."""
        printed, kept, both = self.counts.compute().tolist()
        self.counts.reset()
        recall, bare = both / max(printed, 1e-9), (kept - both) / max(1 - printed, 1e-9)
        values = {"val/printed_kept": recall, "val/kept": kept, "val/score": (recall + 1 - bare) / 2}
        self.log_dict(values, sync_dist=True)
        rank_zero_info(
            f"step {self.global_step}: {100 * recall:.2f} % of the printed cells kept, with {100 * kept:.1f} % of all "
            f"cells; {100 * printed:.1f} % are printed on"
        )

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine."""
        weights = self.pruner.parameters()
        return adamw_cosine(weights, self.lr, self.weight_decay, self.warm_up, self.total_steps)


@torch.no_grad()
def judge(pruner: Any, pixels: Tensor, printed: Tensor, keep: Any = "auto") -> tuple[Tensor, Tensor]:
    """What a pruner of the input stage keeps of some sheets.

    Args:
        pruner: By default it says itself how much.
        pixels: ``(B, rows, columns, 3 * side * side)``.
        printed: ``(B, rows, columns)`` bool.
        keep: As for :meth:`Pruner.forward`.

    Returns:
        ``(B, rows * columns)`` bool each: printed on, kept.
    """
    sheets, rows, columns, width = pixels.shape
    side = math.isqrt(width // CHANNELS)
    cells = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).view(-1, 2)
    cells = F.pad(cells, (1, 0)).expand(sheets, -1, -1).to(pixels.device)
    inputs = PruneInputs(
        features=pixels.flatten(1, 2),
        valid=torch.ones_like(printed.flatten(1)),
        cells=cells,
        pixels=(1, CHANNELS, side, side),
    )
    output = pruner(inputs, keep)
    kept = torch.zeros(inputs.valid.shape, dtype=torch.long, device=pixels.device)
    return printed.flatten(1), kept.scatter_add(1, output.index, output.valid.long()) > 0


class Counts(Metric):
    """Shares of the cells that are printed on, kept, and both."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.found: Tensor
        self.cells: Tensor
        self.add_state("found", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("cells", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, printed: Tensor, kept: Tensor) -> None:
        """Add cells, bool of one shape."""
        self.found += torch.stack([printed.sum(), kept.sum(), (printed & kept).sum()])
        self.cells += printed.numel()

    def compute(self) -> Tensor:
        """``(3,)``."""
        return self.found / self.cells
