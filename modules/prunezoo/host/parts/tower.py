"""The vision tower: ViTs whose attention can be read, and plain ones whose blocks can be made shorter.

Letters: R pictures (or parts of them) that attend to themselves, S their tokens, H heads, d width of a head.
"""

from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor, nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from ...core.errors import PruneZooError

QUERY, KEY, VALUE, OUTPUT, CONTEXT = "query", "key", "value", "output", "context"
Seen = dict[str, Any]
"""What hooks saw of one pass of an attention, by part; the output is that of its heads, before they are joined; the
context is what it was called with."""


class VisionAttention:
    """The self-attention of one block, of CLIP's and SigLIP's make."""

    names = ("q_proj", "k_proj", "v_proj")  # the modules whose outputs are queries, keys and values
    joiner = "out_proj"  # the module that joins the heads

    def __init__(self, module: Any) -> None:
        """Find its parts."""
        self.module = module
        self.heads: int = module.num_heads

    @property
    def scale(self) -> float:
        """Of the dot products."""
        return self.module.scale

    def watch(self, parts: Collection[str], seen: Seen) -> list[Any]:
        """Put on hooks that write parts of what the attention computes into ``seen``, anew in each pass.

        Args:
            parts: QUERY, KEY, VALUE and OUTPUT are ``(R, S, H, d)``, before any rotary embedding; CONTEXT is keywords.
            seen: Where to write.

        Returns:
            The handles of the hooks.
        """

        def write(part: str) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
                seen[part] = output.unflatten(-1, (self.heads, -1))

            return hook

        handles = [
            getattr(self.module, name).register_forward_hook(write(part))
            for part, name in zip((QUERY, KEY, VALUE), self.names, strict=True)
            if part in parts
        ]
        return handles + self.watch_ends(parts, seen)

    def watch_ends(self, parts: Collection[str], seen: Seen) -> list[Any]:
        """The hooks for CONTEXT and OUTPUT, as far as they are among the parts."""

        def enter(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            seen[CONTEXT] = kwargs

        def leave(_module: nn.Module, args: tuple[Tensor]) -> None:
            heads = args[0].unflatten(-1, (self.heads, -1))
            seen[OUTPUT] = heads if heads.dim() == 4 else heads[None]

        handles = [self.module.register_forward_pre_hook(enter, with_kwargs=True)] if CONTEXT in parts else []
        if OUTPUT in parts:
            handles.append(getattr(self.module, self.joiner).register_forward_pre_hook(leave))
        return handles

    def sequences(self, seen: Seen) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """What attends to itself and to nothing else: queries and keys ``(R, S, H, d)`` as they are multiplied, and the
        mask of the attention.
        """
        yield seen[QUERY], seen[KEY], seen[CONTEXT].get("attention_mask")


class FusedAttention(VisionAttention):
    """The same with one projection for all three, as a server joins them; of its own share of the heads, where several
    processes divide them.
    """

    def watch(self, parts: Collection[str], seen: Seen) -> list[Any]:
        """As above."""

        def write(_module: nn.Module, _args: Any, output: Tensor) -> None:
            seen[QUERY], seen[KEY], seen[VALUE] = output.unflatten(-1, (3, -1, self.module.head_dim)).unbind(-3)

        made = {QUERY, KEY, VALUE} & set(parts)
        handles = [self.module.qkv_proj.register_forward_hook(write)] if made else []
        return handles + self.watch_ends(parts, seen)


class NormedAttention(VisionAttention):
    """InternVL's: queries and keys may have norms of their own."""

    names = ("q_norm", "k_norm", "v_proj")
    joiner = "projection_layer"


class PackedAttention(VisionAttention):
    """Qwen-VL's: all images of a batch, or all windows of all images, in one row, with a rotary embedding."""

    joiner = "proj"

    @property
    def scale(self) -> float:
        """Of the dot products."""
        return self.module.scaling

    def watch(self, parts: Collection[str], seen: Seen) -> list[Any]:
        """R is 1."""

        def write(_module: nn.Module, _args: Any, output: Tensor) -> None:
            seen[QUERY], seen[KEY], seen[VALUE] = output.unflatten(-1, (3, self.heads, -1))[None].unbind(2)

        made = {QUERY, KEY, VALUE} & set(parts)
        handles = [self.module.qkv.register_forward_hook(write)] if made else []
        return handles + self.watch_ends(parts, seen)

    def sequences(self, seen: Seen) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """One for each image or window."""
        cos, sin = seen[CONTEXT]["position_embeddings"]
        query, key = apply_rotary_pos_emb_vision(seen[QUERY], seen[KEY], cos, sin)
        lengths = seen[CONTEXT]["cu_seqlens"].diff().tolist()
        for own_query, own_key in zip(query.split(lengths, 1), key.split(lengths, 1), strict=True):
            yield own_query, own_key, None


class Tower:
    """A plain ViT: CLIP's, with CLS, or SigLIP's, without; that of Idefics3 and SmolVLM is of the same make.

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
        self.blocks = self.find_blocks()
        self.has_cls, self.prefix = has_cls, int(has_cls)

    def find_blocks(self) -> Any:
        """The modules."""
        return self.model.encoder.layers

    @property
    def depth(self) -> int:
        """Blocks up to the one whose output is projected."""
        # Hidden state 0 is the embedding, so state h is the output of block h - 1.
        last = self.layers[-1]
        count = last if last >= 0 else len(self.blocks) + 1 + last
        if count < 1:
            raise PruneZooError(f"vision_feature_layer={last} is the patch embedding: there is no attention to read")
        return count

    def block_index(self, block: int | Fraction | None = None) -> int:
        """The number of a block, from 0.

        Args:
            block: Its number, from 0 or from the end of those that run; or, as a share of all blocks, how many there
                are up to it and with it, rounded, at least one; None: the one that makes the features.

        Raises:
            PruneZooError: It does not run.
        """
        if isinstance(block, Fraction):
            index = max(round(block * len(self.blocks)), 1) - 1
        else:
            index = self.depth - 1 if block is None else block if block >= 0 else self.depth + block
        if not 0 <= index < self.depth:
            raise PruneZooError(f"vision block {block} does not run: this tower's blocks are 0 to {self.depth - 1}")
        return index

    def next_block(self) -> int:
        """The number of the block behind the projected one: it runs, though the model reads nothing of it.

        Raises:
            PruneZooError: The tower has none.
        """
        if self.depth == len(self.blocks):
            without = (
                "" if self.has_cls else ", and, since it has no CLS token, what patches receive (attention='received')"
            )
            raise PruneZooError(
                "this vision tower has no block behind the projected one, as '@next' names it: configure the pruner to "
                f"read the projected one (block='projected'){without}"
            )
        return self.depth

    @property
    def kernel(self) -> str:
        """The name of its attention implementation, as "sdpa"."""
        return self.model.config._attn_implementation

    @property
    def patch_embedding(self) -> nn.Conv2d | nn.Conv3d:
        """The convolution that patches enter by: pictures ``(R, C, height, width)``, or single patches of F frames,
        ``(S, C, F, p, p)``.
        """
        return next(part for part in self.model.modules() if isinstance(part, nn.Conv2d | nn.Conv3d))

    def check_can_shrink(self, name: str, merges: bool = True) -> None:
        """Raise PruneZooError where a pruner would do wrong by taking tokens out of the blocks.

        Args:
            name: Of the pruner.
            merges: Whether it makes tokens of several; one that only drops can do so by whole cells where patches are
                joined behind the tower.
        """
        reason, others = None, ""
        if len(self.layers) > 1:
            reason = f"the projector reads the output of several blocks, vision_feature_layer={self.layers}"
        elif merges and self.joined is not None:
            reason = f"it merges tokens, and {self.joined}"
            others = "one that only drops, as flowcut, spatten or zero_tprune, or "
        if reason is not None:
            raise PruneZooError(
                f"pruner '{name}' cannot act inside this vision tower: {reason}; use {others}a pruner of the prompt or "
                "layer stage"
            )

    def mlp(self, index: int) -> tuple[nn.Module, nn.Module]:
        """The second half of a block: its norm and its MLP."""
        return self.blocks[index].layer_norm2, self.blocks[index].mlp

    def scaled(self, index: int, made: Tensor) -> Tensor:
        """What a block adds of what its MLP has made."""
        return made

    def attention(self, index: int) -> VisionAttention:
        """The attention of a block."""
        module = self.blocks[index].self_attn
        return FusedAttention(module) if hasattr(module, "qkv_proj") else VisionAttention(module)


class InternVLTower(Tower):
    """InternVL's ViT, with CLS."""

    def find_blocks(self) -> Any:
        """The modules."""
        return self.model.encoder.layer

    def attention(self, index: int) -> VisionAttention:
        """Of a block."""
        return NormedAttention(self.blocks[index].attention)

    def mlp(self, index: int) -> tuple[nn.Module, nn.Module]:
        """Of a block."""
        return self.blocks[index].layernorm_after, self.blocks[index].mlp

    def scaled(self, index: int, made: Tensor) -> Tensor:
        """By a factor for each channel."""
        return self.blocks[index].lambda_2 * made


class QwenTower(Tower):
    """The ViT of Qwen-VL, without CLS: any resolution, all images in one row."""

    def find_blocks(self) -> Any:
        """The modules."""
        return self.model.blocks

    def attention(self, index: int) -> VisionAttention:
        """Of a block."""
        return PackedAttention(self.blocks[index].attn)

    def mlp(self, index: int) -> tuple[nn.Module, nn.Module]:
        """Of a block."""
        return self.blocks[index].norm2, self.blocks[index].mlp
