"""Tiny random models of every supported family, and batches as the family's processor would make them, straight as
tensors: no tokenizer, no image files, no network. test_families_processors.py holds them against the real processors.

    tiny = tiny_family("qwen3_vl")
    batch = tiny.batch([Sample(images=((48, 40),), words=5), Sample(words=3)])
    tiny.vlm(**batch)

Sizes of pictures are ``(height, width)`` in pixels. They matter where a family reads any resolution, and are ignored
where it reads one.
"""

import inspect
from functools import cache

import pytest
import torch
from transformers import CONFIG_MAPPING

from prunezoo.host.families.base import TAKES_FEATURES

from .base import IMAGE, SIDE, VIDEO, Family, Sample
from .crops import AyaVision, Cohere2Vision, Lfm2Vl, Llama4, MiniCpmV46, Ovis2, QianfanOcr
from .gemma import Gemma3, PaliGemma
from .gemma4 import Gemma3n, Gemma4, Gemma4Blocks, Gemma4Shared, Gemma4Unified
from .grids import (
    Ernie,
    Glm4v,
    Glm4vMoe,
    Glm46V,
    GlmOcr,
    Kimi,
    LightOnOcr,
    Ministral3,
    Mistral3,
    Omni,
    PaddleOcr,
    Qwen3VLMoe,
    Qwen35,
    Qwen35Moe,
    VideoLlama3,
)
from .llava import LlavaNext, LlavaOnevision, LlavaSiglip
from .others import (
    DeepseekOcr2,
    FastVlm,
    Granite4Vision,
    LlavaNextVideo,
    Molmo2,
    PerceptionLm,
    VideoLlava,
    VipLlava,
)
from .qwen import Qwen2VL, Qwen3VL, Qwen25VL
from .shuffled import Idefics3, InternVL, SmolVLM

__all__ = [
    "ALL",
    "CLIPS",
    "FAMILIES",
    "IMAGE",
    "LARGE",
    "MIXED",
    "NEWER",
    "ONE_EACH",
    "QWEN",
    "SIDE",
    "SMALL",
    "TALL",
    "VIDEO",
    "VIDEO_FAMILIES",
    "WIDE",
    "Sample",
    "here",
    "tiny_family",
]

FAMILIES: dict[str, Family] = {
    "llava": Family(),
    "llava_siglip": LlavaSiglip(),
    "llava_next": LlavaNext(),
    "llava_onevision": LlavaOnevision(),
    "qwen2_vl": Qwen2VL(),
    "qwen2_5_vl": Qwen25VL(),
    "qwen3_vl": Qwen3VL(),
    "internvl": InternVL(),
    "idefics3": Idefics3(),
    "smolvlm": SmolVLM(),
    "gemma3": Gemma3(),
    "paligemma": PaliGemma(),
}
MAKES: dict[str, Family] = {
    "qwen3_vl_moe": Qwen3VLMoe(),
    "qwen3_5": Qwen35(),
    "qwen3_5_moe": Qwen35Moe(),
    "gemma4": Gemma4(),
    "gemma4_blocks": Gemma4Blocks(),
    "gemma4_shared": Gemma4Shared(),
    "gemma4_unified": Gemma4Unified(),
    "mistral3": Mistral3(),
    "mistral3_ministral3": Ministral3(),
    "lighton_ocr": LightOnOcr(),
    "glm4v": Glm4v(),
    "glm46v": Glm46V(),
    "glm4v_moe": Glm4vMoe(),
    "glm_ocr": GlmOcr(),
    "minicpmv4_6": MiniCpmV46(),
    "lfm2_vl": Lfm2Vl(),
    "cohere2_vision": Cohere2Vision(),
    "aya_vision": AyaVision(),
    "ovis2": Ovis2(),
    "paddleocr_vl": PaddleOcr(),
    "qianfan_ocr": QianfanOcr(),
    "fast_vlm": FastVlm(),
    "perception_lm": PerceptionLm(),
    "qwen2_5_omni_thinker": Omni(),
    "video_llama_3": VideoLlama3(),
    "llava_next_video": LlavaNextVideo(),
    "molmo2": Molmo2(),
    "ernie4_5_vl_moe": Ernie(),
    "kimi_k25": Kimi(),
    "granite4_vision": Granite4Vision(),
    "llama4": Llama4(),
    "deepseek_ocr2": DeepseekOcr2(),
    "gemma3n": Gemma3n(),
    "vipllava": VipLlava(),
    "video_llava": VideoLlava(),
}
VARIANTS = ("gemma4_blocks", "gemma4_shared", "mistral3_ministral3")
NEWER = {name: tiny for name, tiny in MAKES.items() if TAKES_FEATURES and (name in CONFIG_MAPPING or name in VARIANTS)}
"""Those that need transformers 5.19, as far as the release at hand has them. The matrices of the prompt and layer stage
run on them too; what the other tests hold is of the code that they share with the families above."""
ALL = FAMILIES | NEWER
VIDEO_FAMILIES = [name for name, family in FAMILIES.items() if family.videos]
QWEN = [name for name in FAMILIES if name.startswith("qwen")]

LARGE, WIDE, TALL, SMALL = (48, 40), (24, 48), (48, 24), (24, 24)
ONE_EACH = [Sample((size,), words) for size, words in ((LARGE, 5), (WIDE, 3), (TALL, 6), (SMALL, 4))]
MIXED = [Sample((LARGE,), 5), Sample((), 3), Sample((WIDE, SMALL), 6), Sample((TALL,), 4)]
CLIPS = [Sample((LARGE,), 5, (4,)), Sample((), 4, (4,)), Sample((), 3), Sample((SMALL,), 4)]


@cache
def tiny_family(name: str) -> Family:
    """One of FAMILIES, whose model has been seen to use its pictures; made once a session."""
    family = ALL[name]
    sample = Sample(images=(LARGE,), words=4)
    batch, other = family.batch([sample]), family.batch([sample], seed=1)
    pixels = {key: value for key, value in other.items() if key.startswith("pixel")}
    words = batch["input_ids"] != IMAGE
    text = {key: batch[key][words][None] for key in ("input_ids", "attention_mask", "token_type_ids") if key in batch}
    with torch.no_grad():
        logits = family.vlm(**batch).logits[:, -1]
        changed, dropped = family.vlm(**{**batch, **pixels}).logits[:, -1], family.vlm(**text).logits[:, -1]
    # Without this every comparison of logits could hold by vacuity.
    assert (logits - changed).abs().max() > 0.05, "the picture does not reach the logits"
    assert (logits - dropped).abs().max() > 0.05, "dropping the picture changes nothing"
    return family


def here(name: str) -> Family:
    """A family, unless the release of `transformers` at hand is too old for it, which the matrix sees refused."""
    embeddings = "inputs_embeds" in inspect.signature(FAMILIES[name].vlm.prepare_inputs_for_generation).parameters
    if not TAKES_FEATURES and (name == "qwen3_vl" or not embeddings):
        pytest.skip(f"{name} needs transformers 5.19 or later")
    return tiny_family(name)
