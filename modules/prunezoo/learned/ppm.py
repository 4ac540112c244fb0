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

from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, Pruner
from ..core.errors import PruneZooError
from ..core.prefill import Prefill
from ..core.registry import register_pruner
from ._blocks import Norm, TextBlock, VisualBlock, distance_features, place_features
from ._sizes import BLOCKS, DEEP, HIDDEN, SHARE, largest, text_flops, visual_flops


@dataclass(frozen=True)
class PPMConfig(PrunerConfig):
    """Sizes of a PPM."""

    width: int = 4096  # D, width of the language model's input embeddings
    hidden: int = 0  # E, width inside the pruner; 0: as `budget_flops` says, 512 where no model is known or blocks are
    heads: int = 8  # H, divides hidden
    blocks: int = 0  # blocks that end in a choice between visual tokens; 0: likewise, 4
    text_blocks: int = 2  # blocks of the prompt encoder; unused if not query_aware
    octaves: int = 5  # position features are sines and cosines of 2^0 ... 2^(octaves - 1) half turns over the picture
    query_aware: bool = True  # False: reads no prompt, so that one choice serves every question about an image
    budget_flops: float | None = None  # share of the model's prefill, in operations, that hidden and blocks may take
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
            least = 0 if name in ("hidden", "blocks") else 1
            if getattr(self, name) < least:
                raise PruneZooError(f"ppm: {name} must be at least {least}, got {getattr(self, name)}")
        if self.budget_flops is not None and (self.hidden or self.blocks):
            raise PruneZooError("ppm: budget_flops chooses hidden and blocks: give it, or them")
        if self.budget_flops is not None and not 0 < self.budget_flops <= 1:
            raise PruneZooError(f"ppm: budget_flops must be a share above 0, up to 1, got {self.budget_flops}")
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

    def filled(self) -> Self:
        """See the base class."""
        return replace(self, hidden=self.hidden or HIDDEN, blocks=self.blocks or BLOCKS, budget_flops=None)

    def for_prefill(self, prefill: Prefill) -> Self:
        """`hidden` and `blocks` by `budget_flops`, 0.01 where it is None; itself where one of them is given."""
        if self.hidden or self.blocks:
            return self

        def sized(hidden: int) -> PPMConfig:
            return replace(self, hidden=hidden, blocks=BLOCKS if hidden >= DEEP else BLOCKS // 2, budget_flops=None)

        step, most = 2 * self.heads, (self.budget_flops or SHARE) * prefill.flops
        widths = range(step, max(self.width, step) + 1, step)
        chosen = sized(largest(widths, lambda h: sized(h).flops(prefill), most, "ppm", self.budget_flops))
        return replace(self, **vars(chosen))

    def flops(self, prefill: Prefill) -> int:
        """Operations of the pruner on one picture and its prompt."""
        n, t, e = prefill.tokens, prefill.words if self.query_aware else 0, self.hidden
        reading = 2 * (n + t) * self.width * e + 2 * n * (4 * self.octaves + 2) * e
        writing = self.text_blocks * text_flops(t, e) if self.query_aware else 0
        block = visual_flops(n, t if self.query_aware else None, e, self.heads)
        return reading + writing + self.blocks * block + 2 * n * e


@register_pruner("ppm")
class PPM(Pruner):
    """Scores the visual tokens from what they show, where they are and what the prompt asks."""

    stage = "prompt"
    criteria = ("learned score",)
    distribution = True
    config_class = PPMConfig
    config: PPMConfig

    def __init__(self, config: PPMConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        c = self.config
        self.project = nn.Linear(c.width, c.hidden, bias=False)  # one map for both, so that likeness survives it
        nn.init.orthogonal_(self.project.weight)
        self.place = nn.Linear(4 * c.octaves + 2, c.hidden)
        # not by `inner`: a config of a stranger may say a billion blocks, which are refused as they are made
        feeds = iter(c.feed_widths or repeat(2 * c.hidden))
        heads = iter(c.attention_heads or repeat(c.heads))
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
