"""STViT: from an early block on, a few semantic tokens with places in the picture stand for all patches.

Making Vision Transformers Efficient from A Token Sparsification View, Chang et al., CVPR 2023,
https://arxiv.org/abs/2303.08685, code https://github.com/changsn/STViT-R.

Reconstructed in part: the code, from a description of which this is written, is of Swin alone. Of the plain ViT, which
we have here, the residuals of the second layer are not known.

Two layers make the semantic tokens S of the image tokens X. In the first, means over parts of the grid P look at the
image: S1 = P + MHA(P, X, X), and a feed-forward layer. In the second learned global centres G join the queries, and
the keys are [S1; X]: S2 = S1 + MHA(S1 + G, [S1; X], [S1; X]), and a feed-forward layer. X is dropped. STViT-R
(`recover`) gives all patches again, for tasks that need them: X + MHA(X, S, S).

| | authors' code | ours |
|---|---|---|
| trained | with the whole network, from scratch, on labels | these layers alone, all else frozen, by KL |
| how many tokens | fixed: 16, or 9 for each window | any number: parts of the grid of as equal an area as can be |
| global centres | one for each token | a grid of them, between which a token takes what lies at its place |
| pooling | largest values (paper: means, with learned offsets) | means |
| start | LayerScale of 1e-5 | the plain means: what is added begins at 0 |
| where | DeiT: behind 4 of 12 blocks | behind a third of the depth; `block` |
| attention of later blocks | each token counts once | each as often as its part has patches |
| recovery | in the middle of the network, three times | once, behind the last block |

Letters: B images, N patches, K semantic tokens, C width of the tower.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..core.checks import require_no_nan
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.plan import gather_rows
from ..core.registry import register_pruner
from ..training_free._grid import average, divide, equal_areas

MOST_CENTRES = 64


@dataclass(frozen=True)
class STViTConfig(PrunerConfig):
    """Sizes of STViT's layers."""

    tower_width: int = 1024  # C, width of the vision tower
    heads: int = 8  # of the attentions, divides the width
    feed: int = 2  # width inside the feed-forward layers, in multiples of the tower's
    centres: int = 4  # side of the grid of global centres; 0: none
    block: int | None = None  # behind which block the semantic tokens are made; None: 1/3 of the depth
    recover: bool = False  # STViT-R: behind the tower every patch is made again, and the language model reads them all

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("tower_width", "heads", "feed"):
            if getattr(self, name) < 1:
                raise PruneZooError(f"{name}={getattr(self, name)} of stvit is out of range: at least 1")
        if self.tower_width % self.heads:
            raise PruneZooError(f"tower_width={self.tower_width} of stvit must be a multiple of heads={self.heads}")
        if not 0 <= self.centres <= MOST_CENTRES:
            raise PruneZooError(f"centres={self.centres} of stvit is out of range: 0 to {MOST_CENTRES}")

    def for_tower(self, width: int) -> Self:
        """See the base class."""
        return replace(self, tower_width=width) if self.tower_width == STViTConfig.tower_width else self


@register_pruner("stvit")
class STViT(Pruner):
    """Two layers of attention that make K semantic tokens, and with `recover` one that undoes it."""

    stage = "vision"
    criteria = ("learned tokens",)
    after_block = True
    merges = True
    config_class = STViTConfig
    config: STViTConfig

    def __init__(self, config: STViTConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        c = self.config
        self.restore = c.recover  # type: ignore[misc]  # of an instance: it follows the config
        self.first, self.second = (Gathering(c.tower_width, c.heads, c.feed * c.tower_width) for _ in range(2))
        self.centres = nn.Parameter(torch.randn(c.centres**2, c.tower_width)) if c.centres else None
        self.undo = Attending(c.tower_width, c.heads) if c.recover else None

    @classmethod
    def tiny_config(cls, feature_dim: int, text_dim: int) -> dict[str, Any]:
        """See the base class."""
        return {"tower_width": feature_dim, "heads": 2}

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured block, or the one at 1/3 of the depth."""
        return (max(round(depth / 3), 1) - 1 if self.config.block is None else self.config.block,)

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """K semantic tokens of each image, each in the slot of the middle of its part; all tokens stay as they are."""
        if (width := inputs.features.shape[-1]) != self.config.tower_width:
            raise PruneZooError(
                f"this STViT was built for a vision tower of width {self.config.tower_width}, the model's has {width}: "
                f"build it with tower_width={width}"
            )
        index, valid, weight = divide(equal_areas, inputs, keep)
        tokens = inputs.features.masked_fill(~inputs.valid[..., None], 0)
        made = self.first(average(inputs, weight), tokens, inputs.valid)
        places = 0.0 if self.centres is None else self.at(inputs, index, self.centres)
        seen, shown = torch.cat([made, tokens], 1), torch.cat([valid, inputs.valid], 1)
        made = self.second(made, seen, shown, places)
        require_no_nan(made, self.name, "made")
        whole = (keep == inputs.valid.sum(1))[:, None, None]
        features = torch.where(whole, gather_rows(inputs.features, index), made)
        members = weight > 0
        groups = torch.where(members.any(1), members.to(torch.uint8).argmax(1), -1)
        return PruneOutput(index, valid, features, groups=groups)

    def at(self, inputs: PruneInputs, index: Tensor, centres: Tensor) -> Tensor:
        """``(B, K, C)``: what the grid of centres has at the places of ``index (B, K)``, between its points."""
        place = inputs.cells[..., 1:].clamp_min(0)
        last = place.amax(1, keepdim=True).clamp_min(1)
        side = self.config.centres
        steps = gather_rows(place, index) / last * (side - 1)  # (B, K, 2)
        near = (1 - (steps[..., None] - torch.arange(side, device=index.device)).abs()).clamp_min(0)  # (B, K, 2, side)
        shares = near[:, :, 0, :, None] * near[:, :, 1, None]
        return shares.flatten(2).to(centres.dtype) @ centres

    def recover(self, gone: Tensor, left: Tensor, valid: Tensor) -> Tensor | None:
        """See the base class: every patch is what it was, and what it finds in the semantic tokens."""
        if self.undo is None:
            return None
        made = gone + self.undo(gone, left, valid).to(gone.dtype)
        require_no_nan(made, self.name, "made")
        return made


class Attending(nn.Module):
    """Multi-head attention from normed queries to normed keys; gives nothing at first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ask, self.show = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.MultiheadAttention(width, heads, batch_first=True)
        nn.init.zeros_(self.mix.out_proj.weight)

    def forward(self, query: Tensor, seen: Tensor, valid: Tensor) -> Tensor:
        """``(B, K, C)`` of ``query (B, K, C)`` over ``seen (B, M, C)``, where ``valid (B, M)``."""
        dtype = self.ask.weight.dtype
        shown = self.show(seen.to(dtype))
        return self.mix(self.ask(query.to(dtype)), shown, shown, key_padding_mask=~valid, need_weights=False)[0]


class Gathering(nn.Module):
    """One layer: attention, and a feed-forward layer; both residual, both nothing at first."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attend = Attending(width, heads)
        last = nn.Linear(inner, width)
        self.feed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, made: Tensor, seen: Tensor, valid: Tensor, places: Tensor | float = 0.0) -> Tensor:
        """``(B, K, C)``: the tokens ``made`` when they have looked at ``seen (B, M, C)``, where ``valid (B, M)``.

        Args:
            made: ``(B, K, C)``.
            seen: As above.
            valid: Likewise.
            places: What is added to the queries alone.
        """
        made = made + self.attend(made + places, seen, valid)
        return made + self.feed(made)
