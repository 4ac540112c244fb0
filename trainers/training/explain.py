"""Train the explainability-map CNN (arXiv 2506.01097): from attention to relevance, over a cache of maps.

The frozen model is asked only while the maps are made (`caches/maps.py`) and in validation, which prunes for real.

Letters: B maps of a batch, N image tokens of an image (padded).
"""

import torch
from torch import Tensor

from prunezoo.core.contract import PruneInputs, Pruner
from prunezoo.core.errors import PruneZooError

from .frozen import Dtype, FrozenModule
from .losses import guide_kl


class ExplainModule(FrozenModule):
    """KL between the sharpened relevance map and the network's map.

    Args:
        vlm: See FrozenModule.
        pruner: A pruner that reads one signal, the one that the data module keeps beside the maps, and nothing else.
        vlm_dtype: See FrozenModule.
        cut: Share in [0, 1) of an image's tokens whose relevance counts as zero: the least relevant ones.
        lr: Peak learning rate.
        warm_up: See FrozenModule.
        weight_decay: Of the matrices; vectors have none.
        measure: Shares of the tokens that validation keeps, by hard selection.
    """

    def __init__(
        self,
        vlm: str,
        pruner: Pruner,
        vlm_dtype: Dtype = "auto",
        cut: float = 0.5,
        lr: float = 1e-3,
        warm_up: float = 0.05,
        weight_decay: float = 0.0,
        measure: tuple[float, ...] = (1 / 3, 2 / 9, 1 / 9, 1 / 18),
    ) -> None:
        if len(pruner.needs) != 1:
            raise PruneZooError(
                f"pruner '{pruner.name}' reads {', '.join(pruner.needs) or 'no signal'}; maps train what reads one "
                "signal and nothing else: train it by trainers.training.distill.DistillModule"
            )
        if not 0.0 <= cut < 1.0:
            raise PruneZooError(f"cut={cut} must lie in [0, 1)")
        super().__init__(vlm, pruner, vlm_dtype, lr, warm_up, weight_decay, measure)
        self.cut = cut

    def setup(self, stage: str) -> None:
        """See FrozenModule; and the pruner must read what there is."""
        there = self.trainer.datamodule.signal  # type: ignore[attr-defined]
        if (there,) != tuple(self.pruner.needs):
            raise PruneZooError(
                f"data.signal={there}, and pruner '{self.pruner.name}' as it is configured reads "
                f"{self.pruner.needs[0]}: set data.signal={self.pruner.needs[0]}"
            )
        super().setup(stage)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """One step."""
        signal, valid = batch["signal"], batch["valid"]
        nothing, nowhere = signal.new_zeros(*valid.shape, 0), valid.new_full((*valid.shape, 3), -1, dtype=torch.long)
        inputs = PruneInputs(nothing, valid, nowhere, signals={self.pruner.needs[0]: signal})
        loss = guide_kl(self.pruner.score(inputs), batch["relevance"], valid, self.cut)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(valid))
        return loss
