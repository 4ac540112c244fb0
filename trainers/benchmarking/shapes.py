"""Models of known shapes with random weights, and requests of any length for them, without a processor or a download.

How long a model takes depends on its sizes and not on its weights. Each shape exists twice: as large as it is, and
tiny, so that whatever is measured on a GPU can be tried out on a CPU in seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    SmolVLMConfig,
)

from trainers.planning.models import vicuna

PAD, START, END, IMAGE, VIDEO, TILE, WHOLE, WORD = range(8)
"""Ids of what a prompt is made of here; words from the last one on."""
TINY_TEXT = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": PAD, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A model of a family.

    Attributes:
        name: As tables show it.
        config: Of the model, tiny or not.
        unit: Image tokens that a picture, or a tile of one, has: every length is a multiple; full size, and tiny.
        inputs: What the encoder is given and how placeholders stand, by model, image tokens and a generator.
    """

    name: str
    config: Callable[[bool], Any]
    unit: tuple[int, int]
    inputs: Callable[[Any, int, torch.Generator], tuple[list[int], dict[str, Tensor]]]

    def build(self, tiny: bool, device: str, dtype: torch.dtype) -> Any:
        """The model, in eval mode and frozen, which never stops by itself."""
        torch.manual_seed(0)
        with torch.device(device):
            vlm = AutoModelForImageTextToText.from_config(self.config(tiny), dtype=dtype).eval().requires_grad_(False)
        vlm.generation_config.eos_token_id, vlm.generation_config.pad_token_id = None, PAD
        return vlm


def llava_config(tiny: bool) -> LlavaConfig:
    """LLaVA-1.5-7B's, or one of 16 image tokens."""
    if not tiny:
        config = vicuna(4096, 11008, 32, 32)
        config.image_token_id = IMAGE
        return config
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14
    )
    text = LlamaConfig(**TINY_TEXT)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=16)


def qwen_config(tiny: bool) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-7B's, or a tiny one."""
    text = {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "pad_token_id": PAD, "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    if tiny:
        text |= {**TINY_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
        vision |= {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
        vision |= {"fullatt_block_indexes": [1]}
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip


def smolvlm_config(tiny: bool) -> SmolVLMConfig:
    """SmolVLM-256M's, or one whose tiles have 16 tokens."""
    text: dict[str, Any] = {
        "vocab_size": 49280, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "pad_token_id": PAD,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    vision = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 512, "patch_size": 16,
    }  # fmt: skip
    if tiny:
        text = TINY_TEXT
        vision |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision |= {"image_size": 32, "patch_size": 4}
    return SmolVLMConfig(
        vision_config=vision, text_config=LlamaConfig(**text), image_token_id=IMAGE, scale_factor=2 if tiny else 4,
        pad_token_id=PAD,
    )  # fmt: skip


def pictures(vlm: Any, tokens: int, random: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
    """Square pictures, one behind the other (LLaVA)."""
    vision = vlm.config.vision_config
    count = tokens // (vision.image_size // vision.patch_size) ** 2
    return [IMAGE] * tokens, {
        "pixel_values": torch.randn(count, 3, vision.image_size, vision.image_size, generator=random)
    }


def one_wide(vlm: Any, tokens: int, random: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
    """One picture as wide as it takes (Qwen-VL)."""
    vision, rows = vlm.config.vision_config, 24 if tokens % 24 == 0 else 4
    high, wide = 2 * rows, 2 * tokens // rows
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(high * wide, patch, generator=random)
    return [START, *[IMAGE] * tokens, END], {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, high, wide]])}


def tiled(vlm: Any, tokens: int, random: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
    """One picture in tiles, each behind its tag, the whole picture last (SmolVLM)."""
    vision = vlm.config.vision_config
    each = (vision.image_size // vision.patch_size // vlm.config.scale_factor) ** 2
    count, side = tokens // each, vision.image_size
    ids = [token for _ in range(count - 1) for token in (TILE, *[IMAGE] * each)]
    pixels = torch.randn(1, count, 3, side, side, generator=random)
    mask = torch.ones(1, count, side, side, dtype=torch.long)
    return [*ids, WHOLE, *[IMAGE] * each], {"pixel_values": pixels, "pixel_attention_mask": mask}


SHAPES = (
    Shape("LLaVA-1.5-7B", llava_config, (576, 16), pictures),
    Shape("Qwen2.5-VL-7B", qwen_config, (576, 16), one_wide),
    Shape("SmolVLM-256M", smolvlm_config, (64, 16), tiled),
)


class MadeUp:
    """The same prompt about made up pictures, as a processor would give it; what `measure.Setting` takes as a request.

    Args:
        vlm: The model.
        shape: What it is of.
        batch: Prompts.
        tokens: Image tokens of each, a multiple of the shape's unit.
        length: Words.
    """

    def __init__(self, vlm: Any, shape: Shape, batch: int, tokens: int, length: int) -> None:
        self.items, self.image_tokens = [None] * batch, tokens
        random = torch.Generator().manual_seed(0)
        ids, encoded = shape.inputs(vlm, tokens, random)
        words = torch.randint(WORD, vlm.config.get_text_config().vocab_size, (length,), generator=random).tolist()
        ids = [*ids, *words]
        self.columns, self.length = len(ids), len(ids) - tokens
        prompt = torch.tensor([ids] * batch)
        made = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        for name, values in encoded.items():
            many = values.repeat(batch, *[1] * (values.dim() - 1))
            made[name] = many.to(vlm.device, vlm.dtype if many.is_floating_point() else None)
        if "image_grid_thw" in encoded:
            made["mm_token_type_ids"] = (prompt == IMAGE).long()
        self.batch = {name: values.to(vlm.device) for name, values in made.items()}

    def __call__(self) -> dict[str, Any]:
        """What the model is given."""
        return dict(self.batch)
