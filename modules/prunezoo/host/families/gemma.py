"""Gemma 3 to 4 and PaliGemma: attention in both directions within parts of the prompt, and sliding windows."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..parts.tower import Tower
from .base import Family, Kind, Order
from .cells import blocks, grid
from .gaps import Short, before_joining


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

    def short(self) -> Short:
        """Before pooling, which needs the square."""
        return before_joining(self.tower())

    def visible(self, batch: Mapping[str, Any], real: Tensor) -> Tensor:
        """Causal, and whole images."""
        causal = super().visible(batch, real)
        types = batch.get("token_type_ids")
        return causal if types is None else causal | within_images(types == 1, real)

    def own_mask(self, mask: Tensor) -> dict[str, Tensor]:
        """One for each type of layer."""
        return {"full_attention": mask, "sliding_attention": within_window(self.config, mask)}


class Gemma3nFamily(Family):
    """Gemma 3n, whose layers carry several streams of hidden states: the layer stage is refused."""

    title = "Gemma 3n"
    as_tensor = ("image",)
    first_layer_reason = "its layers carry several streams of hidden states, which none of them can be cut in"

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """One tile an image."""
        side = math.isqrt(self.config.vision_soft_tokens_per_image)
        return [grid(side, side).flatten(0, 1)] * len(batch["pixel_values"])

    @property
    def first_layer(self) -> int:
        """None."""
        return self.decoder().depth

    def own_mask(self, mask: Tensor) -> dict[str, Tensor]:
        """One for each type of layer."""
        return {"full_attention": mask, "sliding_attention": within_window(self.config, mask)}


class Gemma4Family(Family):
    """Gemma 4: any resolution, patches pooled by their positions; clips; sliding windows.

    E2B and E4B have layers that attend to the keys of earlier ones; in the others the tokens of an image see one
    another, in sliding layers only.
    """

    title = "Gemma 4"
    encoder_keys = {
        "image": ("pixel_values", "image_position_ids"),
        "video": ("pixel_values_videos", "video_position_ids", "num_frames_per_video"),
    }

    @property
    def factor(self) -> int:
        """Patches along a token."""
        return self.config.vision_config.pooling_kernel_size

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """Rows of pooled patches; clips frame by frame."""
        places = batch[f"{kind}_position_ids"].flatten(0, -3)  # (pictures, patches, 2), -1 for padding
        sizes = ((places.amax(1) + 1) // self.factor).tolist()
        if kind == "image":
            return [grid(height, width).flatten(0, 1) for width, height in sizes]
        cells, frames = [], iter(sizes)
        for count in torch.as_tensor(batch["num_frames_per_video"]).tolist():
            own = [
                grid(height, width, tile).flatten(0, 1)
                for tile, (width, height) in zip(range(count), frames, strict=False)
            ]
            cells.append(torch.cat(own))
        return cells

    def visible(self, batch: Mapping[str, Any], real: Tensor) -> Tensor:
        """Causal, and whole images where the language model has it so."""
        causal, types = super().visible(batch, real), batch.get("mm_token_type_ids")
        if types is None or self.config.get_text_config().use_bidirectional_attention != "vision":
            return causal
        return causal | within_images(types > 0, real)

    def own_mask(self, mask: Tensor) -> dict[str, Tensor]:
        """One for each type of layer."""
        column, lowest = torch.arange(mask.shape[-1], device=mask.device), torch.finfo(mask.dtype).min
        causal = mask.masked_fill(column[None] > column[:, None], lowest)
        return {"full_attention": causal, "sliding_attention": within_window(self.config, mask)}


class Gemma4UnifiedFamily(Gemma4Family):
    """Gemma 4 12B: no tower, pixels go through one map; the tokens of an image see one another in all layers."""

    title = "Gemma 4 unified"

    @property
    def factor(self) -> int:
        """The processor joins patches."""
        return 1

    def own_mask(self, mask: Tensor) -> dict[str, Tensor]:
        """Likewise; a block goes before a window, which the mask given does not tell."""
        if mask.shape[-1] > self.config.get_text_config().sliding_window:
            return super(Gemma4Family, self).own_mask(mask)
        return {"full_attention": mask, "sliding_attention": mask}


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

    def short(self) -> Short:
        """Behind the projector, patch by patch."""
        return Short(self.tower(), (self.vlm.model.multi_modal_projector,))

    def visible(self, batch: Mapping[str, Any], real: Tensor) -> Tensor:
        """Causal, and the whole prompt within itself."""
        causal = super().visible(batch, real)
        types = batch.get("token_type_ids")
        if types is None:
            return causal
        prefix = (types == 0) & real
        return causal | (prefix[:, None] & prefix[:, :, None])[:, None]


def within_images(image: Tensor, real: Tensor) -> Tensor:
    """``(B, 1, L, L)`` bool: both in one unbroken run of ``image (B, L)``, and ``real (B, L)``."""
    block = (image & ~pad(image, (1, 0))[:, :-1]).cumsum(1)
    same = (block[:, None] == block[:, :, None]) & image[:, None] & image[:, :, None]
    return (same & real[:, None])[:, None]


def within_window(config: Any, mask: Tensor) -> Tensor:
    """A float mask ``(B, 1, L, L)`` of layers that look no further back than the window of the language model."""
    column = torch.arange(mask.shape[-1], device=mask.device)
    far = column[None] <= column[:, None] - config.get_text_config().sliding_window
    return mask.masked_fill(far, torch.finfo(mask.dtype).min)
