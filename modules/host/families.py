"""The one file that knows the classes of `transformers`: where each family keeps its parts, and what its tokens are.

Letters: R images, N image tokens of an image, D width of the language model, B rows of the batch, L prompt tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..core.errors import PruneZooError
from .decoder import Decoder
from .tower import Tower

SUPPORTED = "LLaVA (LlavaForConditionalGeneration with a CLIP tower, as llava-hf/llava-1.5-7b-hf)"


class LlavaFamily:
    """LLaVA 1.5: one square grid of patches an image, a CLIP tower with CLS, a Llama-like decoder."""

    def __init__(self, vlm: LlavaForConditionalGeneration) -> None:
        """Look at the configuration, and refuse what would be wrong without a word."""
        vision, config = vlm.config.vision_config, vlm.config
        if vision.model_type != "clip_vision_model" or config.vision_feature_select_strategy != "default":
            raise PruneZooError(
                f"LLaVA with tower '{vision.model_type}' and vision_feature_select_strategy="
                f"'{config.vision_feature_select_strategy}' is not supported; supported: {SUPPORTED}"
            )
        self.vlm = vlm
        self.image_token_id: int = config.image_token_id

    def features(self, batch: dict[str, Any]) -> list[Tensor]:
        """Run tower and projector: for each image its tokens ``(N, D)``, in the order of the placeholders."""
        for key in ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes"):
            if batch.get(key) is not None:
                raise PruneZooError(f"'{key}' in the call is not supported while pruning: set it in the model's config")
        pixels = batch["pixel_values"].to(self.vlm.device)
        return list(self.vlm.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output)

    def cells(self, features: list[Tensor]) -> list[Tensor]:
        """For each image ``(N, 3)`` long: tile (always 0 here), row, column."""
        vision = self.vlm.config.vision_config
        side = vision.image_size // vision.patch_size
        axis = torch.arange(side, device=features[0].device) if features else torch.arange(side)
        row, column = torch.meshgrid(axis, axis, indexing="ij")
        grid = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
        return [grid for _ in features]

    def tower(self) -> Tower:
        """The vision tower."""
        layer = self.vlm.config.vision_feature_layer
        return Tower(self.vlm.model.vision_tower, layer if isinstance(layer, int) else layer[-1])

    def decoder(self) -> Decoder:
        """The language model."""
        return Decoder(self.vlm)


def find_family(vlm: nn.Module) -> LlavaFamily:
    """The adapter for a model.

    Raises:
        PruneZooError: The family is not supported; the message names what is.
    """
    if isinstance(vlm, LlavaForConditionalGeneration):
        return LlavaFamily(vlm)
    kind = vlm.config.model_type if isinstance(vlm, PreTrainedModel) else "no transformers model"
    raise PruneZooError(f"{type(vlm).__name__} ({kind}) is not supported; supported: {SUPPORTED}")


def as_encoder_output(features: list[Tensor]) -> dict[str, BaseModelOutputWithPooling] | None:
    """Features by image in the form in which a model takes them as ``mm_encoder_outputs``; None where there are none.

    Made anew for each call, because beam search edits it in place.
    """
    return {"image": BaseModelOutputWithPooling(pooler_output=list(features))} if features else None


def require_float_mask(vlm: PreTrainedModel) -> None:
    """Refuse attention kernels that cannot add a float to the logits, which would ignore gates or fail late."""
    kernel = vlm.config.get_text_config()._attn_implementation
    if kernel not in ("sdpa", "eager"):
        raise PruneZooError(f"gates need attn_implementation 'sdpa' or 'eager', the language model has '{kernel}'")
