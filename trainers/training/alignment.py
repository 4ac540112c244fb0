"""Train what a pruner inside a frozen vision tower does to states, so that the shorter tower puts out what the whole
one does.

The hidden-state alignment of ToP-ViM (arXiv 2409.18962), as far as it is known, on a ViT: no answer is asked for, and
the language model does not run. The loss is the squared error of the projected tokens that are left, over their mean
square.
"""

from typing import Any

import torch
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from prunezoo.core.plan import gather_rows
from prunezoo.host import encode
from prunezoo.host.families import find_family
from prunezoo.host.stages.cut import Timer
from prunezoo.host.stages.vision import check_vision_stage, choose
from prunezoo.learned.top_vim import ToPViM
from trainers.data.modules import GROUPS

from .distill import draw_budgets
from .frozen import Dtype, FrozenModule


class AlignmentModule(FrozenModule):
    """Frozen model, pruner, and one loss.

    Args:
        vlm: Folder or Hub id of a `transformers` image-text-to-text model. It stays frozen and out of the checkpoints.
        pruner: Of the vision stage, which changes the states of what it leaves.
        vlm_dtype: Type that the frozen model is held in: auto (as stored), float32, bfloat16 or float16.
        keep: Shares of the tokens, least and most; each image's budget is drawn between them, even on a log scale.
        lr: Peak learning rate.
        warm_up: Share of the steps in which it rises from 0; from there it falls to 0 by a cosine.
        weight_decay: Of the matrices; vectors have none.
        measure: Shares of the tokens that validation keeps.
    """

    pruner: ToPViM

    def __init__(
        self,
        vlm: str,
        pruner: ToPViM,
        vlm_dtype: Dtype = "auto",
        keep: tuple[float, float] = (0.05, 0.7),
        lr: float = 1e-3,
        warm_up: float = 0.05,
        weight_decay: float = 0.01,
        measure: tuple[float, ...] = (1 / 2, 1 / 9),
    ) -> None:
        if not 0.0 < keep[0] <= keep[1] <= 1.0:
            raise PruneZooError(f"keep must be two shares, 0 < least <= most <= 1, got {list(keep)}")
        super().__init__(vlm, pruner, vlm_dtype, lr, warm_up, weight_decay, measure)
        tower = find_family(self.vlm).tower()
        tower.check_can_shrink(pruner.name)  # where patches are dropped by whole cells, states are not changed
        check_vision_stage(tower, pruner)
        self.keep = keep

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """One step."""
        batch.pop(GROUPS, None)
        with torch.no_grad():
            encoded = encode(self.vlm, batch)
        keep = draw_budgets(encoded.inputs.valid.sum(1), *self.keep)
        output = choose(self.vlm, encoded, self.pruner, keep, Timer(keep.device))
        assert output.features is not None  # of the vision stage
        whole = gather_rows(encoded.inputs.features, output.index)[output.valid].float()
        error = (output.features[output.valid].float() - whole).square().mean()
        loss = error / whole.square().mean().clamp_min(1e-12)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(keep))
        return loss
