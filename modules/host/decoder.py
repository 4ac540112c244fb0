"""The decoder inside a vision-language model: its layers, and rows of their attention made from queries and keys.

Letters: B rows of the batch, L tokens, T rows asked for, D width, d width of a head.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ..core.errors import PruneZooError

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, ``(B, L, d)`` each, as the decoder hands them to its layers."""


class Decoder:
    """The language model of a vision-language model."""

    def __init__(self, vlm: PreTrainedModel) -> None:
        """Find it."""
        self.model: Any = vlm.get_decoder()
        self.layers: Any = self.model.layers

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def rotary(self, hidden: Tensor, positions: Tensor) -> Rotary:
        """Cosines and sines for position ids ``(B, L)``."""
        cos, sin = self.model.rotary_emb(hidden, positions)
        return cos, sin

    def query_key(self, layer: int, hidden: Tensor, rotary: Rotary | None, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of one layer, scaled.

        Args:
            layer: Which, from 0.
            hidden: ``(B, L, D)`` what enters that layer.
            rotary: As the decoder made them; None leaves the rotary embedding out.
            rows: ``(B, T)`` columns whose queries are wanted.

        Returns:
            ``(B, heads, T, d)`` and ``(B, heads, L, d)``.
        """
        kind = self.model.config.model_type
        if kind not in ("llama", "mistral", "qwen2"):
            raise PruneZooError(
                f"attention signals are not supported for decoder '{kind}'; they are for llama, mistral, qwen2"
            )
        block = self.layers[layer]
        attention = block.self_attn
        normed = block.input_layernorm(hidden)
        asked = normed.gather(1, rows[..., None].expand(-1, -1, normed.shape[-1]))
        query = attention.q_proj(asked).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        key = attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        if rotary is not None:
            cos, sin = (t.expand(len(rows), -1, -1) for t in rotary)
            row_cos, row_sin = (t.gather(1, rows[..., None].expand(-1, -1, t.shape[-1])) for t in (cos, sin))
            query = apply_rotary_pos_emb(query, query, row_cos, row_sin)[0]
            key = apply_rotary_pos_emb(key, key, cos, sin)[0]
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return query * attention.scaling, key

    def attention_rows(self, layer: int, hidden: Tensor, rotary: Rotary | None, rows: Tensor, real: Tensor) -> Tensor:
        """Softmax weights of some rows of one layer's attention, mean over heads.

        Args:
            layer: Which, from 0.
            hidden: ``(B, L, D)`` what enters that layer.
            rotary: As in :meth:`query_key`.
            rows: ``(B, T)`` columns whose rows are wanted.
            real: ``(B, L)`` bool, False for padding.

        Returns:
            ``(B, T, L)`` float32; a row sees what stands at or before its column.
        """
        query, key = self.query_key(layer, hidden, rotary, rows)
        logits = query @ key.transpose(-1, -2)  # (B, heads, T, L)
        allowed = (torch.arange(hidden.shape[1], device=hidden.device) <= rows[..., None]) & real[:, None]
        logits = logits.masked_fill(~allowed[:, None], torch.finfo(logits.dtype).min)
        return logits.softmax(-1, dtype=torch.float32).mean(1)
