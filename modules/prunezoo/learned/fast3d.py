"""After Fast3D: a small scorer foretells the attention of all layers at once; how many tokens stay follows its mass.

Fast3D: Accelerating 3D Multi-modal Large Language Models for Efficient 3D Scene Understanding, Huang et al.,
ACM MM 2025, https://arxiv.org/abs/2507.09334, code https://github.com/wencan25/Fast3D.

From the authors' code: the teacher is the frozen model's attention to its visual columns, mean over all layers, heads
and rows; the scorer is a few decoder layers over the objects, whose self-attention is biased by where two objects lie
to one another (five numbers a pair) and which look at the words of the prompt; the loss is the KL between teacher and
softmax of the scores, so no gradient of the frozen model is needed; and an image keeps the fewest tokens whose
probabilities add up to alpha, `keep="auto"` (:mod:`core.mass`; `python -m trainers.calibrate` finds alpha).

AdaToken-3D (IROS 2025), which prunes 3D models by their attention too, has published neither
method section nor code; this is what can be built of the idea, and why the name says "after".

| | authors' code | ours |
|---|---|---|
| what is scored | 100 objects of a 3D scene, 3 tokens each | the image tokens of any model, one each |
| place of a token | an embedding of the object's number | sines and cosines of row and column in its tile |
| third coordinate of a pair | height | tile, frame or crop |
| words | RoBERTa's states | the prompt as the language model embeds it, and two blocks that make phrases of it |
| inner layers | 4 of width 768, ReLU, dropout | as `config` says, gated cross-attention and SwiGLU, without dropout |
| where tokens go | in front of layer 2, 6 or 16 | in front of layer 0: the scorer has read all that it reads by then |

Self-attention is whole, quadratic in the tokens of an image: 2,880 of them take about 130 MB for 4 heads in float32.

Letters: B images, N image tokens, T words, E hidden width, H heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, Pruner
from ..core.errors import PruneZooError
from ..core.registry import register_pruner
from ._blocks import CrossAttention, Norm, SwiGLU, join_heads, place_features, place_in_tile, split_heads
from ._reader import PromptReader

PAIR = 5  # numbers that say where two tokens lie to one another


@dataclass(frozen=True)
class Fast3DConfig(PrunerConfig):
    """Sizes of the scorer."""

    width: int = 4096  # D, width of the language model's input embeddings
    hidden: int = 512  # E, width inside the scorer
    heads: int = 8  # H; 2 * heads divides hidden
    layers: int = 4  # decoder layers over the image tokens
    text_blocks: int = 2  # blocks of the prompt encoder
    octaves: int = 5  # of the sines and cosines of a token's place, see `ppm`

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("width", "hidden", "heads", "layers", "text_blocks", "octaves"):
            if getattr(self, name) < 1:
                raise PruneZooError(f"fast3d: {name} must be at least 1, got {getattr(self, name)}")
        if self.hidden % (2 * self.heads):
            raise PruneZooError(f"fast3d: hidden={self.hidden} must be a multiple of 2 * heads={2 * self.heads}")


@register_pruner("fast3d")
class Fast3D(Pruner):
    """Scores the visual tokens as the logits of the attention that the whole model is going to pay to them."""

    stage = "prompt"
    criteria = ("learned score",)
    distribution = True
    reads_prompt = True
    config_class = Fast3DConfig
    config: Fast3DConfig

    def __init__(self, config: Fast3DConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        c = self.config
        self.enter = PromptReader(self.name, c.width, c.hidden, c.heads, c.text_blocks)
        self.place = nn.Linear(4 * c.octaves + 2, c.hidden)
        self.layers = nn.ModuleList(Layer(c.hidden, c.heads) for _ in range(c.layers))
        self.head = nn.Sequential(
            nn.Linear(c.hidden, c.hidden // 2), nn.ReLU(), nn.LayerNorm(c.hidden // 2), nn.Linear(c.hidden // 2, 1)
        )

    @classmethod
    def tiny_config(cls, feature_dim: int, text_dim: int) -> dict[str, Any]:
        """See the base class."""
        return {"width": feature_dim, "hidden": 16, "heads": 2, "layers": 2, "text_blocks": 1}

    def score(self, inputs: PruneInputs) -> Tensor:
        """Scores (B, N) float32, higher = keep: logits of the attention over the image's tokens."""
        dtype = self.place.weight.dtype
        tokens, words, real = self.enter(inputs)
        x = tokens + self.place(place_features(inputs, self.config.octaves).to(dtype))
        pairs = pair_features(inputs).to(dtype)
        for layer in self.layers:
            x = layer(x, inputs.valid, pairs, words, real)
        return self.head(x).squeeze(-1).float()


class Layer(nn.Module):
    """Attention among the tokens, biased by where they lie, then to the words, then SwiGLU; all residual."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.mix = LocatedAttention(hidden, heads)
        self.ask = CrossAttention(hidden, heads)
        self.feed = SwiGLU(hidden)

    def forward(self, x: Tensor, valid: Tensor, pairs: Tensor, words: Tensor, real: Tensor) -> Tensor:
        """Tokens (B, N, E), pairs (B, N, N, 5), words (B, T, E) and which are real: tokens (B, N, E)."""
        x = x + self.mix(x, valid, pairs)
        x = x + self.ask(x, words, real)
        return x + self.feed(x)


class LocatedAttention(nn.Module):
    """Softmax attention whose logits get a linear function of five numbers a pair, one for each head."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = Norm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.where = nn.Linear(PAIR, heads, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, valid: Tensor, pairs: Tensor) -> Tensor:
        """(B, N, E) to (B, N, E)."""
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        bias = self.where(pairs).permute(0, 3, 1, 2).to(query.dtype)
        # A large number, not -inf: of an image without tokens no row may become NaN.
        bias = bias.masked_fill(~valid[:, None, None], torch.finfo(bias.dtype).min / 2)
        return self.out(join_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=bias)))


def pair_features(inputs: PruneInputs) -> Tensor:
    """Where each token lies to each other one.

    With row and column from 0 to 1 within the tile, and the number of the tile as third coordinate, as the authors have
    it for boxes in a room: the distance; sine and cosine of the direction within the picture; sine and cosine of the
    slope towards the other tile.

    Args:
        inputs: The images.

    Returns:
        (B, N, N, 5) float32; direction and slope of a token to itself are 0.
    """
    place = place_in_tile(inputs)
    down, right = (place[:, None] - place[:, :, None]).unbind(-1)
    tile = inputs.cells[..., 0].clamp_min(0).float()
    beyond = tile[:, None] - tile[:, :, None]
    flat = torch.hypot(down, right)
    whole = torch.hypot(flat, beyond)
    within, all_in_all = flat.clamp_min(1e-6), whole.clamp_min(1e-6)
    return torch.stack([whole, down / within, right / within, beyond / all_in_all, flat / all_in_all], dim=-1)
