"""HiPrune: what a middle block of the vision tower attends to, with its neighbours, and what the last block attends to.

HiPrune: Hierarchical Attention for Efficient Token Pruning in Vision-Language Models, Liu et al., Findings of ACL 2026,
https://arxiv.org/abs/2508.00553, code https://github.com/Danielement321/HiPrune.

*Anchors* are the round(alpha * T / 5) tokens that receive most attention in the object block; *buffers* their four
neighbours; *registers* fill up to T, those that receive most attention in the block whose output is projected. A token
receives the mean over heads and over all rows, CLS among them, so towers without CLS do as well.

`text` is the ++ of the paper: that share goes to the tokens that are most like the mean of the question's words. There
they come on top of T. Here they are part of it, so that methods are compared at equal tokens: T is exactly T.

In the flat order a neighbour is one token, or the length of a row, to and fro, of the same tile: it runs over the ends
of rows, and what would lie outside is the first or the last token. The object block is round(9/24 * blocks), from 1.

| | authors' code | paper | ours |
|---|---|---|---|
| object block | 9th of CLIP's 24, 16th of Qwen2.5-VL's 32 | a middle one | `block="9/24"`, or its number from 0 |
| neighbours | flat order | above, below, left, right | `neighbours="flat"`, or `"grid"` |
| T of a picture in tiles | int(T / tiles) for each | – | T for the picture |
| anchors and buffers beyond T | an error | – | anchors first, then the buffers most attended to |
| ++: how many by the text | not released | a share of N on top of T | `text` of T (`text_of="image"`: of N), within T |
| ++: what the text is | not released | CLIP's, else mean embedding | `words="embeddings"`, or `"text_features"` |
| positions | renumbered, in Qwen2.5-VL kept | – | kept |
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.plan import mask_to_index
from ..core.registry import register_pruner
from ._question import question

NEIGHBOURS = ("flat", "grid")
TEXT_OF = ("budget", "image")
WORDS = ("embeddings", "text_features")
AROUND = ((-1, 0), (1, 0), (0, -1), (0, 1))
"""Rows and columns to a neighbour."""


@dataclass(frozen=True)
class HiPruneConfig(PrunerConfig):
    """Settings of HiPrune."""

    alpha: float = 0.1  # share of the tokens that are anchors and buffers, in [0, 1]
    block: str | int = "9/24"  # where objects are seen: how far into the tower, or its number, negative from the end
    neighbours: str = "flat"  # "flat": in raster order, over the ends of rows; "grid": above, below, left, right
    text: float = 0.0  # HiPrune++: share of tokens that are chosen by the question, in [0, 1]
    text_of: str = "budget"  # that share is of "budget", the tokens kept, or of "image", all that there are
    words: str = "embeddings"  # what stands for the question: "embeddings" in their mean, or "text_features"

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("alpha", "text"):
            if not 0 <= getattr(self, name) <= 1:
                raise PruneZooError(f"{name}={getattr(self, name)} of hiprune is out of range: it is a share in [0, 1]")
        if isinstance(self.block, str) and not re.fullmatch(r"[1-9]\d*/[1-9]\d*", self.block):
            raise PruneZooError(f"block='{self.block}' of hiprune is none: a number, or how far in, as '9/24'")
        self.check_choices("hiprune", neighbours=NEIGHBOURS, text_of=TEXT_OF, words=WORDS)


@register_pruner("hiprune")
class HiPrune(Pruner):
    """Anchors, buffers and registers by received attention; with `text` also tokens like the question."""

    criteria = ("attention",)
    config_class = HiPruneConfig
    config: HiPruneConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Attention of two blocks; with `words` by a text encoder what that makes of them, and what they meet."""
        by_encoder = self.config.text > 0 and self.config.words == "text_features"
        more = ("text_features", "vision_states") if by_encoder else ()
        return (f"received_attention@{self.config.block}", "received_attention", *more)

    @property
    def reads_prompt(self) -> bool:
        """With `text`, the ++ of the paper."""
        return self.config.text > 0

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Anchors, buffers, registers, and what the question asks for."""
        object_block, last_block = map(inputs.signal, self.needs[:2])
        whole = keep if self.config.text_of == "budget" else inputs.valid.sum(1)
        by_text = (whole.double() * self.config.text).round().long().minimum(keep)
        budget = keep - by_text

        anchors = topk_mask(object_block, inputs.valid, (budget.double() * self.config.alpha / 5).round().long())
        group = anchors | around(inputs, anchors, self.config.neighbours == "grid")
        chosen = topk_mask(object_block.masked_fill(anchors, torch.inf), group, group.sum(1).minimum(budget))
        chosen |= topk_mask(last_block, inputs.valid & ~chosen, budget - chosen.sum(1))
        if self.config.text > 0:
            chosen |= topk_mask(self.likeness(inputs), inputs.valid & ~chosen, by_text)
        return PruneOutput(*mask_to_index(chosen, inputs.most_asked))

    def likeness(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` float32: cosine of each token to the question."""
        if self.config.words == "text_features":
            tokens, wanted = inputs.signal("vision_states").float(), inputs.signal("text_features").float()
            if tokens.shape[2] != wanted.shape[1]:
                raise PruneZooError(
                    f"hiprune compares text_features with the vision tower's states, of width {tokens.shape[2]}, and "
                    f"got {wanted.shape[1]}: let the text_encoder map them there, or use words=embeddings"
                )
        else:
            asked, text = question(inputs, self.name, "give text, or set text=0")
            tokens = inputs.features.float()
            wanted = text.float().masked_fill(~asked[..., None], 0.0).sum(1)  # the mean, but for its length
        return torch.cosine_similarity(tokens, wanted[:, None], dim=-1)


def around(inputs: PruneInputs, anchors: Tensor, grid: bool) -> Tensor:
    """The neighbours of tokens in their tiles.

    Args:
        inputs: The images.
        anchors: ``(B, N)`` bool.
        grid: Only what lies above, below, left or right; else what lies one, or a row's length, before and behind in
            raster order, and the first or the last token where that is outside.

    Returns:
        ``(B, N)`` bool, anchors among them where they are neighbours of others.
    """
    tile, row, column = inputs.cells.masked_fill(~inputs.valid[..., None], 0).unbind(-1)
    high, wide = (
        torch.zeros_like(tile[:, :1]).repeat(1, inputs.tiles).scatter_reduce(1, tile, extent + 1, "amax")
        for extent in (row, column)
    )
    first = ((high * wide).cumsum(1) - high * wide).gather(1, tile)  # of its tile, in the raster of all tiles
    high, wide = high.gather(1, tile), wide.gather(1, tile)
    place = row * wide + column
    # What earlier stages took away is found nowhere; padding stands behind all.
    codes, order = (first + place).masked_fill(~inputs.valid, torch.iinfo(place.dtype).max).sort(1)
    slots = anchors.shape[1]
    found = anchors.new_zeros(len(anchors), slots + 1)  # the last takes what is not there
    for down, right in AROUND:
        target = first + (place + down * wide + right).clamp_min(0).minimum(high * wide - 1)
        at = torch.searchsorted(codes, target).clamp_max(slots - 1)
        there = anchors & (codes.gather(1, at) == target)
        if grid:
            there &= (row + down >= 0) & (row + down < high) & (column + right >= 0) & (column + right < wide)
        found.scatter_(1, order.gather(1, at).masked_fill(~there, slots), True)
    return found[:, :-1]
