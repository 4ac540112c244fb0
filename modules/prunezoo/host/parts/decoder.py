"""The decoder inside a vision-language model: its layers, and rows of their attention made from queries and keys.

Letters: B rows of the batch, L tokens, T rows asked for, D width, d width of a head.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ...core.errors import PruneZooError

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, ``(B, L, d)`` each, as the decoder hands them to its layers; with M-RoPE older releases of
transformers leave ``(3, B, L, d)`` to the layers to join. B may be 1 for all rows. (Llama 4 has one tensor of complex
numbers, ``(B, L, d / 2)``.)"""

KINDS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "gemma",
    "gemma2",
    "gemma3_text",
)
"""Decoders whose attention rows are known to be those of the model."""
MULTIMODAL = (
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "qwen3_vl_moe_text",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "qwen2_5_omni_text",
    "glm4v_text",
    "glm4v_moe_text",
    "glm_ocr_text",
    "paddleocr_vl_text",
    "ernie4_5_vl_moe_text",
)
RECURRENT = ("linear_attention", "conv", "mamba")
"""Layers that keep a state of what they have read, and no keys."""
SCALED_BY_POSITION = ("ministral3",)
"""Decoders whose attention reads the position ids, besides the rotary embedding."""


def take_columns(rotary: Rotary, columns: Tensor) -> Rotary:
    """Cosines and sines of columns ``(B, S)``."""
    if isinstance(rotary, Tensor):
        return take_tokens(rotary, columns)
    cos, sin = (
        t.expand(*t.shape[:-3], len(columns), -1, -1).gather(
            -2, columns[..., None].expand(*t.shape[:-3], *columns.shape, t.shape[-1])
        )
        for t in rotary
    )
    return cos, sin


def take_tokens(values: Tensor, columns: Tensor) -> Tensor:
    """``(B, S, ...)``: what ``values (B or 1, L, ...)`` have in columns ``(B, S)``."""
    return values.expand(len(columns), *values.shape[1:]).take_along_dim(
        columns.view(*columns.shape, *[1] * (values.dim() - 2)), 1
    )


class Decoder:
    """The language model of a vision-language model."""

    def __init__(self, vlm: PreTrainedModel) -> None:
        """Find it."""
        model: Any = vlm.get_decoder()
        self.model: Any = model if hasattr(model, "layers") else model.model  # Llama 4 gives a whole causal model
        self.layers: Any = self.model.layers
        self.config: Any = self.model.config

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def kernel(self) -> str:
        """The name of its attention implementation, as "sdpa"."""
        return self.config._attn_implementation

    @property
    def flash(self) -> bool:
        """Whether that is flash attention, which takes masks ``(B, L)`` only."""
        return self.kernel.startswith("flash_attention")

    @property
    def multimodal_positions(self) -> bool:
        """Whether positions have several axes (M-RoPE), which the layers are not told."""
        return self.config.model_type in MULTIMODAL

    def layer_type(self, layer: int) -> str:
        """What the config calls a layer: layers of one type share masks and rotary embedding."""
        types = getattr(self.config, "layer_types", None)
        return types[layer] if types else "full_attention"

    def recurrent(self, layer: int) -> bool:
        """Whether a layer keeps a state instead of keys: no mask can hide from it what is in its input."""
        return self.layer_type(layer) in RECURRENT

    def source(self, layer: int) -> int:
        """The layer whose keys a layer attends to: its own, or the last of its type in front that lends them."""
        modes = getattr(self.config, "kv_sharing_modes", None)
        if not modes or modes[layer] != "reuse":
            return layer
        kind = self.layer_type(layer)
        return max(i for i, mode in enumerate(modes) if mode == "store" and self.layer_type(i) == kind)

    @property
    def keyed(self) -> list[int]:
        """The layers that have keys of their own in a cache."""
        return [layer for layer in range(self.depth) if not self.recurrent(layer) and self.source(layer) == layer]

    @property
    def last_to_cut(self) -> int:
        """The last layer in front of which a prompt may get shorter: the first whose keys later layers attend to."""
        borrowed = (self.source(layer) for layer in range(self.depth) if self.source(layer) != layer)
        return min(borrowed, default=self.depth - 1)

    @property
    def scales_by_position(self) -> bool:
        """Whether its layers read position ids, which must be those of the columns that are left."""
        return self.config.model_type in SCALED_BY_POSITION

    def window(self, layer: int) -> int | None:
        """How many tokens back a layer sees, itself included; None: all."""
        types = getattr(self.config, "layer_types", None)
        if types and types[layer] != "sliding_attention":
            return None
        return getattr(self.config, "sliding_window", None) if types or self.config.model_type == "mistral" else None

    def rotary(self, hidden: Tensor, positions: Tensor, layer: int = 0) -> Rotary:
        """Cosines and sines for position ids ``(B, L)``, or ``(3 or 4, B, L)`` where they have several axes."""
        if positions.dim() == 3 and len(positions) == 4:
            positions = positions[1:]  # before the axes of the picture stands the running number, which is for masks
        by_type = (self.layer_type(layer),) if hasattr(self.model.rotary_emb, "layer_types") else ()
        cos, sin = self.model.rotary_emb(hidden, positions, *by_type)
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
        block = self._known(layer)
        attention = block.self_attn
        normed = block.input_layernorm(hidden)
        asked = normed.gather(1, rows[..., None].expand(-1, -1, normed.shape[-1]))
        query = attention.q_proj(asked).unflatten(-1, (-1, attention.head_dim))
        if hasattr(attention, "q_norm"):
            query = attention.q_norm(query)
        query, key = query.transpose(1, 2), self._key(attention, normed, rotary)
        if rotary is not None:
            query = apply_rotary_pos_emb(query, query, *take_columns(self.join(rotary), rows))[0]
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return query * attention.scaling, key

    def keys(self, layer: int, hidden: Tensor, rotary: Rotary | None) -> Tensor:
        """``(B, L, H, d)``: the keys of a layer, H as many as it has; arguments as of :meth:`query_key`."""
        block = self._known(layer)
        return self._key(block.self_attn, block.input_layernorm(hidden), rotary).transpose(1, 2)

    def _key(self, attention: Any, normed: Tensor, rotary: Rotary | None) -> Tensor:
        """``(B, H, L, d)`` for what a layer's norm makes of its input."""
        key = attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim))
        if hasattr(attention, "k_norm"):
            key = attention.k_norm(key)
        key = key.transpose(1, 2)
        return key if rotary is None else apply_rotary_pos_emb(key, key, *self.join(rotary))[0]

    def _known(self, layer: int) -> Any:
        """A layer, of a decoder whose make is known."""
        self.check_known()
        return self.layers[layer]

    def check_known(self) -> None:
        """Raise PruneZooError on a decoder of a make of which nobody has checked what its layers compute."""
        if self.config.model_type not in KINDS:
            raise PruneZooError(
                f"signals of layers are not supported for decoder '{self.config.model_type}'; "
                f"they are for {', '.join(KINDS)}"
            )

    def attend(self, layer: int, hidden: Tensor, rotary: Rotary, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The first half of a layer: its attention, run once more, with no cache and past all hooks on it.

        Args:
            layer: Which, from 0.
            hidden: ``(B, L, D)`` what enters that layer.
            rotary: As the decoder made them.
            mask: As of :meth:`attention_rows`; there ``(B, L)`` must be true where the kernel takes no such mask.

        Returns:
            What the attention takes, what it gives before it is added, and what the second half of the layer takes,
            ``(B, L, D)`` each.
        """
        block = self._known(layer)
        given = mask if mask is not None and (mask.dim() == 4 or self.flash) else None
        taken = block.input_layernorm(hidden)
        gave = block.self_attn.forward(
            hidden_states=taken, position_embeddings=rotary, attention_mask=given, past_key_values=None
        )[0]
        # Gemma from 2 on has norms on both sides of attention and MLP.
        both_sides = hasattr(block, "pre_feedforward_layernorm")
        return taken, gave, hidden + (block.post_attention_layernorm(gave) if both_sides else gave)

    def neurons(self, layer: int, half: Tensor) -> tuple[Tensor, Tensor]:
        """What the MLP of a layer takes ``(..., D)``, and its neurons ``(..., F)``.

        Args:
            layer: Which, from 0.
            half: ``(..., D)`` what the second half of the layer takes.
        """
        block = self._known(layer)
        taken = getattr(block, "pre_feedforward_layernorm", block.post_attention_layernorm)(half)
        return taken, block.mlp.act_fn(block.mlp.gate_proj(taken)) * block.mlp.up_proj(taken)

    def attention_rows(
        self, layer: int, hidden: Tensor, rotary: Rotary | None, rows: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Softmax weights ``(B, heads, T, L)``, float32; arguments as in :meth:`attention_logits`."""
        return self.attention_logits(layer, hidden, rotary, rows, mask).softmax(-1, dtype=torch.float32)

    def attention_logits(
        self, layer: int, hidden: Tensor, rotary: Rotary | None, rows: Tensor, mask: Tensor | None
    ) -> Tensor:
        """What the softmax of one layer's attention is taken of, in some rows.

        Args:
            layer: Which, from 0.
            hidden: ``(B, L, D)`` what enters that layer.
            rotary: As in :meth:`query_key`.
            rows: ``(B, T)`` columns whose rows are wanted.
            mask: What the layer is given: ``(B, 1, L, L)`` bool or float to add; or ``(B, L)``, false for padding, or
                None, where a row sees what stands at or before its column, back to the layer's window.

        Returns:
            ``(B, heads, T, L)``; what a row does not see is the lowest number there is.
        """
        query, key = self.query_key(layer, hidden, rotary, rows)
        logits = query @ key.transpose(-1, -2)  # (B, heads, T, L)
        if self.config.model_type == "gemma2" and self.config.attn_logit_softcapping is not None:
            cap = self.config.attn_logit_softcapping
            logits = (logits / cap).tanh() * cap
        lowest = torch.finfo(logits.dtype).min
        if mask is not None and mask.dim() == 4:
            mask = mask.expand(len(rows), -1, -1, -1)
            mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
            logits = logits.masked_fill(~mask, lowest) if mask.dtype == torch.bool else logits + mask
        else:
            back = rows[..., None] - torch.arange(hidden.shape[1], device=hidden.device)  # (B, T, L)
            window = self.window(layer)
            allowed = (back >= 0) if window is None else (back >= 0) & (back < window)
            allowed = allowed if mask is None else allowed & mask.bool()[:, None]
            logits = logits.masked_fill(~allowed[:, None], lowest)
        return logits

    def join(self, rotary: Rotary) -> Rotary:
        """``(B, L, d)`` where each frequency is that of its axis."""
        if rotary[0].dim() == 3:
            return rotary
        sections = [*self.config.rope_parameters["mrope_section"]] * 2
        parts = (t.split(sections, -1) for t in rotary)
        cos, sin = (torch.cat([part[i % 3] for i, part in enumerate(own)], -1) for own in parts)
        return cos, sin
