"""The one file that knows the classes of `transformers`: where each family keeps its parts, and what its tokens are.

Letters: R images, N image tokens of an image, D width of the language model, B rows of the batch, L prompt tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ..core.errors import PruneZooError

SUPPORTED = "LLaVA (LlavaForConditionalGeneration with a CLIP tower, as llava-hf/llava-1.5-7b-hf)"


@dataclass(frozen=True)
class VisionAttention:
    """The self-attention whose maps rate the image tokens: that of the block which makes the features."""

    query: nn.Module  # (R, P + N, heads * d) out
    key: nn.Module  # likewise
    heads: int
    scale: float  # of the dot products
    prefix: int  # P tokens before the patches
    cls: int | None  # which of them is CLS


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

    def vision_attention(self) -> VisionAttention:
        """The block whose output the projector reads (the last one, where it reads several)."""
        layer = self.vlm.config.vision_feature_layer
        layer = layer if isinstance(layer, int) else layer[-1]
        blocks = self.vlm.model.vision_tower.encoder.layers
        # Hidden state 0 is the embedding, so state h is the output of block h - 1.
        state = layer if layer >= 0 else len(blocks) + 1 + layer
        if state < 1:
            raise PruneZooError(f"vision_feature_layer={layer} is the patch embedding: there is no attention to read")
        attention = blocks[state - 1].self_attn
        return VisionAttention(
            attention.q_proj, attention.k_proj, attention.num_heads, attention.scale, prefix=1, cls=0
        )

    def query_key(self, embeds: Tensor, positions: Tensor, rows: Tensor, layer: int = 0) -> tuple[Tensor, Tensor]:
        """Queries and keys of one decoder layer, rotated and scaled.

        Args:
            embeds: ``(B, L, D)`` what enters that layer; for the first one the input embeddings.
            positions: ``(B, L)`` position ids.
            rows: ``(B, T)`` columns whose queries are wanted.
            layer: which decoder layer, from 0.

        Returns:
            ``(B, heads, T, d)`` and ``(B, heads, L, d)``.
        """
        decoder = self.vlm.model.language_model
        kind = decoder.config.model_type
        if kind not in ("llama", "mistral", "qwen2"):
            raise PruneZooError(
                f"prompt_attention is not supported for decoder '{kind}'; it is for llama, mistral, qwen2"
            )
        attention = decoder.layers[layer].self_attn
        hidden = decoder.layers[layer].input_layernorm(embeds)
        asked = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
        query = attention.q_proj(asked).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        key = attention.k_proj(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        cos, sin = decoder.rotary_emb(embeds, positions)
        row_cos, row_sin = (
            t.expand(len(rows), -1, -1).gather(1, rows[..., None].expand(-1, -1, t.shape[-1])) for t in (cos, sin)
        )
        query = apply_rotary_pos_emb(query, query, row_cos, row_sin)[0]
        key = apply_rotary_pos_emb(key, key, cos, sin)[0].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return query * attention.scaling, key


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
