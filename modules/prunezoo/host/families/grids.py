"""Families that read any resolution and give an image one grid of tokens: GLM-4V and its kin, PaddleOCR-VL, ERNIE 4.5
VL, VideoLLaMA 3, Kimi, Mistral 3 and LightOnOCR.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.errors import PruneZooError
from ..parts.tower import QwenTower, Tower
from .base import Family, Kind
from .cells import grid
from .gaps import Short
from .qwen import QwenVLFamily


def frames(times: int, rows: int, columns: int) -> Tensor:
    """``(times * rows * columns, 3)`` long: the cells of a tile for each step of time."""
    return torch.cat([grid(rows, columns, time).flatten(0, 1) for time in range(times)])


class Glm4vFamily(QwenVLFamily):
    """GLM-4V: a clip's frames have the placeholder of images, so clips are not taken."""

    title = "GLM-4V"
    encoder_keys = {"image": ("pixel_values", "image_grid_thw")}
    position_keys = ("image_grid_thw",)

    def tower(self) -> Tower:
        """Patches are joined by a convolution behind it."""
        return Family.tower(self)

    def short(self) -> Short:
        """Before that convolution, which reads the patches of a token and no others."""
        tower = QwenTower(self.vlm.model.visual, -1, has_cls=False)
        return Short(tower, (tower.blocks[-1],), packed=True)


class Glm46vFamily(Glm4vFamily):
    """GLM-4.6V."""

    title = "GLM-4.6V"


class Glm4vMoeFamily(Glm4vFamily):
    """GLM-4.5V: with experts."""

    title = "GLM-4.5V"


class GlmOcrFamily(Glm4vFamily):
    """GLM-OCR."""

    title = "GLM-OCR"


class PaddleOcrFamily(Glm4vFamily):
    """PaddleOCR-VL."""

    title = "PaddleOCR-VL"

    def short(self) -> Short:
        """Of another make."""
        return Family.short(self)


class Ernie45Family(QwenVLFamily):
    """ERNIE 4.5 VL: experts by kind of token; a clip's steps of time are joined, too."""

    title = "ERNIE 4.5 VL"
    position_keys = ("image_grid_thw", "video_grid_thw")

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """One tile for each joined step of time."""
        vision = self.config.vision_config
        merge, joined = vision.spatial_merge_size, 1 if kind == "image" else vision.temporal_merge_size
        sizes = batch[f"{kind}_grid_thw"].tolist()
        return [frames(times // joined, height // merge, width // merge) for times, height, width in sizes]

    def tower(self) -> Tower:
        """Patches are resampled behind it."""
        return Family.tower(self)


class VideoLlama3Family(Family):
    """VideoLLaMA 3: each image says how many patches are joined; the model leaves out what hardly changes in a clip."""

    title = "VideoLLaMA 3"
    encoder_keys = {
        "image": ("pixel_values", "image_grid_thw", "image_merge_sizes"),
        "video": ("pixel_values_videos", "video_grid_thw", "video_merge_sizes", "video_compression_mask"),
    }

    def run_encoder(self, kind: Kind, batch: Mapping[str, Any]) -> Any:
        """Less what is left out, which the model itself does behind its encoder."""
        mask = batch.get("video_compression_mask")
        output = super().run_encoder(kind, {**batch, "video_compression_mask": None})
        if kind == "video" and mask is not None:
            output.pooler_output = torch.cat(list(output.pooler_output))[mask]
        return output

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """One tile for each step of time."""
        sizes = zip(batch[f"{kind}_grid_thw"].tolist(), batch[f"{kind}_merge_sizes"].tolist(), strict=True)
        cells = [frames(times, rows // merge, columns // merge) for (times, rows, columns), merge in sizes]
        mask = batch.get("video_compression_mask")
        if kind == "image" or mask is None:
            return cells
        return [own[kept] for own, kept in zip(cells, mask.cpu().split([len(own) for own in cells]), strict=True)]


class KimiFamily(Family):
    """Kimi K2.5: plain positions. Clips are not taken: transformers splits their features wrongly."""

    title = "Kimi K2.5"
    encoder_keys = {"image": ("pixel_values", "image_grid_thw")}

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """One grid."""
        rows, columns = self.config.vision_config.merge_kernel_size
        sizes = batch["image_grid_thw"].tolist()
        return [grid(height // rows, width // columns).flatten(0, 1) for _, height, width in sizes]


class Mistral3Family(Family):
    """Mistral 3, over Mistral or Ministral 3: breaks behind the rows of an image are words, and stay."""

    title = "Mistral 3"
    encoder_keys = {"image": ("pixel_values", "image_sizes")}

    def check(self) -> None:
        """Features of one layer."""
        layer = getattr(self.config, "vision_feature_layer", -1)
        if not isinstance(layer, int):
            raise PruneZooError(
                f"{self.title} with vision_feature_layer={layer} is not supported; supported: one layer"
            )

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """One grid of merged patches."""
        if batch.get("image_sizes") is None:
            raise PruneZooError(f"{self.title} needs the processor's image_sizes beside pixel_values")
        step = self.config.vision_config.patch_size * self.config.spatial_merge_size
        sizes = torch.as_tensor(batch["image_sizes"]).tolist()
        return [grid(height // step, width // step).flatten(0, 1) for height, width in sizes]


class LightOnOcrFamily(Mistral3Family):
    """LightOnOCR: as Mistral 3, over Qwen3, without breaks."""

    title = "LightOnOCR"
