"""Gemma 3 and PaliGemma: one square an image, and attention in both directions within parts of the prompt."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..parts.tower import Tower
from .base import Family, Kind, Order, blocks, grid


class Gemma3Family(Family):
    """Gemma 3: the tokens of an image see one another; most layers have a sliding window. Crops are images."""

    title = "Gemma 3"
    as_tensor = ("image",)

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """One tile an image."""
        side = int(self.config.mm_tokens_per_image**0.5)
        return [grid(side, side).flatten(0, 1)] * len(batch["pixel_values"])

    def deal(self, kind: Kind, batch: Mapping[str, Any], values: Tensor, order: Order = "tower") -> Tensor:
        """As the projector pools."""
        return blocks(values, math.isqrt(values.shape[1] // self.config.mm_tokens_per_image))

    def tower(self) -> Tower:
        """SigLIP."""
        return Tower(self.vlm.model.vision_tower, -1, has_cls=False, joined="Gemma 3 pools patches behind it")

    def visible(self, batch: Mapping[str, Any], real: Tensor) -> Tensor:
        """Causal, and whole images."""
        causal = super().visible(batch, real)
        types = batch.get("token_type_ids")
        if types is None:
            return causal
        image = types == 1
        block = (image & ~pad(image, (1, 0))[:, :-1]).cumsum(1)
        same = (block[:, None] == block[:, :, None]) & image[:, None] & image[:, :, None]
        return causal | (same & real[:, None])[:, None]

    def own_mask(self, mask: Tensor) -> dict[str, Tensor]:
        """One for each type of layer."""
        column = torch.arange(mask.shape[-1], device=mask.device)
        far = column[None] <= column[:, None] - self.config.get_text_config().sliding_window
        return {"full_attention": mask, "sliding_attention": mask.masked_fill(far, torch.finfo(mask.dtype).min)}


class PaliGemmaFamily(Family):
    """PaliGemma: the prompt sees itself in both directions, the answer what is before it. Positions begin with 1."""

    title = "PaliGemma"
    as_tensor = ("image",)

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """One tile an image."""
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return [grid(side, side).flatten(0, 1)] * len(batch["pixel_values"])

    def positions(self, batch: Mapping[str, Any], real: Tensor, generating: bool) -> Tensor:
        """`generate` adds the one itself."""
        positions = super().positions(batch, real, generating)
        return positions if generating or batch.get("position_ids") is not None else positions + 1

    def tower(self) -> Tower:
        """SigLIP."""
        return Tower(self.vlm.model.vision_tower, -1, has_cls=False)

    def visible(self, batch: Mapping[str, Any], real: Tensor) -> Tensor:
        """Causal, and the whole prompt within itself."""
        causal = super().visible(batch, real)
        types = batch.get("token_type_ids")
        if types is None:
            return causal
        prefix = (types == 0) & real
        return causal | (prefix[:, None] & prefix[:, :, None])[:, None]
