"""The families of vision-language models: the one place that knows the classes of `transformers`.

Each adapter says where a family keeps its parts, what its visual tokens are and in which form it takes its inputs.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...core.errors import PruneZooError
from .base import PIXELS, TAKES_FEATURES, Family, Visual
from .crops import AyaVisionFamily, Cohere2VisionFamily, Lfm2VlFamily, Llama4Family, MiniCpmV46Family, Ovis2Family
from .gemma import Gemma3Family, Gemma3nFamily, Gemma4Family, Gemma4UnifiedFamily, PaliGemmaFamily
from .grids import (
    Ernie45Family,
    Glm4vFamily,
    Glm4vMoeFamily,
    Glm46vFamily,
    GlmOcrFamily,
    KimiFamily,
    LightOnOcrFamily,
    Mistral3Family,
    PaddleOcrFamily,
    VideoLlama3Family,
)
from .llava import LlavaFamily, LlavaNextFamily, LlavaOnevisionFamily
from .llava_kin import (
    FastVlmFamily,
    Granite4VisionFamily,
    LlavaNextVideoFamily,
    PerceptionLmFamily,
    VideoLlavaFamily,
    VipLlavaFamily,
)
from .queries import DeepseekOcr2Family, Molmo2Family
from .qwen import (
    Qwen3VLFamily,
    Qwen3VLMoeFamily,
    Qwen25OmniFamily,
    Qwen25VLFamily,
    Qwen35Family,
    Qwen35MoeFamily,
    QwenVLFamily,
)
from .tiled import Idefics3Family, InternVLFamily, QianfanOcrFamily, SmolVLMFamily

__all__ = ["FAMILIES", "PIXELS", "Family", "Visual", "find_family", "require_float_mask"]

OLDER: dict[str, type[Family]] = {
    "llava": LlavaFamily,
    "llava_next": LlavaNextFamily,
    "llava_onevision": LlavaOnevisionFamily,
    "qwen2_vl": QwenVLFamily,
    "qwen2_5_vl": Qwen25VLFamily,
    "qwen3_vl": Qwen3VLFamily,
    "internvl": InternVLFamily,
    "idefics3": Idefics3Family,
    "smolvlm": SmolVLMFamily,
    "gemma3": Gemma3Family,
    "paligemma": PaliGemmaFamily,
}
"""Those that can be pruned with releases of `transformers` before 5.19, too; the matrix of tests says how far."""
FAMILIES: dict[str, type[Family]] = OLDER | {
    "qwen3_vl_moe": Qwen3VLMoeFamily,
    "qwen3_5": Qwen35Family,
    "qwen3_5_moe": Qwen35MoeFamily,
    "gemma4": Gemma4Family,
    "gemma4_unified": Gemma4UnifiedFamily,
    "mistral3": Mistral3Family,
    "lighton_ocr": LightOnOcrFamily,
    "glm4v": Glm4vFamily,
    "glm46v": Glm46vFamily,
    "glm4v_moe": Glm4vMoeFamily,
    "glm_ocr": GlmOcrFamily,
    "minicpmv4_6": MiniCpmV46Family,
    "lfm2_vl": Lfm2VlFamily,
    "cohere2_vision": Cohere2VisionFamily,
    "aya_vision": AyaVisionFamily,
    "ovis2": Ovis2Family,
    "paddleocr_vl": PaddleOcrFamily,
    "qianfan_ocr": QianfanOcrFamily,
    "fast_vlm": FastVlmFamily,
    "perception_lm": PerceptionLmFamily,
    "qwen2_5_omni_thinker": Qwen25OmniFamily,
    "video_llama_3": VideoLlama3Family,
    "llava_next_video": LlavaNextVideoFamily,
    "molmo2": Molmo2Family,
    "ernie4_5_vl_moe": Ernie45Family,
    "kimi_k25": KimiFamily,
    "granite4_vision": Granite4VisionFamily,
    "llama4": Llama4Family,
    "deepseek_ocr2": DeepseekOcr2Family,
    "gemma3n": Gemma3nFamily,
    "vipllava": VipLlavaFamily,
    "video_llava": VideoLlavaFamily,
}
"""Adapters, by ``config.model_type``."""
UNSUITABLE: dict[str, str] = {
    "exaone4_5": "its `generate` drops the position ids that it is given, so what is left of an image moves",
}
"""Models that would be pruned wrongly without a word, by ``config.model_type``, and why."""


def find_family(vlm: nn.Module) -> Family:
    """The adapter for a model, which may be wrapped by PEFT or torch.compile.

    Raises:
        PruneZooError: The family is not supported; the message names those that are. Or PEFT puts virtual tokens before
            the prompt.
    """
    inner = _unwrap(vlm)
    kind = inner.config.model_type if isinstance(inner, PreTrainedModel) else "no transformers model"
    if kind in UNSUITABLE:
        raise PruneZooError(f"{type(inner).__name__} ({kind}) cannot be pruned: {UNSUITABLE[kind]}; use another model")
    if kind in FAMILIES and inner.can_generate():
        if not TAKES_FEATURES and kind not in OLDER:
            raise PruneZooError(f"{FAMILIES[kind].title} can be pruned with transformers 5.19 or later: upgrade it")
        return FAMILIES[kind](inner)
    titles = ", ".join(dict.fromkeys(family.title for family in FAMILIES.values()))
    raise PruneZooError(
        f"{type(inner).__name__} ({kind}) is not supported; supported: {titles}, each as ...ForConditionalGeneration"
    )


def require_float_mask(vlm: PreTrainedModel) -> None:
    """Refuse attention kernels that cannot add a float to the logits, which would ignore gates or fail late."""
    kernel = vlm.config.get_text_config()._attn_implementation
    if kernel not in ("sdpa", "eager"):
        raise PruneZooError(f"gates need attn_implementation 'sdpa' or 'eager', the language model has '{kernel}'")


def _unwrap(vlm: Any) -> Any:
    """The model inside the wrappers of torch.compile (``_orig_mod``) and PEFT (``get_base_model()``)."""
    if isinstance(vlm, PreTrainedModel):
        return vlm
    if hasattr(vlm, "_orig_mod"):
        return _unwrap(vlm._orig_mod)
    if getattr(getattr(vlm, "active_peft_config", None), "is_prompt_learning", False):
        raise PruneZooError(
            f"{vlm.active_peft_config.peft_type.value} of PEFT puts virtual tokens before the prompt, which pruning "
            "would misplace: use LoRA, or prune the model without it, get_base_model()"
        )
    return _unwrap(vlm.get_base_model()) if hasattr(vlm, "get_base_model") else vlm
