"""The vision tower and the projector for pages: every patch learns to say what it shows, as PatchWords writes it."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from trainers.data.pages_dense import SLOTS
from trainers.data.pages_render import PATCH
from trainers.data.scenes_dense import as_pixels

from .build import tower_of
from .pages_said import PatchWords, shows_something

WEIGHTS = {"name": 2.0, "cell": 0.7, "digit": 2.0, "order": 1.0, "last": 0.6, "bar": 2.5}
_SHARPNESS = 16.0  # of the dot products with what may be said
_LOUDNESS = 0.46  # square length of one vector, by which the distance to the sum is measured
_INKED = 112  # patches that enter the tower at first, as most are empty: more than half of the time is saved
_WHOLE_FROM = 0.97  # of the steps, the whole page


def say(vlm: LlavaForConditionalGeneration, image: Tensor, slots: Tensor | None = None) -> Tensor:
    """Image tokens (B, 256, D) float32 of uint8 pictures; the tower's last layer, which LLaVA leaves out, is not run.

    Args:
        vlm: whose tower and projector look.
        image: (B, 3, 128, 128).
        slots: (B, K), the patches that are looked at; the others never enter the tower. None: all.
    """
    tower = tower_of(vlm)
    hidden = tower.pre_layrnorm(tower.embeddings(as_pixels(image)))
    if slots is not None:
        kept = hidden[:, 1:].gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1]))
        hidden = torch.cat([hidden[:, :1], kept], dim=1)
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    return vlm.model.multi_modal_projector(hidden[:, 1:]).float()


def inked(image: Tensor, keep: int) -> Tensor:
    """Slots (B, keep) of the patches with the most contrast, which are those with ink; ascending."""
    grey = image.float().mean(1)
    patches = F.unfold(grey[:, None], PATCH, stride=PATCH)  # (B, 64, 256)
    contrast = patches.amax(1) - patches.amin(1)
    return contrast.topk(keep, dim=1).indices.sort(dim=1).values


@torch.no_grad()
def start_tower(vlm: LlavaForConditionalGeneration, folder: str) -> None:
    """Take over tower and projector of another frozen model of equal widths; positions are stretched to this grid.

    Args:
        vlm: changed in place.
        folder: the other model's.
    """
    other: Any = LlavaForConditionalGeneration.from_pretrained(Path(folder), dtype=torch.float32)
    known = tower_of(other).state_dict()
    key = "embeddings.position_embedding.weight"
    grid, size = (round((len(weight) - 1) ** 0.5) for weight in (known[key], tower_of(vlm).state_dict()[key]))
    places = known[key][1:].T.reshape(1, -1, grid, grid)
    places = F.interpolate(places, size=(size, size), mode="bicubic", align_corners=False)
    known[key] = torch.cat([known[key][:1], places[0].flatten(1).T])
    tower_of(vlm).load_state_dict({name: weight for name, weight in known.items() if "position_ids" not in name}, False)
    first: Any = vlm.model.multi_modal_projector.linear_1
    first.load_state_dict(other.model.multi_modal_projector.linear_1.state_dict())


class PagesTower(L.LightningModule):
    """Trains ``vlm.model.vision_tower`` and ``multi_modal_projector``.

    Args:
        vlm: the model; trained in place.
        steps: optimiser steps, for the schedule.
        lr: peak learning rate: held for 60 % of the steps, then down to 3 %.
    """

    def __init__(self, vlm: LlavaForConditionalGeneration, steps: int, lr: float = 1.5e-3) -> None:
        super().__init__()
        self.steps, self.lr = steps, lr
        self.tower, self.projector = vlm.model.vision_tower, vlm.model.multi_modal_projector
        self.none = nn.ParameterDict({slot: nn.Parameter(torch.tensor(3.0)) for slot in SLOTS})
        self.words = PatchWords(vlm)
        self.vlm: Any
        self.__dict__["vlm"] = vlm  # its language model stays out of this module's state
        vlm.requires_grad_(False)
        self.tower.requires_grad_(True)
        self.projector.requires_grad_(True)

    def losses(self, batch: dict[str, Tensor], keep: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the weighted losses; accuracy where there is something to say, and how much is said for nothing."""
        waves, slots = self.words.waves, None
        target_sum = self.words(batch)
        if keep is not None:
            slots = inked(batch["image"], keep)
            batch = {slot: batch[slot].gather(1, slots) for slot in SLOTS} | {"image": batch["image"]}
            target_sum = target_sum.gather(1, slots[..., None].expand(-1, -1, target_sum.shape[-1]))
            waves = waves[slots]
        said = say(self.vlm, batch["image"], slots)
        weight = torch.where(shows_something(batch), 3.0, 0.35)
        distance = (said - target_sum).square().sum(-1) / _LOUDNESS
        total = 0.5 * (distance * weight).sum() / weight.sum()
        seen: dict[str, Tensor] = {"distance": distance.mean()}
        for slot, choices in SLOTS.items():
            there = batch[slot] >= 0
            target = torch.where(there, batch[slot], choices)
            logits = _SHARPNESS * (said - waves) @ self.words.table(slot).T
            logits = torch.cat([logits, self.none[slot].expand(*logits.shape[:2], 1)], -1)
            each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
            share = torch.where(there, 3.0, 0.5 * weight + 0.1)
            total = total + WEIGHTS[slot] * (each * share).sum() / share.sum()
            right = logits.argmax(-1) == target
            seen[slot], seen[f"{slot}_idle"] = right[there].float().mean(), (~right[~there]).float().sum() / len(said)
        return total, seen

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One step."""
        loss, _ = self.losses(batch, _INKED if self.global_step < _WHOLE_FROM * self.steps else None)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Accuracy on pages, faces and numbers that training never sees."""
        loss, seen = self.losses(batch)
        self.log_dict({f"val/{name}": value for name, value in (seen | {"loss": loss}).items()}, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW; warm-up, plateau, linear descent."""
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.02, betas=(0.9, 0.98))

        def scale(step: int) -> float:
            left = (self.steps - step) / (0.4 * self.steps)
            return min((step + 1) / 60, 1.0) * (0.03 + 0.97 * min(1.0, max(left, 0.0)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
