"""The families of vision-language models: the one place that knows the classes of `transformers`.

Each adapter says where a family keeps its parts, what its visual tokens are and in which form it takes its inputs.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...core.errors import PruneZooError
from .base import PIXELS, Family, Visual
from .gemma import Gemma3Family, PaliGemmaFamily
from .llava import LlavaFamily, LlavaNextFamily, LlavaOnevisionFamily
from .qwen import Qwen3VLFamily, Qwen25VLFamily, QwenVLFamily
from .tiled import Idefics3Family, InternVLFamily, SmolVLMFamily

__all__ = ["FAMILIES", "PIXELS", "Family", "Visual", "find_family", "require_float_mask"]

FAMILIES: dict[str, type[Family]] = {
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
"""Adapters, by ``config.model_type``."""


def find_family(vlm: nn.Module) -> Family:
    """The adapter for a model, which may be wrapped by PEFT or torch.compile.

    Raises:
        PruneZooError: The family is not supported; the message names those that are. Or PEFT puts virtual tokens before
            the prompt.
    """
    inner = _unwrap(vlm)
    if isinstance(inner, PreTrainedModel) and inner.config.model_type in FAMILIES and inner.can_generate():
        return FAMILIES[inner.config.model_type](inner)
    kind = inner.config.model_type if isinstance(inner, PreTrainedModel) else "no transformers model"
    titles = ", ".join(family.title for family in FAMILIES.values())
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
