"""Region focus: a small module foretells where deep layers will look; large pictures are read from coarse to fine.

When Large Vision-Language Model Meets Large Remote Sensing Imagery: Coarse-to-Fine Text-Guided Token Pruning, Luo et
al., ICCV 2025, https://arxiv.org/abs/2503.07588, code https://github.com/VisionXLab/LRS-VQA.

From the authors' code: the region focus module (RFM) learns by distillation the attention logits that the last word of
the prompt gives to the image tokens in some layers of the language model, each head apart, and the tokens that its
softmax over the image rates highest stay. The dynamic image pyramid (DIP) rates the small whole picture first; its best
quarter says which tiles of the large picture are looked at, and only these tiles' tokens are rated then. Reconstructed,
since the training script is not released: the rate and which layers are taught, which the recipe says.

| | authors' code | ours |
|---|---|---|
| the module | R + 1 layers of the language model, a billion weights | R blocks of PPM's make, each followed by a map |
| maps that choose | the last | all, mean over maps and heads |
| loss | KL over the whole row, KL and MSE over the image | without the first; the MSE of logits less their mean |
| how many stay | a quarter, all newlines, the whole picture | `keep`, of both levels together; `whole="first"` |
| levels | as many as there are, each tile with a tower pass of its own | two, those that the model encodes anyway |

So here the pyramid spares the language model, not the tower. It needs to know which tile is the whole picture: LLaVA-
NeXT and LLaVA-OneVision give it, and one unpadded grid of its crops. One tile is one level. Elsewhere, clips included,
all tokens are rated at once, or `pyramid="always"` refuses.

Letters: B images, N image tokens, T words, E hidden width, R maps, H heads of the language model.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import require
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.plan import group_sum
from ..core.registry import register_pruner
from ._blocks import Norm, VisualBlock, place_features, split_heads
from ._reader import PromptReader

APART = 1e4  # between scores of tokens of which some come before all others, far beyond any log-probability


@dataclass(frozen=True)
class RegionFocusConfig(PrunerConfig):
    """Sizes of the module, and how it looks closer."""

    width: int = 4096  # D, width of the language model's input embeddings
    hidden: int = 512  # E, width inside the module
    heads: int = 8  # of its blocks; 2 * heads divides hidden
    text_blocks: int = 2  # blocks of the prompt encoder
    octaves: int = 5  # of the sines and cosines of a token's place, see `ppm`
    maps: int = 2  # R, layers of the language model whose maps are foretold, a block for each
    map_heads: int = 32  # H, attention heads of the language model
    share: float = 0.25  # of the whole picture's tokens, the best of which say where to look closer, in (0, 1]
    pyramid: str = "auto"  # coarse to fine: "auto", where there are a whole picture and its crops; "always"; "never"
    whole: str = "rated"  # tokens of the small whole picture: "rated" beside the others; "first": they go last

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check_choices("region_focus", pyramid=("auto", "always", "never"), whole=("rated", "first"))
        for name in ("width", "hidden", "heads", "text_blocks", "octaves", "maps", "map_heads"):
            if getattr(self, name) < 1:
                raise PruneZooError(f"region_focus: {name} must be at least 1, got {getattr(self, name)}")
        if self.hidden % (2 * self.heads):
            raise PruneZooError(f"region_focus: hidden={self.hidden} must be a multiple of 2 * heads={2 * self.heads}")
        if not 0 < self.share <= 1:
            raise PruneZooError(f"region_focus: share={self.share} must lie in (0, 1]")


@register_pruner("region_focus")
class RegionFocus(Pruner):
    """Scores the visual tokens as the last word will attend to them in deep layers, from coarse to fine."""

    stage = "prompt"
    criteria = ("learned score",)
    distribution = True
    config_class = RegionFocusConfig
    config: RegionFocusConfig

    def __init__(self, config: RegionFocusConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        c = self.config
        self.enter = PromptReader(self.name, c.width, c.hidden, c.heads, c.text_blocks)
        self.place = nn.Linear(4 * c.octaves + 2, c.hidden)
        self.blocks = nn.ModuleList(VisualBlock(c.hidden, c.heads, query_aware=True) for _ in range(c.maps))
        self.head = nn.ModuleList(Map(c.hidden, c.hidden // c.heads, c.map_heads) for _ in range(c.maps))

    @classmethod
    def tiny_config(cls, feature_dim: int, text_dim: int) -> dict[str, Any]:
        """See the base class."""
        return {"width": feature_dim, "hidden": 16, "heads": 2, "text_blocks": 1, "map_heads": 3}

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """What tells a clip of two frames from a picture and its crops."""
        return () if self.config.pyramid == "never" else ("frame",)

    @property
    def reads_prompt(self) -> bool:
        """Always."""
        return True

    def score(self, inputs: PruneInputs) -> Tensor:
        """Scores (B, N) float32, higher = keep: log-shares of the attention; lower by far in tiles not looked at."""
        if self.config.pyramid == "never" or inputs.tiles < 2:
            return shares(self.maps(inputs, inputs.valid), inputs.valid)
        pyramid = Pyramid(inputs)
        if self.config.pyramid == "always":
            require(~(pyramid.there | pyramid.one_tile).all(), lambda: ALWAYS)
        coarse = inputs.valid & (pyramid.base | ~pyramid.there[:, None])
        first = shares(self.maps(inputs, coarse), coarse)
        seen, below = pyramid.zoom(first, self.config.share)
        scores = torch.where(seen, shares(self.maps(inputs, seen), seen), below - APART)
        if self.config.whole == "first":
            scores = scores + APART * (pyramid.base & pyramid.there[:, None])
        return scores

    def maps(self, inputs: PruneInputs, seen: Tensor) -> Tensor:
        """Attention logits (B, R, H, N) float32 of the last word to tokens ``seen`` (B, N) bool; else arbitrary."""
        dtype = self.place.weight.dtype
        tokens, words, real = self.enter(inputs)
        x = tokens + self.place(place_features(inputs, self.config.octaves).to(dtype))
        asking = last_word(words, real)
        found = []
        for block, logits in zip(self.blocks, self.head, strict=True):
            x = block(x, seen, words, real)
            found.append(logits(x, asking))
        return torch.stack(found, dim=1)


ALWAYS = (
    "region_focus: pyramid='always' is for pictures of one tile, or of a small whole picture and one grid of its "
    "crops, as LLaVA-NeXT and LLaVA-OneVision make them; give pyramid='auto', which rates all other tokens at once"
)


class Map(nn.Module):
    """Queries of the last word and keys of the tokens, for each head of a layer of the language model."""

    def __init__(self, hidden: int, size: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, 1 / math.sqrt(size)
        self.norm = Norm(hidden)
        self.query, self.key = (nn.Linear(hidden, heads * size, bias=False) for _ in range(2))

    def forward(self, x: Tensor, asking: Tensor) -> Tensor:
        """Tokens (B, N, E) and the last word (B, 1, E): logits (B, H, N) float32."""
        query, key = split_heads(self.query(asking), self.heads), split_heads(self.key(self.norm(x)), self.heads)
        return (query.float() @ key.float().transpose(-1, -2))[:, :, 0] * self.scale


class Pyramid:
    """The two levels of pictures that come as a small whole picture, tile 0, and one grid of its crops, tile 1."""

    def __init__(self, inputs: PruneInputs) -> None:
        tile, row, column = inputs.cells.clamp_min(0).unbind(-1)
        self.valid = valid = inputs.valid
        moving = valid & (inputs.signal("frame") != 0)
        self.base, self.fine = valid & (tile == 0), valid & (tile == 1)
        self.one_tile = (self.base | ~valid).all(1)
        larger = self.fine.sum(1) > self.base.sum(1)
        self.there = larger & (self.base | self.fine | ~valid).all(1) & ~moving.any(1)  # (B,) bool
        self.row, self.column = row, column

    def side(self, along: Tensor, level: Tensor) -> Tensor:
        """(B, 1): one more than the largest row or column of a level."""
        return along.masked_fill(~level, 0).amax(1, keepdim=True) + 1

    def zoom(self, first: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Where to look closer.

        The grid of crops has as many tiles along a side as the whole picture's side goes into it, rounded up.

        Args:
            first: (B, N) scores of the whole picture's tokens.
            share: Of these, how many choose; at least one.

        Returns:
            (B, N) bool, the tokens that are rated now: of pictures without a pyramid all; and (B, N) what the whole
            picture says of the place where each token is.
        """
        number, where, width = torch.zeros_like(self.row), torch.zeros_like(self.row), self.row.shape[1]
        for along in (self.row, self.column):
            coarse, fine = self.side(along, self.base), self.side(along, self.fine)
            tiles = (fine + coarse - 1) // coarse
            size = torch.where(self.base, coarse, fine)
            number = number * tiles + along * tiles // size
            where = where * coarse + along * coarse // size
        # A level that has lost tokens already may have larger numbers than slots.
        number, where = number.clamp_max(width - 1), where.clamp_max(width - 1)
        count = (self.base.sum(1) * share).long().clamp_min(1).minimum(self.base.sum(1))
        best = topk_mask(first, self.base, count)
        votes = group_sum(best.long(), torch.where(best, number, -1), width)
        seen = torch.where(self.there[:, None], self.base | (self.fine & (votes.gather(1, number) > 0)), self.valid)
        said = group_sum(torch.where(self.base, first, 0), torch.where(self.base, where, -1), width)
        return seen, said.gather(1, where)


def shares(logits: Tensor, seen: Tensor) -> Tensor:
    """The mean over maps and heads of the softmax over the tokens ``seen (B, N)`` of ``logits (B, R, H, N)``.

    Returns:
        (B, N) float32, its logarithm; arbitrary, but finite, for tokens that are not seen.
    """
    lowest = torch.finfo(logits.dtype).min / 4  # not -inf: of an image without tokens nothing may become NaN
    each = logits.masked_fill(~seen[:, None, None], lowest).log_softmax(-1).flatten(1, 2)
    return each.logsumexp(1).clamp_min(-APART / 4) - math.log(each.shape[1])


def last_word(words: Tensor, real: Tensor) -> Tensor:
    """(B, 1, E): the last of the words (B, T, E) that is ``real`` (B, T); 0 where none is."""
    last = (real * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(1)
    return words.take_along_dim(last[:, None, None], 1) * real.any(1)[:, None, None]
