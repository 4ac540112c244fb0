"""Qwen-VL: pictures of any resolution, positions in time, height and width."""

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

from .base import END, IMAGE, SIDE, START, TEXT, VIDEO, WORD, Family, Sample, Size, noise

QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START,
               "vision_end_token_id": END}  # fmt: skip


class Qwen2VL(Family):
    """Any resolution, patches of 4 pixels merged two by two."""

    videos = True
    patch = 4

    def text(self) -> dict[str, Any]:
        return {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}

    def config(self) -> Any:
        vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
        return Qwen2VLConfig(text_config=self.text(), vision_config=vision, **QWEN_TOKENS)

    def merged(self, size: Size) -> Size:
        """Rows and columns of tokens."""
        return size[0] // self.patch // 2, size[1] // self.patch // 2

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        rows, columns = self.merged(size)
        return [START, *[IMAGE] * (rows * columns), END]

    def clip_ids(self, frames: int) -> list[int]:
        rows, columns = self.merged((SIDE, SIDE))
        return [START, *[VIDEO] * (frames // 2 * rows * columns), END]

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        width = 3 * 2 * self.patch**2
        batch = {}
        images = [(1, h // self.patch, w // self.patch) for sample in samples for h, w in sample.images]
        if images:
            batch["image_grid_thw"] = torch.tensor(images)
            batch["pixel_values"] = noise(random, int(batch["image_grid_thw"].prod(1).sum()), width)
        clips = [(n // 2, SIDE // self.patch, SIDE // self.patch) for sample in samples for n in sample.clips]
        if clips:
            batch["video_grid_thw"] = torch.tensor(clips)
            batch["pixel_values_videos"] = noise(random, int(batch["video_grid_thw"].prod(1).sum()), width)
        return batch

    def token_types(self, ids: Tensor, prefix: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


class Qwen25VL(Qwen2VL):
    def config(self) -> Any:
        vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_heads": 2,
                  "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}  # fmt: skip
        return Qwen2_5_VLConfig(text_config=self.text(), vision_config=vision, **QWEN_TOKENS)

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        batch = super().pixels(samples, random)
        if "video_grid_thw" in batch:
            batch["second_per_grid_ts"] = torch.full((len(batch["video_grid_thw"]),), 0.5)
        return batch


class Qwen3VL(Qwen2VL):
    """Two levels of deepstack; the frames of a clip stand apart, each behind its time."""

    def config(self) -> Any:
        vision = {"depth": 3, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_heads": 2,
                  "patch_size": 4, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]}  # fmt: skip
        text = {**self.text(), "num_hidden_layers": 4, "head_dim": 8}
        return Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)

    def clip_ids(self, frames: int) -> list[int]:
        rows, columns = self.merged((SIDE, SIDE))
        step = [START, *[VIDEO] * (rows * columns), END]
        return [token for time in range(frames // 2) for token in (WORD + time, *step)]
