"""Train a region focus module (LRS-VQA, arXiv 2503.07588): the last word's attention logits in some layers, by maps.

The frozen model runs up to the last of these layers and no further, without gradient. Validation prunes for real.
"""

from typing import Any

import torch
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from prunezoo.host import encode
from prunezoo.learned.region_focus import RegionFocus
from trainers.data.modules import GROUPS, TEACHER

from .frozen import Dtype, FrozenModule
from .guides import last_word_logits
from .losses import map_loss


class RegionFocusModule(FrozenModule):
    """Frozen model, region focus module, and the match of their maps.

    Args:
        vlm: See FrozenModule.
        pruner: The region focus module, with as many maps as there are layers.
        layers: Decoder layers whose attention is taught, from 0, one for each map.
        vlm_dtype: See FrozenModule.
        temperature: That logits are divided by in the loss.
        lr: Peak learning rate.
        warm_up: See FrozenModule.
        weight_decay: Of the matrices; vectors have none.
        measure: Shares of the tokens that validation keeps, by hard selection.
    """

    def __init__(
        self,
        vlm: str,
        pruner: RegionFocus,
        layers: tuple[int, ...],
        vlm_dtype: Dtype = "auto",
        temperature: float = 2.0,
        lr: float = 1e-3,
        warm_up: float = 0.05,
        weight_decay: float = 0.01,
        measure: tuple[float, ...] = (1 / 3, 2 / 9, 1 / 9, 1 / 18),
    ) -> None:
        if len(layers) != pruner.config.maps:
            raise PruneZooError(
                f"layers={list(layers)}: the pruner foretells {pruner.config.maps} maps: name so many layers, or set "
                f"model.init_args.pruner.init_args.config.maps={len(layers)}"
            )
        if temperature <= 0.0:
            raise PruneZooError(f"temperature must be above 0, got {temperature}")
        super().__init__(vlm, pruner, vlm_dtype, lr, warm_up, weight_decay, measure)
        text = self.vlm.config.get_text_config()
        if text.num_attention_heads != pruner.config.map_heads:
            raise PruneZooError(
                f"config.map_heads={pruner.config.map_heads}: the language model has {text.num_attention_heads} "
                f"attention heads: set config.map_heads={text.num_attention_heads}"
            )
        if not 0 <= min(layers) <= max(layers) < text.num_hidden_layers:
            raise PruneZooError(f"layers={list(layers)}: the decoder has layers 0 to {text.num_hidden_layers - 1}")
        self.layers, self.temperature = tuple(layers), temperature

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """One step."""
        for beside in (GROUPS, TEACHER):
            batch.pop(beside, None)
        with torch.no_grad():
            encoded = encode(self.vlm, batch, self.pruner.needs)
        teacher, valid = last_word_logits(self.vlm, encoded, self.layers), encoded.inputs.valid
        assert isinstance(self.pruner, RegionFocus)
        loss = map_loss(self.pruner.maps(encoded.inputs, valid), teacher, valid, self.temperature)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(valid))
        return loss
