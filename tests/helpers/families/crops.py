"""Newer families whose pictures are crops with tags between, put together by the prompt."""

from typing import Any

import torch
import transformers as T
from torch import Tensor

from .base import (  # fmt: skip
    CELL,
    END,
    GLOBAL,
    IMAGE,
    NEWLINE,
    SIDE,
    START,
    TEXT,
    VIDEO,
    VISION,
    Family,
    Sample,
    Size,
    noise,
    qwen2,
    siglip,
)
from .grids import HYBRID, LINEAR, ROPE
from .shuffled import InternVL


class QianfanOcr(InternVL):
    def config(self) -> Any:
        vision = {**VISION, "image_size": [SIDE, SIDE], "patch_size": [4, 4]}
        text = T.Qwen3Config(**TEXT, head_dim=8)
        return T.QianfanOCRConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=9)


class Crops(Family):
    """Square crops of 9 tokens; a small picture is one crop."""

    side = 3

    def rows(self, size: Size) -> Size:
        """Rows and columns of crops besides the whole picture; none where it is small."""
        rows, columns = -(-size[0] // SIDE), -(-size[1] // SIDE)
        return (0, 0) if rows * columns == 1 else (rows, columns)

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        sizes = [self.rows(size) for sample in samples for size in sample.images]
        count = sum(rows * columns + 1 for rows, columns in sizes)
        return {"pixel_values": noise(random, count, 3, SIDE, SIDE)} if count else {}


def cohere2() -> Any:
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    return T.Cohere2Config(**{**TEXT, "num_hidden_layers": 4}, layer_types=kinds, sliding_window=512)


class Cohere2Vision(Crops):
    """A line break behind each crop."""

    def config(self) -> Any:
        return T.Cohere2VisionConfig(vision_config=siglip(4), text_config=cohere2(), image_token_id=IMAGE,
                                     alignment_intermediate_size=16)  # fmt: skip

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        rows, columns = self.rows(size)
        return [START, *[*[IMAGE] * self.side**2, NEWLINE] * (rows * columns + 1), END]


class AyaVision(Crops):
    """A tag in front of each crop."""

    def config(self) -> Any:
        return T.AyaVisionConfig(vision_config=siglip(4), text_config=cohere2(), image_token_index=IMAGE)

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        rows, columns = self.rows(size)
        crops = [token for tile in range(rows * columns) for token in (CELL + tile, *[IMAGE] * self.side**2)]
        return [START, *crops, GLOBAL, *[IMAGE] * self.side**2, END]


class Ovis2(Crops):
    """The whole picture first; tags that take rows of the visual table."""

    def config(self) -> Any:
        vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "image_size": SIDE, "patch_size": 4, "vocab_size": 40, "hidden_stride": 2,
                  "num_visual_indicator_tokens": 5}  # fmt: skip
        return T.Ovis2Config(vision_config=vision, text_config=qwen2(), image_token_id=IMAGE, hidden_size=32,
                             visual_indicator_token_ids=[9, 10, 11, 12, 13], vocab_size=TEXT["vocab_size"])  # fmt: skip

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        rows, columns = self.rows(size)
        tile, ids = [IMAGE] * self.side**2, []
        for row in range(rows):
            for column in range(columns):
                ids += [*tile, *([11] if column + 1 < columns else [])]
            ids += [12] if row + 1 < rows else []
        return [9, *tile, 10, *ids, 13]


class Llama4(Crops):
    """Separators between crops; the whole picture is the last; chunked attention, layers without positions, experts."""

    chunk, floor = 512, 8192

    def config(self) -> Any:
        text = {**TEXT, "num_hidden_layers": 4, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4,
                "num_experts_per_tok": 1, "attention_chunk_size": self.chunk, "no_rope_layer_interval": 2,
                "interleave_moe_layer_step": 2, "floor_scale": self.floor}  # fmt: skip
        vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
                  "vision_output_dim": 16, "image_size": SIDE, "patch_size": 4, "projector_input_dim": 16,
                  "projector_output_dim": 16}  # fmt: skip
        return T.Llama4Config(vision_config=vision, text_config=text, image_token_index=IMAGE, boi_token_index=START,
                              eoi_token_index=END)  # fmt: skip

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        rows, columns = self.rows(size)
        tile, ids = [IMAGE] * self.side**2, []
        for _ in range(rows):
            for column in range(columns):
                ids += [*tile, CELL if column + 1 < columns else CELL + 1]
        return [START, *ids, GLOBAL, *tile, END]


class Lfm2Vl(Crops):
    """Crops of any shape, patches joined two by two, the thumbnail last; short convolutions in the language model."""

    patch = 4

    def config(self) -> Any:
        vision = {"model_type": "siglip2_vision_model", "hidden_size": 16, "intermediate_size": 24,
                  "num_hidden_layers": 2, "num_attention_heads": 2, "num_patches": 36, "patch_size": self.patch,
                  "vision_use_head": False}  # fmt: skip
        text = T.Lfm2Config(**{**TEXT, "num_hidden_layers": 4}, block_auto_adjust_ff_dim=False,
                            layer_types=["conv", "full_attention"] * 2)  # fmt: skip
        return T.Lfm2VlConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, projector_hidden_size=16)

    def shapes(self, size: Size) -> list[Size]:
        """Rows and columns of patches of each crop."""
        rows, columns = self.rows(size)
        step = self.patch * (4 if rows else 2)  # the thumbnail is half as large as the picture
        whole = size[0] // step * 2, size[1] // step * 2
        return [(SIDE // self.patch, SIDE // self.patch)] * (rows * columns) + [whole]

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        ids = [[IMAGE] * (-(-rows // 2) * -(-columns // 2)) for rows, columns in self.shapes(size)]
        crops = [token for number, tile in enumerate(ids[:-1]) for token in (CELL + number, *tile)]
        return [START, *crops, *([GLOBAL] if crops else []), *ids[-1], END]

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        shapes = [shape for sample in samples for size in sample.images for shape in self.shapes(size)]
        if not shapes:
            return {}
        most, width = max(rows * columns for rows, columns in shapes), 3 * self.patch**2
        pixels, mask = torch.zeros(len(shapes), most, width), torch.zeros(len(shapes), most, dtype=torch.long)
        for own, seen, (rows, columns) in zip(pixels, mask, shapes, strict=True):
            own[: rows * columns] = noise(random, rows * columns, width)
            seen[: rows * columns] = 1
        return {"pixel_values": pixels, "spatial_shapes": torch.tensor(shapes), "pixel_attention_mask": mask}


class MiniCpmV46(Family):
    """A slice of any shape, all slices in one row; patches joined twice two by two; Qwen3.5's language model."""

    patch = 2
    mode = "16x"
    dtype = torch.float64

    def config(self) -> Any:
        vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
                  "image_size": 48, "patch_size": self.patch, "insert_layer_id": 1}  # fmt: skip
        text = {**TEXT, "model_type": "qwen3_5_text", "head_dim": 8, "num_hidden_layers": 4,
                "layer_types": list(HYBRID), **LINEAR, "rope_parameters": dict(ROPE)}  # fmt: skip
        return T.MiniCPMV4_6Config(vision_config=vision, text_config=text, insert_layer_id=1, image_size=48,
                                   image_token_id=IMAGE, video_token_id=VIDEO, downsample_mode=self.mode)  # fmt: skip

    @property
    def step(self) -> int:
        """Pixels along a token."""
        return self.patch * (4 if self.mode == "16x" else 2)

    def merged(self, size: Size) -> Size:
        return size[0] // self.step, size[1] // self.step

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        rows, columns = self.merged(size)
        return [START, *[IMAGE] * (rows * columns), END]

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        sizes = [self.merged(size) for sample in samples for size in sample.images]
        if not sizes:
            return {}
        grids = torch.tensor(sizes, dtype=torch.int32) * (self.step // self.patch)
        count = int(grids.prod(1).sum())
        return {"pixel_values": noise(random, 1, 3, self.patch, count * self.patch), "target_sizes": grids}
