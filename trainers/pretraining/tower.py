"""First phase: the vision tower and the projector alone, under dense supervision.

Every patch is to say, through dot products with the language model's own word embeddings, what it shows: colour, shape,
size, digit and grid cell. Retrieval by the language model later has only to find words among words.
"""

import math
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from trainers.data.scenes import NOUNS
from trainers.data.scenes_dense import WORD_SLOTS, as_pixels
from trainers.data.scenes_render import COLORS

from .build import WORD_IDS, tower_of

WEIGHTS = {"color": 1.0, "shape": 2.0, "size": 0.7, "digit": 2.0, "cell": 0.7}
_SHARPNESS = 4.0  # of the dot products with word embeddings


class TowerModule(L.LightningModule):
    """Trains ``vlm.model.vision_tower``, ``multi_modal_projector`` and the word embeddings.

    Args:
        vlm: the model; trained in place.
        steps: optimiser steps, for the schedule.
        lr: peak learning rate.
    """

    def __init__(self, vlm: LlavaForConditionalGeneration, steps: int, lr: float = 1.5e-3) -> None:
        super().__init__()
        self.steps, self.lr = steps, lr
        self.tower, self.projector = vlm.model.vision_tower, vlm.model.multi_modal_projector
        self.embedding = vlm.get_input_embeddings()
        width, inner = self.embedding.weight.shape[1], tower_of(vlm).config.hidden_size
        self.none = nn.ParameterDict({slot: nn.Parameter(0.06 * torch.randn(width)) for slot in WORD_SLOTS})
        self.anchor, self.ordinal, self.center = nn.Linear(width, 2), nn.Linear(width, 5), nn.Linear(width, 2)
        self.presence = nn.Linear(inner, len(COLORS) * len(NOUNS))  # what CLS says is in the picture

    def losses(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weighted loss terms, and accuracy at the patches that hold the centre of a thing or digit."""
        out = self.tower(as_pixels(batch["image"]), output_hidden_states=True)
        said = self.projector(out.hidden_states[-2][:, 1:]).float()  # (B, 144, D)
        shown, anchor, is_digit = batch["thing"] >= 0, batch["anchor"] > 0, batch["ordinal"] > 0
        weight = torch.where(anchor, 3.0, torch.where(shown, 1.0, 0.35))
        losses, accuracy = {}, {}
        for slot, words in WORD_SLOTS.items():
            ids = torch.tensor([WORD_IDS[word] for word in words], device=said.device)
            choices = torch.cat([self.embedding.weight[ids], self.none[slot][None]])
            logits, target = _SHARPNESS * said @ choices.T, batch[slot]
            each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="none")
            known = (target >= 0) * torch.where(is_digit, 3.0, weight) if slot == "digit" else (target >= 0) * weight
            losses[slot] = WEIGHTS[slot] * (each.view_as(known) * known).sum() / known.sum()
            where = is_digit if slot == "digit" else anchor & (target >= 0)
            accuracy[slot] = (logits.argmax(-1) == target)[where].float().mean()
        rare = said.new_tensor([1.0, 3.0])
        losses["anchor"] = F.cross_entropy(self.anchor(said).flatten(0, 1), batch["anchor"].flatten(), weight=rare)
        ordinal = self.ordinal(said)
        rare = said.new_tensor([1.0, 3.0, 3.0, 3.0, 3.0])
        losses["ordinal"] = F.cross_entropy(ordinal.flatten(0, 1), batch["ordinal"].flatten(), weight=rare)
        accuracy["ordinal"] = (ordinal.argmax(-1) == batch["ordinal"])[is_digit].float().mean()
        losses["center"] = 20 * (self.center(said) - batch["center"]).square().sum(-1)[shown].mean()
        there = self.presence(out.pooler_output.float())
        losses["presence"] = 0.9 * F.binary_cross_entropy_with_logits(there, batch["presence"])
        return losses, accuracy

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One step."""
        losses, _ = self.losses(batch)
        total = torch.stack(list(losses.values())).sum()
        self.log("loss", total, prog_bar=True)
        return total

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Accuracy on pictures that training never sees."""
        _, accuracy = self.losses(batch)
        self.log_dict({f"val/{name}": value for name, value in accuracy.items()}, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW, warm-up, cosine to 2 %."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.02, betas=(0.9, 0.98))

        def scale(step: int) -> float:
            share = min(step / self.steps, 1.0)
            return min((step + 1) / 100, 1.0) * (0.02 + 0.49 * (1 + math.cos(math.pi * share)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
