"""M3: means over parts of the picture at whatever scale is asked for, adapted so that one model reads them all.

Matryoshka Multimodal Models, Cai et al., ICLR 2025, https://arxiv.org/abs/2405.17430.

From the paper: the grid of projected tokens is averaged over nested squares, so that an image can be read at any of
several scales (24×24, 12×12, 6×6, 3×3 or 1 token), and one model is trained to answer at all of them.

Here any number of tokens is met exactly: the grid is cut into K parts of as equal an area as whole cells allow, and
where K is one of the paper's scales the parts are its squares. The paper trains language model, projector and vision
tower; here the model is frozen. What learns is a residual adapter that all scales share, ours, not the paper's: an
attention within each part, so that the mean may lean towards the tokens that say something, and a feed-forward layer
that sees the part, its place and its size. It starts as the plain mean, to the bit, and reads no prompt, as the paper's
pooling does not, so that what is kept of an image serves every question about it. With ``lora_rank`` a LoRA of the
language model is trained with it, saved beside it in PEFT's format, and switched on only while images lose tokens.

Letters: B images, N image tokens, K parts, D width of the language model, E hidden width, H heads.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.checks import require_no_nan
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.registry import register_pruner
from ..host.parts.lora import Lora
from ..training_free._grid import divide, equal_areas
from ._blocks import Norm, SwiGLU, place_features


@dataclass(frozen=True)
class M3Config(PrunerConfig):
    """Sizes of an M3 adapter."""

    width: int = 4096  # D, width of the language model's input embeddings
    hidden: int = 512  # E, width inside the adapter
    heads: int = 8  # H, divides hidden
    blocks: int = 1  # feed-forward layers
    octaves: int = 5  # position features are sines and cosines of 2^0 ... 2^(octaves - 1) half turns over the picture
    lora_rank: int = 0  # of the LoRA on the language model's attention and feed-forward maps; 0: none
    lora_alpha: int = 32  # its updates are weighed by alpha / rank

    def __post_init__(self) -> None:
        for name in ("width", "hidden", "heads", "blocks", "octaves", "lora_alpha"):
            if getattr(self, name) < 1:
                raise PruneZooError(f"m3: {name} must be at least 1, got {getattr(self, name)}")
        if self.lora_rank < 0:
            raise PruneZooError(f"m3: lora_rank must be at least 0, got {self.lora_rank}")
        if self.hidden % self.heads:
            raise PruneZooError(f"m3: hidden={self.hidden} must be a multiple of heads={self.heads}")


@register_pruner("m3")
class M3(Pruner):
    """Means of nested parts of the grid, refined by a residual adapter that all scales share."""

    stage = "prompt"
    criteria = ("position",)
    config_class = M3Config
    config: M3Config

    def __init__(self, config: M3Config | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        c = self.config
        self.project = nn.Linear(c.width, c.hidden, bias=False)
        self.place = nn.Linear(4 * c.octaves + 2, c.hidden)
        self.scale = nn.Linear(2, c.hidden)
        self.pool = PartAttention(c.hidden, c.heads)
        self.feeds = nn.ModuleList(SwiGLU(c.hidden) for _ in range(c.blocks))
        self.norm = Norm(c.hidden)
        self.out = nn.Linear(c.hidden, c.width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.lora = Lora(c.lora_rank, c.lora_alpha) if c.lora_rank else None

    @classmethod
    def tiny_config(cls, feature_dim: int, text_dim: int) -> dict[str, Any]:
        """See the base class."""
        return {"width": feature_dim, "hidden": 16, "heads": 2}

    def adapt(self, vlm: nn.Module) -> AbstractContextManager[None]:
        """Have the LoRA at hand; :meth:`reduce` switches it."""
        return self.lora.ready(vlm) if self.lora is not None else nullcontext()

    def go_on(self, pruned: bool) -> None:
        """The LoRA is for what follows on a pruned prompt, not for other conversations in between."""
        if self.lora is not None:
            self.lora.switch(pruned)

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """K tokens of each image, each for one part of the grid; a part of one token is that token, unchanged.

        Where no image of the batch loses tokens the LoRA is off, so that all tokens are read by the model as it was. As
        the images leave it, it stays for what is generated from them; see :meth:`go_on`.
        """
        if inputs.features.shape[-1] != self.config.width:
            raise PruneZooError(
                f"this M3 was built for tokens of width {self.config.width}, the model's have "
                f"{inputs.features.shape[-1]}: build it with width={inputs.features.shape[-1]}"
            )
        available = inputs.valid.sum(1)
        if self.lora is not None:
            self.lora.switch(inputs.asked != inputs.counts)
        index, valid, weight = divide(equal_areas, inputs, keep)
        members = weight > 0  # (B, K, N)
        tokens = inputs.features.masked_fill(~inputs.valid[..., None], 0)
        x = self.project(F.rms_norm(tokens, tokens.shape[-1:]))
        x = x + self.place(place_features(inputs, self.config.octaves).to(x.dtype))
        size = members.sum(-1, keepdim=True).clamp_min(1)  # (B, K, 1)
        sizes = torch.cat([size, size / available[:, None, None].clamp_min(1)], dim=-1).log2() / 8
        part = weight.to(x.dtype) @ x + self.scale(sizes.to(x.dtype))
        attention, seen = self.pool(part, x, members)
        part = part + seen
        for feed in self.feeds:
            part = part + feed(part)
        merged = (attention @ tokens.float()).to(tokens.dtype) + self.out(self.norm(part)) * (size > 1)
        require_no_nan(merged, self.name, "made")
        groups = torch.where(members.any(1), members.to(torch.uint8).argmax(1), -1)
        return PruneOutput(index=index, valid=valid, features=merged, groups=groups)


class PartAttention(nn.Module):
    """Attention of each part to its own tokens, even at first; its first head also says how to average them."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_part, self.norm = Norm(hidden), Norm(hidden)
        self.query = nn.Linear(hidden, hidden)  # its bias is what every part looks for: what stands out
        self.key, self.value, self.out = (nn.Linear(hidden, hidden, bias=False) for _ in range(3))
        nn.init.zeros_(self.query.weight)
        nn.init.zeros_(self.query.bias)

    def forward(self, part: Tensor, x: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            part: (B, K, E) what is known of each part.
            x: (B, N, E) tokens.
            members: (B, K, N) bool, the tokens of each part.

        Returns:
            The first head's weights (B, K, N) float32, and what all heads saw (B, K, E).
        """
        x = self.norm(x)
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.query(self.norm_part(part)), self.key(x), self.value(x))
        )
        logits = (query @ key.transpose(-1, -2)).float() * key.shape[-1] ** -0.5  # (B, H, K, N)
        weights = logits.masked_fill(~members[:, None], torch.finfo(torch.float32).min).softmax(-1)
        seen = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        return weights[:, 0], self.out(seen)
