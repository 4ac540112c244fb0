"""The other LLaVAs: another tower; tiles with newlines behind their rows, several pictures, clips."""

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig

from .base import IMAGE, SIDE, VIDEO, VISION, Family, Sample, Size, llama, noise, qwen2, siglip

PINPOINTS = [[24, 24], [24, 48], [48, 24], [48, 48]]


class LlavaSiglip(Family):
    def config(self) -> Any:
        return LlavaConfig(
            vision_config=siglip(6),
            text_config=qwen2(),
            image_token_id=IMAGE,
            image_seq_length=16,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )


class LlavaNext(Family):
    """A thumbnail, then the unpadded grid of tiles with a newline token after each of its rows."""

    most = 0  # tiles beyond which the grid is made smaller; 0: never

    def config(self) -> Any:
        vision = CLIPVisionConfig(**VISION, patch_size=6, projection_dim=16)
        return LlavaNextConfig(
            vision_config=vision,
            text_config=llama(),
            image_token_index=IMAGE,
            image_grid_pinpoints=PINPOINTS,
            image_seq_length=16,
        )

    def tiles(self, size: Size) -> Size:
        """Rows and columns of tiles: the pinpoint that fits best."""

        def fit(point: list[int]) -> tuple[int, int]:
            scale = min(point[0] / size[0], point[1] / size[1])
            used = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
            return used, -(point[0] * point[1] - used)

        height, width = max(PINPOINTS, key=fit)
        return height // SIDE, width // SIDE

    def count(self, size: Size, several: bool) -> int:
        """Tiles, with the thumbnail."""
        rows, columns = self.tiles(size)
        return 1 + rows * columns

    def grid(self, size: Size) -> Size:
        """Rows and columns of tokens, without the padding."""
        rows, columns = (tiles * self.side for tiles in self.tiles(size))
        if size[1] / size[0] > columns / rows:
            rows -= (rows - int(round(size[0] * columns / size[1], 7))) // 2 * 2
        else:
            columns -= (columns - int(round(size[1] * rows / size[0], 7))) // 2 * 2
        ratio = (rows * columns / (self.most * self.side**2)) ** 0.5 if self.most else 0
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        rows, columns = self.grid(size)
        return [IMAGE] * (self.side**2 + rows * (columns + 1))

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        sizes = [size for sample in samples for size in sample.images]
        if not sizes:
            return {}
        counts = [self.count(size, len(sample.images) > 1) for sample in samples for size in sample.images]
        pixels = torch.zeros(len(sizes), max(counts), 3, SIDE, SIDE)
        for image, count in zip(pixels, counts, strict=True):
            image[:count] = noise(random, count, 3, SIDE, SIDE)
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


class LlavaOnevision(LlavaNext):
    """As LLaVA-NeXT; several pictures in one prompt are one tile and one newline each; a clip is pooled frames."""

    most = 2
    videos = True

    def config(self) -> Any:
        return LlavaOnevisionConfig(
            vision_config=siglip(6),
            text_config=qwen2(),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=PINPOINTS,
            vision_aspect_ratio=f"anyres_max_{self.most}",
        )

    def count(self, size: Size, several: bool) -> int:
        return 1 if several else super().count(size, several)

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        return [IMAGE] * (self.side**2 + 1) if several else super().image_ids(size)

    def clip_ids(self, frames: int) -> list[int]:
        return [VIDEO] * (frames * (self.side // 2) ** 2 + 1)

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        batch = super().pixels(samples, random)
        if batch:
            batch["batch_num_images"] = torch.tensor([len(sample.images) for sample in samples if sample.images])
        clips = [frames for sample in samples for frames in sample.clips]
        if clips:
            batch["pixel_values_videos"] = noise(random, len(clips), clips[0], 3, SIDE, SIDE)
        return batch
