"""Molmo2, whose tokens pool patches by index, and DeepSeek-OCR 2, whose tokens are learned queries."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.errors import PruneZooError
from .base import Family, Kind
from .cells import grid


class Molmo2Family(Family):
    """Molmo2: the whole picture, tile 0, and its crops put together, tile 1; ends of rows are words, and stay.

    Features are added to the placeholders' own embeddings; all image tokens of a prompt see one another. A clip's
    frames have the placeholder of images, so clips are not taken.
    """

    title = "Molmo2"
    encoder_keys = {"image": ("pixel_values", "image_token_pooling", "image_grids")}

    @property
    def consumed(self) -> set[str]:
        """Also what only its processor counts with."""
        return super().consumed | {"image_num_crops"}

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """Both grids of each image."""
        pooling = batch["image_token_pooling"]
        if not bool((pooling >= 0).any(-1).all()):
            raise PruneZooError(
                f"{self.title}: image_token_pooling has tokens of no patch: use the model's own processor"
            )
        sizes = batch["image_grids"].tolist()
        return [torch.cat([grid(a, b).flatten(0, 1), grid(c, d, 1).flatten(0, 1)]) for a, b, c, d in sizes]

    def visible(self, batch: Mapping[str, Any], real: Tensor) -> Tensor:
        """Causal, and all images of a prompt."""
        causal, types = super().visible(batch, real), batch.get("mm_token_type_ids")
        if types is None:
            return causal
        image = (types == 1) & real
        return causal | (image[:, None] & image[:, :, None])[:, None]


class DeepseekOcr2Family(Family):
    """DeepSeek-OCR 2: queries of each crop, then of the whole picture, then a separator, which lives as long as any.

    A query has no place in the picture: its row is 0, its column a number.
    """

    title = "DeepSeek-OCR 2"
    encoder_keys = {"image": ("pixel_values", "pixel_values_local", "num_local_patches")}

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """A tile for each crop, and one for the whole."""
        tower = self.vlm.model.vision_tower
        local, whole = tower.query_768_resolution.num_embeddings, tower.query_1024_resolution.num_embeddings
        counts = [0] * len(batch["pixel_values"])
        if batch.get("pixel_values_local") is not None:
            counts = torch.as_tensor(batch["num_local_patches"]).tolist()
        return [
            torch.cat(
                [
                    *(grid(1, local, tile).flatten(0, 1) for tile in range(count)),
                    grid(1, whole, count).flatten(0, 1),
                    torch.tensor([[-1, -1, -1]]),
                ]
            )
            for count in counts
        ]
