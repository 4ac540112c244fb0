"""The types of `transformers` that the host speaks of. Nothing outside `families/` and `parts/` names its classes."""

from typing import Any, TypeAlias

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

VLM: TypeAlias = PreTrainedModel
"""A vision-language model: one of the classes that `families/` supports, perhaps inside PEFT or torch.compile."""
KVCache: TypeAlias = Cache


def empty_cache(vlm: VLM) -> KVCache:
    """A KV cache for the language model of ``vlm`` that grows as it is filled."""
    return DynamicCache(config=vlm.config.get_text_config())


def find_cache(output: Any) -> KVCache | None:
    """The KV cache among what a model returned, as a tuple or in a class."""
    values = output if isinstance(output, tuple) else output.to_tuple()
    return next((value for value in values if isinstance(value, Cache)), None)


def execution_device(vlm: VLM) -> torch.device:
    """Where a model computes: accelerate keeps the weights of an offloaded one on `meta`, and its hooks know better."""
    if vlm.device.type != "meta" and len(set(getattr(vlm, "hf_device_map", {}).values())) < 2:
        return vlm.device  # nothing of it is elsewhere, so no module need be asked
    for module in vlm.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return vlm.device
