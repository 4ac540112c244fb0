"""Families whose pictures see one another, or whose prompt does."""

from typing import Any

from torch import Tensor
from transformers import Gemma3Config, GemmaConfig, PaliGemmaConfig

from .base import BOS, END, IMAGE, NEWLINE, START, TEXT, Family, Sample, Size, siglip


class Gemma3(Family):
    """9 tokens a picture that see one another; sliding and full layers in turn."""

    side = 3
    window = 512

    def config(self) -> Any:
        text = {
            **TEXT,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": self.window,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
        return Gemma3Config(text_config=text, vision_config=siglip(4).to_dict(), mm_tokens_per_image=9,
                            boi_token_index=START, eoi_token_index=END, image_token_index=IMAGE)  # fmt: skip

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        return [NEWLINE, START, *super().image_ids(size, several), END, NEWLINE]

    def token_types(self, ids: Tensor, prefix: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": (ids == IMAGE).long()}


class PaliGemma(Family):
    """16 tokens a picture, all before the text; the prompt sees itself in both directions."""

    def config(self) -> Any:
        return PaliGemmaConfig(vision_config=siglip(6).to_dict() | {"projection_dim": 32},
                               text_config=GemmaConfig(**TEXT, head_dim=8), image_token_index=IMAGE,
                               projection_dim=32, hidden_size=32)  # fmt: skip

    def prompt(self, sample: Sample, words: list[int]) -> list[int]:
        return [token for size in sample.images for token in self.image_ids(size)] + [BOS, *words, NEWLINE]

    def token_types(self, ids: Tensor, prefix: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": (~prefix).long()}
