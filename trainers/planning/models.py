"""Configurations of large vision-language models: their own, or, where that cannot be read, what is known of some."""

from collections.abc import Callable
from typing import Any

from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from prunezoo.core.errors import PruneZooError


def vicuna(width: int, inner: int, layers: int, heads: int) -> LlavaConfig:
    """LLaVA-1.5: CLIP ViT-L/14 at 336 pixels and a Vicuna."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32064, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=4096,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=text, image_seq_length=576)


def onevision(width: int, inner: int, layers: int, heads: int, groups: int) -> LlavaOnevisionConfig:
    """LLaVA-OneVision: SigLIP so400m at 384 pixels and a Qwen2."""
    vision = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16, image_size=384,
        patch_size=14,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=152000, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups,
    )  # fmt: skip
    return LlavaOnevisionConfig(vision_config=vision, text_config=text)


KNOWN: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "llava-hf/llava-1.5-7b-hf": (vicuna, (4096, 11008, 32, 32)),
    "llava-hf/llava-1.5-13b-hf": (vicuna, (5120, 13824, 40, 40)),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": (onevision, (3584, 18944, 28, 28, 4)),
    "llava-hf/llava-onevision-qwen2-72b-ov-hf": (onevision, (8192, 29568, 80, 64, 8)),
}
"""Sizes by Hub id, used only where the Hub cannot be reached."""


def load_config(vlm: str, download: bool = True) -> tuple[Any, str]:
    """A model's configuration, and where it came from, in words.

    Args:
        vlm: Folder with a `config.json`, or Hub id.
        download: Whether the Hub is asked for what is not on this machine yet.

    Raises:
        PruneZooError: It cannot be read, and the model is none of those known.
    """
    try:
        return AutoConfig.from_pretrained(vlm, local_files_only=not download), "its own config.json"
    except (OSError, ValueError) as error:
        if vlm in KNOWN:
            make, sizes = KNOWN[vlm]
            return make(*sizes), "sizes known here, as the Hub could not be reached"
        reason = str(error).strip().splitlines()[0]
        raise PruneZooError(
            f"no configuration of '{vlm}' ({reason}); give a folder with its config.json, or one of: {', '.join(KNOWN)}"
        ) from None
