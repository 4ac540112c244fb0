"""Families that cut a picture into tiles and join neighbouring patches by a pixel shuffle."""

from typing import Any

import torch
from torch import Tensor
from transformers import Idefics3Config, InternVLConfig, SmolVLMConfig

from .base import CELL, END, GLOBAL, IMAGE, NEWLINE, PAD, SIDE, START, VISION, Family, Sample, Size, llama, noise, qwen2


class InternVL(Family):
    """Tiles of 9 tokens, and a thumbnail where there is more than one tile; one run of placeholders a picture."""

    side = 3

    def config(self) -> Any:
        vision = {**VISION, "image_size": [SIDE, SIDE], "patch_size": [4, 4]}
        return InternVLConfig(vision_config=vision, text_config=qwen2(), image_token_id=IMAGE, image_seq_length=9)

    def tiles(self, size: Size) -> int:
        count = -(-size[0] // SIDE) * -(-size[1] // SIDE)
        return count + (count > 1)

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        return [START, *[IMAGE] * (self.side**2 * self.tiles(size)), END]

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        count = sum(self.tiles(size) for sample in samples for size in sample.images)
        return {"pixel_values": noise(random, count, 3, SIDE, SIDE)} if count else {}


class Idefics3(Family):
    """Tiles of 9 tokens with a tag before each and a line break after each row, then the whole picture."""

    side = 3

    def config(self) -> Any:
        return self.configure(Idefics3Config)

    def configure(self, kind: Any) -> Any:
        return kind(vision_config={**VISION, "patch_size": 4}, text_config=llama(), image_token_id=IMAGE,
                    scale_factor=2, pad_token_id=PAD)  # fmt: skip

    def tiles(self, size: Size) -> Size:
        """Rows and columns of tiles besides the whole picture; none where it is small."""
        rows, columns = -(-size[0] // SIDE), -(-size[1] // SIDE)
        return (0, 0) if rows * columns == 1 else (rows, columns)

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        rows, columns = self.tiles(size)
        tile = [IMAGE] * self.side**2
        ids = []
        for row in range(rows):
            for column in range(columns):
                ids += [START, CELL + 3 * row + column, *tile]
            ids.append(NEWLINE)
        return [*ids, *[NEWLINE][: rows], START, GLOBAL, *tile, START]  # fmt: skip

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        counts = [sum(r * c + 1 for r, c in map(self.tiles, sample.images)) for sample in samples]
        if not max(counts):
            return {}
        pixels = torch.zeros(len(samples), max(counts), 3, SIDE, SIDE)
        mask = torch.zeros(len(samples), max(counts), SIDE, SIDE, dtype=torch.long)
        for row, count in enumerate(counts):
            pixels[row, :count] = noise(random, count, 3, SIDE, SIDE)
            mask[row, :count] = 1
        return {"pixel_values": pixels, "pixel_attention_mask": mask}


class SmolVLM(Idefics3):
    def config(self) -> Any:
        return self.configure(SmolVLMConfig)
