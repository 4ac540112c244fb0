"""The vision tower: plain ViTs whose blocks can be read and made shorter.

Letters: R images, P tokens before the patches, N patches, L = P + N, H heads, d width of a head.
"""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from ..core.errors import PruneZooError

QUERY, KEY, VALUE, MASK = "query", "key", "value", "mask"


class VisionAttention:
    """The self-attention of one block, of CLIP's and SigLIP's make."""

    def __init__(self, module: Any) -> None:
        """Find its parts."""
        self.module = module
        self.heads: int = module.num_heads
        self.scale: float = module.scale  # of the dot products

    def watch(self, parts: Collection[str], store: dict[str, Tensor]) -> list[Any]:
        """Put on hooks that write what the attention computes into ``store``, anew in each pass.

        Args:
            parts: Of ``query``, ``key`` and ``value``: ``(R, L, H, d)``; and ``mask``, as it is given to the attention,
                which is missing where there is none.
            store: Where to write.

        Returns:
            The handles of the hooks.
        """

        def write(part: str) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
                store[part] = output.unflatten(-1, (self.heads, -1))

            return hook

        def write_mask(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            store.pop(MASK, None)
            if kwargs.get("attention_mask") is not None:
                store[MASK] = kwargs["attention_mask"]

        modules = {QUERY: self.module.q_proj, KEY: self.module.k_proj, VALUE: self.module.v_proj}
        handles = [modules[part].register_forward_hook(write(part)) for part in parts if part != MASK]
        if MASK in parts:
            handles.append(self.module.register_forward_pre_hook(write_mask, with_kwargs=True))
        return handles


class Tower:
    """A plain ViT: CLIP's, with CLS, or SigLIP's, without.

    Args:
        model: The vision model.
        feature_layer: The hidden state that the projector reads, from 0 (the patch embedding) or from the end; signals
            are of the last one, where it reads several.
        has_cls: Whether the first token is CLS.
        joined: What joins or resizes tokens between tower and language model, in words; None where each patch becomes
            one token.
    """

    def __init__(
        self, model: Any, feature_layer: int | Sequence[int], has_cls: bool = True, joined: str | None = None
    ) -> None:
        self.model, self.joined = model, joined
        self.layers = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
        self.blocks: Any = model.encoder.layers
        self.has_cls, self.prefix = has_cls, int(has_cls)

    @property
    def depth(self) -> int:
        """Blocks up to the one whose output is projected."""
        # Hidden state 0 is the embedding, so state h is the output of block h - 1.
        last = self.layers[-1]
        count = last if last >= 0 else len(self.blocks) + 1 + last
        if count < 1:
            raise PruneZooError(f"vision_feature_layer={last} is the patch embedding: there is no attention to read")
        return count

    def block_index(self, block: int | None = None) -> int:
        """The number of a block, given from 0 or from the end of those that run; None: the one that makes the features.

        Raises:
            PruneZooError: It does not run.
        """
        index = self.depth - 1 if block is None else block if block >= 0 else self.depth + block
        if not 0 <= index < self.depth:
            raise PruneZooError(f"vision block {block} does not run: this tower's blocks are 0 to {self.depth - 1}")
        return index

    def attention(self, index: int) -> VisionAttention:
        """The attention of a block."""
        return VisionAttention(self.blocks[index].self_attn)
