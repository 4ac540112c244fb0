"""VScan: scan windows by an early block of the tower and the picture by a late one; then prune half-way to the answer.

VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models, Zhang et al., TMLR 2026,
https://arxiv.org/abs/2505.22654, code https://github.com/Tencent/SelfEvolvingAgent (folder VScan).

In front of the language model half of the tokens that stay are the best of each window of the picture, by what CLS
attends to in an early block; the others are the best of all the rest, by the block whose output is projected. Each
token that goes joins the one that stays and is most like it (cosine, behind the projector): a token that stays becomes
the mean of all that joined it and itself. Half-way through the language model the last word of the prompt keeps the
tokens that it attends to most.

`keep` = T is what the layers of the language model read **in the mean**, as in the paper's tables: 1.5 T tokens enter,
and the second stage leaves what makes the mean T: T / 2 at half the depth, down to one. Where 1.5 T is more than there
are, all enter, and more are left at the end, so that `keep` = 1.0 is the model as it is.

Qwen's windows are `window=4`, 4 x 4 tokens, what is left at the edges in the last; LLaVA's are 4 x 4 windows.

| | authors' code | paper | ours |
|---|---|---|---|
| first stage's count | 98 for 100, where 16 does not divide; fails below 32 (`count=floor`) | T | T |
| what windows cannot give | lost; fails (Qwen) | – | the scan of all picks as many more |
| windows | 4 x 4 of 24 x 24 tokens | any | 4 x 4 (`windows=4`) of any grid, for each tile |
| of each window | floor(n / 16); down the scores to a ceiling (Qwen) | equally many | the latter; same if 16 divides |
| early block | b5 of 24; b7 (Qwen) | – | b5 of 24, in other towers as far in (`shallow=6/24`) |
| towers without CLS | attention received, sum over heads | – | the same, mean over heads (`attention=received`) |
| second stage | layer 16 of 32; 14 of 28 (Qwen) | half | half the depth; another (`layer=16`) |
| T tokens in the mean | 1.5 T, then T / 2 | as the code | 1.5 T (`first=1.5`), then what makes the mean T |
| positions | anew; kept (Qwen) | – | kept; anew by `attach(..., positions="compact")` |
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..core.budgets import Keep
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.merge import group_mean
from ..core.plan import gather_rows, mask_to_index
from ..core.registry import register_pruner
from ..core.select import rank_in_groups
from ..core.signals import TOWER_ATTENTION, parse_signal

COUNTS = ("exact", "floor")


@dataclass(frozen=True)
class VScanConfig(PrunerConfig):
    """Config of `vscan`."""

    shallow: str | int = "6/24"  # vision block of the windows: "6/24", the sixth of 24 or as far in; or a number from 0
    attention: str = "cls"  # "cls", or "received" for vision towers without CLS
    windows: int = 4  # along each side of a tile, at least 1
    window: int = (
        0  # instead: the side of a window in tokens, what is left at the edges joins the last; 0: by `windows`
    )
    count: str = "exact"  # of the first stage: "exact"; "floor": each window gives floor(share / windows), no more
    first: float = 1.5  # tokens that enter the language model, for each of `keep`, at least 1
    layer: int | None = (
        None  # in front of which decoder layer the second stage stands, at least 1; None: half the depth
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check_choices("vscan", attention=TOWER_ATTENTION)
        try:
            parse_signal(self.early)
        except PruneZooError:
            raise PruneZooError(f"shallow='{self.shallow}' of vscan is no block: write '6/24', or a number") from None
        self.check_choices("vscan", count=COUNTS)
        if self.windows < 1 or self.window < 0:
            raise PruneZooError(f"windows={self.windows}, window={self.window} of vscan: at least 1 window, 0 tokens")
        if self.first < 1:
            raise PruneZooError(f"first={self.first} of vscan must be at least 1")
        if self.layer is not None and self.layer < 1:
            raise PruneZooError(f"layer={self.layer} of vscan: there must be a layer before it, at least 1")

    @property
    def late(self) -> str:
        """The signal by which the whole picture is scanned."""
        return TOWER_ATTENTION[self.attention]

    @property
    def early(self) -> str:
        """The signal by which its windows are."""
        return f"{self.late}@{self.shallow}"


class Scan(Pruner):
    """The first stage: windows, all the rest, and merging; in front of the language model."""

    name = "vscan"
    config_class = VScanConfig
    config: VScanConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Attention of two blocks."""
        return (self.config.early, self.config.late)

    @property
    def exact(self) -> bool:  # type: ignore[override]  # a class attribute where it is not configured
        """Whether `keep` tokens stay."""
        return self.config.count == "exact"

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Choose, and merge the others into what is chosen, in all images at once."""
        valid, half = inputs.valid, keep // 2
        group = windows_of(inputs, self.config)
        local = scan_windows(inputs.signal(self.config.early), group, valid, half, self.exact)
        rest = keep - (local.sum(1) if self.exact else half)
        kept = local | topk_mask(inputs.signal(self.config.late), valid & ~local, rest)
        index, there = mask_to_index(kept, inputs.most_asked if self.exact else None)
        unit = functional.normalize(inputs.features.float(), dim=-1)
        alike = gather_rows(unit, index) @ unit.transpose(1, 2)  # (B, K, N)
        nearest = alike.masked_fill(~there[..., None], -torch.inf).argmax(1)
        groups = torch.where(kept, kept.cumsum(1) - 1, nearest).masked_fill(~valid, -1)
        features = group_mean(inputs.features, groups, valid.float(), index.shape[1])
        return PruneOutput(index, there, features, groups=groups)


class Read(Pruner):
    """The second stage: what the last word attends to; `keep` is the mean over the layers that it brings about."""

    name = "vscan"
    stage = "layer"
    needs = ("last_attention",)
    config_class = VScanConfig
    config: VScanConfig

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured layer, or that at half the depth."""
        if self.config.layer is None and depth < 2:
            raise PruneZooError(f"vscan: a decoder of {depth} layer has no half: set layer")
        return (self.config.layer or depth // 2,)

    def schedule(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """As many as make the mean over the layers ``keep``, where ``available`` are read up to this one."""
        (layer,) = self.stages(depth)
        return [left_for_mean(keep, available, layer, depth)]

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: the attention weight from the last word to each image token."""
        return inputs.signal("last_attention")


@register_pruner("vscan")
class VScan(Pruner):
    """Windows and the whole picture in front of the language model, the last word half-way; `keep` is the mean."""

    stage = "layer"
    criteria = ("attention", "similarity")
    exact = False
    config_class = VScanConfig
    config: VScanConfig

    def __init__(self, config: VScanConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.scan, self.read = Scan(self.config), Read(self.config)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Those of both stages."""
        return (*self.scan.needs, *self.read.needs)

    def stages(self, depth: int) -> tuple[int, ...]:
        """That of the second one."""
        return self.read.stages(depth)

    def parts(self, keep: Keep) -> list[tuple[Pruner, Keep]]:
        """Both stages: the first with its share, the second with the mean, as a share of what the first one left."""
        self.check_keep(keep)
        assert not isinstance(keep, str)  # it sets no budgets
        first = self.config.first
        if isinstance(keep, Tensor):
            return [(self.scan, (keep * first).round().long()), (self.read, keep)]
        if isinstance(keep, int):
            return [(self.scan, round(keep * first)), (self.read, keep)]
        enter = min(1.0, keep * first)
        return [(self.scan, enter), (self.read, min(1.0, keep / enter))]

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Both stages on the same inputs, as if they stood at one place; in a host each acts at its own."""
        assert inputs.asked is not None  # `forward` has set it
        (_, enter), _ = self.parts(torch.tensor(inputs.asked))
        first = self.scan(inputs, enter)
        found = inputs.after(first)
        left = left_for_mean(torch.tensor(inputs.asked), torch.tensor(first.counts), 1, 2)
        second = self.read(found, left)
        index = gather_rows(first.index, second.index).masked_fill(~second.valid, 0)
        return PruneOutput(index, second.valid, gather_rows(found.features, second.index))


def left_for_mean(mean: Tensor, found: Tensor, layer: int, depth: int) -> Tensor:
    """Tokens ``(B,)`` that layers from ``layer`` on must read for a mean, where those in front read ``found (B,)``."""
    left = ((depth * mean - layer * found).double() / max(depth - layer, 1)).round().long()
    return left.clamp_min(1).minimum(found)


def windows_of(inputs: PruneInputs, config: VScanConfig) -> Tensor:
    """``(B, N)`` long: the window that each token is in, by a number that no other window of the image has."""
    tile, *place = inputs.cells.masked_fill(~inputs.valid[..., None], 0).unbind(-1)
    number, most = tile, inputs.valid.shape[1]
    for along in place:  # rows, columns
        extent = along.new_zeros(len(tile), inputs.tiles).scatter_reduce(1, tile, along + 1, "amax").gather(1, tile)
        if config.window:
            own = (along // config.window).minimum((extent // config.window - 1).clamp_min(0))
        else:
            own = along * config.windows // extent
        number = number * most + own
    return number


def scan_windows(scores: Tensor, group: Tensor, valid: Tensor, count: Tensor, exact: bool) -> Tensor:
    """Go down the scores, and take a token while its window has given less than its share.

    Args:
        scores: ``(B, N)``.
        group: ``(B, N)`` long, the window of each token.
        valid: ``(B, N)`` bool.
        count: ``(B,)`` long, tokens wanted.
        exact: The share is ceil(count / windows), and the walk ends with ``count``; else floor, and it goes on.

    Returns:
        ``(B, N)`` bool; fewer than ``count`` where windows have fewer tokens than their share.
    """
    rank = rank_in_groups(scores, group, valid)
    windows = ((rank == 0) & valid).sum(1).clamp_min(1)
    share = -(-count // windows) if exact else count // windows
    able = valid & (rank < share[:, None])
    return topk_mask(scores, able, count.minimum(able.sum(1))) if exact else able
