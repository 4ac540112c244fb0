"""The vision tower: plain ViTs whose blocks and attention can be read.

Letters: R images, P tokens before the patches, N patches, d width of a head.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.errors import PruneZooError


@dataclass(frozen=True)
class VisionAttention:
    """The self-attention of one block."""

    query: nn.Module  # (R, P + N, heads * d) out
    key: nn.Module  # likewise
    value: nn.Module  # likewise
    heads: int
    scale: float  # of the dot products
    prefix: int  # P tokens before the patches
    cls: int | None  # which of them is CLS


class Tower:
    """A plain ViT: CLIP's, with CLS.

    Args:
        model: The vision model.
        feature_layer: The hidden state that the projector reads, from 0 (the patch embedding) or from the end; the
            last one, where it reads several.
    """

    def __init__(self, model: Any, feature_layer: int) -> None:
        self.model, self.feature_layer = model, feature_layer
        self.blocks: Any = model.encoder.layers
        self.prefix, self.cls = 1, 0

    @property
    def depth(self) -> int:
        """Blocks up to the one whose output is projected."""
        # Hidden state 0 is the embedding, so state h is the output of block h - 1.
        count = self.feature_layer if self.feature_layer >= 0 else len(self.blocks) + 1 + self.feature_layer
        if count < 1:
            raise PruneZooError(
                f"vision_feature_layer={self.feature_layer} is the patch embedding: there is no attention to read"
            )
        return count

    def attention(self, block: int | None = None) -> VisionAttention:
        """The attention of a block, from 0 or from the end of those that run; None: the one that makes the features."""
        index = self.depth - 1 if block is None else block if block >= 0 else self.depth + block
        if not 0 <= index < self.depth:
            raise PruneZooError(f"vision block {block} does not run: this tower's blocks are 0 to {self.depth - 1}")
        attention = self.blocks[index].self_attn
        return VisionAttention(
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.num_heads,
            attention.scale,
            self.prefix,
            self.cls,
        )
