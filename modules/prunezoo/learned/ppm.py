"""PPM: a small classifier that can be plugged in reads image and prompt, and scores the image tokens.

CoViPAL: Layer-wise Contextualized Visual Token Pruning for Large Vision-Language Models, Tang et al.,
Findings of EMNLP 2025, https://arxiv.org/abs/2508.17243.

From the paper: one small classifier between projector and language model reads visual and prompt tokens and scores the
visual ones; the language model gets the best K, so that its prefill and cache shrink in every layer; first it learns a
guide layer's attention, then end to end, with the vision-language model frozen.

Reconstructed, since neither the paper's code nor its inner layers could be had: everything inside the classifier. Here
that is a text encoder, which makes phrases of words, and blocks of linear attention over the visual tokens, gated
cross-attention to the prompt and SwiGLU. Visual and prompt tokens meet in the language model's own input space, through
one shared projection and attention whose queries and keys start out as the same map, so that before any training a
visual token looks at the words that it resembles. The query-blind variant is ours too.

Letters: B batch, N image tokens, T prompt tokens, D width of the language model, E hidden width, H heads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, Pruner
from ..core.errors import PruneZooError
from ..core.registry import register_pruner


@dataclass(frozen=True)
class PPMConfig(PrunerConfig):
    """Sizes of a PPM."""

    width: int = 4096  # D, width of the language model's input embeddings
    hidden: int = 512  # E, width inside the pruner
    heads: int = 8  # H, divides hidden
    blocks: int = 4  # blocks that end in a choice between visual tokens
    text_blocks: int = 2  # blocks of the prompt encoder; unused if not query_aware
    octaves: int = 5  # position features are sines and cosines of 2^0 ... 2^(octaves - 1) half turns over the picture
    query_aware: bool = True  # False: reads no prompt, so that one choice serves every question about an image
    feed_widths: tuple[int, ...] = ()  # inner width of each feed-forward layer, blocks before text blocks; (): 2 hidden
    attention_heads: tuple[int, ...] = ()  # heads left of each attention, blocks before text blocks; (): all

    @property
    def feeds(self) -> int:
        """Feed-forward layers: one of each block, then one of each text block."""
        return self.blocks + (self.text_blocks if self.query_aware else 0)

    @property
    def attentions(self) -> int:
        """Attentions: of each block that among the tokens and, if query_aware, that to the prompt; then one of each
        text block.
        """
        return self.blocks * (1 + self.query_aware) + (self.text_blocks if self.query_aware else 0)

    @property
    def inner(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Width of each feed-forward layer and heads of each attention, written out."""
        feeds = self.feed_widths or (2 * self.hidden,) * self.feeds
        return feeds, self.attention_heads or (self.heads,) * self.attentions

    def __post_init__(self) -> None:
        for name in ("width", "hidden", "heads", "blocks", "text_blocks", "octaves"):
            if getattr(self, name) < 1:
                raise PruneZooError(f"ppm: {name} must be at least 1, got {getattr(self, name)}")
        if self.hidden % (2 * self.heads):
            raise PruneZooError(f"ppm: hidden={self.hidden} must be a multiple of 2 * heads={2 * self.heads}")
        for name, most, wanted in (
            ("feed_widths", None, self.feeds),
            ("attention_heads", self.heads, self.attentions),
        ):
            values = getattr(self, name)
            if values and (len(values) != wanted or min(values) < 1 or max(values) > (most or max(values))):
                bound = "at least 1" if most is None else f"from 1 to heads={most}"
                raise PruneZooError(f"ppm: {name}={list(values)!s:.60} must be {wanted} numbers, each {bound}")


@register_pruner("ppm")
class PPM(Pruner):
    """Scores the visual tokens from what they show, where they are and what the prompt asks."""

    stage = "prompt"
    distribution = True
    config_class = PPMConfig
    config: PPMConfig

    def __init__(self, config: PPMConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        c = self.config
        self.project = nn.Linear(c.width, c.hidden, bias=False)  # one map for both, so that likeness survives it
        nn.init.orthogonal_(self.project.weight)
        self.place = nn.Linear(4 * c.octaves + 2, c.hidden)
        feeds, heads = (iter(values) for values in c.inner)
        self.blocks = nn.ModuleList(
            VisualBlock(c.hidden, c.heads, c.query_aware, next(feeds), [next(heads) for _ in range(1 + c.query_aware)])
            for _ in range(c.blocks)
        )
        self.norm = Norm(c.hidden)
        self.head = nn.Linear(c.hidden, 1)
        if c.query_aware:
            self.text_blocks = nn.ModuleList(
                TextBlock(c.hidden, c.heads, next(feeds), next(heads)) for _ in range(c.text_blocks)
            )

    @classmethod
    def tiny_config(cls, feature_dim: int, text_dim: int) -> dict[str, Any]:
        """See the base class."""
        return {"width": feature_dim, "hidden": 16, "heads": 2, "blocks": 2, "text_blocks": 1}

    def score(self, inputs: PruneInputs) -> Tensor:
        """Scores (B, N), higher = keep."""
        return self.rate(self.read(inputs))

    def rate(self, x: Tensor) -> Tensor:
        """Scores (B, N) float32 of what :meth:`read` gave."""
        return self.head(self.norm(x)).squeeze(-1).float()

    @property
    def reads_prompt(self) -> bool:
        """As configured."""
        return self.config.query_aware

    def read(self, inputs: PruneInputs) -> Tensor:
        """Visual tokens (B, N, E) that know what they show, where they are, what is around them and what is asked."""
        c, dtype = self.config, self.head.weight.dtype
        if inputs.features.shape[-1] != c.width:
            raise PruneZooError(
                f"this PPM was built for tokens of width {c.width}, the model's have {inputs.features.shape[-1]}: "
                f"build it with width={inputs.features.shape[-1]}"
            )
        valid = inputs.valid
        x = self._enter(inputs.features) + self.place(place_features(inputs, c.octaves).to(dtype))
        text = text_valid = None
        if c.query_aware:
            if inputs.text is None or inputs.text_valid is None:
                raise PruneZooError("this PPM reads the prompt and got none: give text, or build it query_aware=false")
            text_valid = inputs.text_valid
            text = self._enter(inputs.text) + 0.1 * distance_features(text_valid, c.hidden).to(dtype)
            for text_block in self.text_blocks:
                text = text_block(text, text_valid)
        for block in self.blocks:
            x = block(x, valid, text, text_valid)
        return x

    def _enter(self, tokens: Tensor) -> Tensor:
        """Tokens (B, ·, D) as (B, ·, E), from unit RMS: words are often far smaller than visual tokens."""
        tokens = tokens.to(self.head.weight.dtype)
        return self.project(F.rms_norm(tokens, tokens.shape[-1:]))


class Norm(nn.RMSNorm):
    """RMS norm in the type of its weight: under autocast that is float32, and so is what flows between the layers."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, E) to (…, E)."""
        return super().forward(x.to(self.weight.dtype))


class VisualBlock(nn.Module):
    """Gated cross-attention to the prompt, linear attention over the visual tokens, SwiGLU; all residual.

    Args:
        hidden: E.
        heads: H, of which each is E / H wide.
        query_aware: Whether there is a prompt.
        feed: Inner width of SwiGLU; None: 2 E.
        left: Heads left among the tokens and, if query_aware, to the prompt; (): H.
    """

    def __init__(
        self, hidden: int, heads: int, query_aware: bool, feed: int | None = None, left: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.mix = LinearAttention(hidden, heads, left[0] if left else None)
        self.ask = CrossAttention(hidden, heads, left[1] if left else None) if query_aware else None
        self.feed = SwiGLU(hidden, feed)

    def forward(self, x: Tensor, valid: Tensor, text: Tensor | None, text_valid: Tensor | None) -> Tensor:
        """Tokens (B, N, E), their validity, and prompt (B, T, E) with its own: tokens (B, N, E)."""
        if self.ask is not None:
            x = x + self.ask(x, text, text_valid)
        x = x + self.mix(x, valid)
        return x + self.feed(x)


class TextBlock(nn.Module):
    """Makes phrases of words: depthwise convolution over neighbours, attention in both directions, SwiGLU."""

    def __init__(self, hidden: int, heads: int, feed: int | None = None, left: int | None = None) -> None:
        super().__init__()
        self.neighbours = nn.Conv1d(hidden, hidden, kernel_size=5, padding=2, groups=hidden)
        self.mix = CrossAttention(hidden, heads, left)
        self.feed = SwiGLU(hidden, feed)

    def forward(self, text: Tensor, valid: Tensor) -> Tensor:
        """(B, T, E) to (B, T, E)."""
        text = text + self.neighbours((text * valid[..., None]).transpose(1, 2)).transpose(1, 2)
        text = text + self.mix(text, text, valid)
        return text + self.feed(text)


class LinearAttention(nn.Module):
    """Attention with the feature map elu + 1 (Katharopoulos et al., arXiv 2006.16236): linear in N."""

    def __init__(self, hidden: int, heads: int, left: int | None = None) -> None:
        super().__init__()
        self.heads = heads if left is None else left  # as wide as ever, where some were taken away
        inner = hidden // heads * self.heads
        self.norm = Norm(hidden)
        self.qkv = nn.Linear(hidden, 3 * inner, bias=False)
        self.out = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, N, E) to (B, N, E)."""
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        q, k = F.elu(q.float()) + 1, (F.elu(k.float()) + 1) * valid[:, None, :, None]  # float32: sums over all of N
        context = k.transpose(-1, -2) @ v.float()  # (B, H, E/H, E/H)
        mean = (q @ context) / (q @ k.sum(-2)[..., None]).clamp_min(1e-6)
        return self.out(join_heads(mean.to(x.dtype)))


class CrossAttention(nn.Module):
    """Softmax attention of x to a text, with a learned slot for "none of these words" and a gate.

    Queries and keys start as the same orthogonal map, so attention starts as likeness (after mimetic initialisation,
    Trockman and Kolter, arXiv 2305.09828).
    """

    def __init__(self, hidden: int, heads: int, left: int | None = None) -> None:
        super().__init__()
        self.heads = heads if left is None else left
        inner = hidden // heads * self.heads
        self.norm_x, self.norm_text = Norm(hidden), Norm(hidden)
        self.query, self.key, self.value = (nn.Linear(hidden, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, hidden, bias=False)
        nn.init.orthogonal_(self.query.weight)
        with torch.no_grad():
            self.key.weight.copy_(self.query.weight)
        self.none_key = nn.Parameter(0.02 * torch.randn(inner))
        self.none_value = nn.Parameter(0.02 * torch.randn(inner))
        self.gate = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        """Queries (B, N, E) over words (B, T, E): (B, N, E)."""
        words, rows = self.norm_text(text), (x.shape[0], 1, -1)
        key = torch.cat([self.none_key.expand(rows), self.key(words)], dim=1)
        value = torch.cat([self.none_value.expand(rows), self.value(words)], dim=1)
        seen = F.pad(valid, (1, 0), value=True)[:, None, None, :]
        query, key, value = (split_heads(t, self.heads) for t in (self.query(self.norm_x(x)), key, value))
        return self.gate * self.out(join_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=seen)))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer, arXiv 2002.05202), twice as wide inside unless `inner` says otherwise."""

    def __init__(self, hidden: int, inner: int | None = None) -> None:
        super().__init__()
        inner = 2 * hidden if inner is None else inner
        self.norm = Norm(hidden)
        self.up = nn.Linear(hidden, 2 * inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, E) to (…, E)."""
        value, gate = self.up(self.norm(x)).chunk(2, dim=-1)
        return self.down(value * F.silu(gate))


def place_features(inputs: PruneInputs, octaves: int) -> Tensor:
    """Where each token lies in its own tile, from 0 to 1 on either side, so that any grid works.

    Args:
        inputs: The images.
        octaves: Number of frequencies.

    Returns:
        (B, N, 4 * octaves + 2): sines and cosines of row and column, zero where there is no patch; 1 for a patch;
        the tile's number, folded into [0, 1).
    """
    cells = inputs.cells
    patch = (cells[..., 1:] >= 0).all(-1) & inputs.valid
    turns = place_in_tile(inputs)[..., None] * math.pi * 2.0 ** torch.arange(octaves, device=cells.device)
    waves = torch.cat([turns.sin(), turns.cos()], dim=-1).flatten(2) * patch[..., None]
    number = cells[..., :1].clamp_min(0).float()
    return torch.cat([waves, patch[..., None].float(), number / (number + 1)], dim=-1)


def place_in_tile(inputs: PruneInputs) -> Tensor:
    """``(B, N, 2)`` float32 in (0, 1): row and column of each token's middle over the sides of its own tile."""
    cells = inputs.cells
    patch = (cells[..., 1:] >= 0).all(-1) & inputs.valid
    tile, place = cells[..., 0].clamp_min(0), cells[..., 1:].float() * patch[..., None]
    # a tile's side is one more than the largest index within it
    largest = place.new_zeros(len(cells), max(inputs.tiles, 1), 2)
    where = tile[..., None].expand_as(place)
    side = largest.scatter_reduce(1, where, place, "amax").gather(1, where) + 1
    return (place + 0.5) / side


def distance_features(valid: Tensor, hidden: int) -> Tensor:
    """Sines and cosines of how many words come after each word, so that padding on either side changes nothing.

    Args:
        valid: (B, T) bool.
        hidden: E, even.

    Returns:
        (B, T, E) float32.
    """
    after = valid.flip(1).cumsum(1).flip(1) - 1
    speed = torch.exp(-math.log(1e3) * torch.arange(hidden // 2, device=valid.device) / (hidden // 2))
    angle = after[..., None] * speed
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, E) to (B, H, N, E/H)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, N, E/H) to (B, N, E)."""
    return x.transpose(1, 2).flatten(2)
