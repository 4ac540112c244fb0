"""DiffRate: learn how many tokens each block of the vision tower drops and how many it merges, by gradient.

DiffRate: Differentiable Compression Rate for Efficient Vision Transformers, Chen et al., ICCV 2023,
https://arxiv.org/abs/2305.17997, code https://github.com/OpenGVLab/DiffRate. Written from a description of the code.

Each block but the first has two rates, one of dropping, one of merging: logits over the counts 196, 192, ... that it
may leave. With p their softmax the count is ceil(sum p k), whose gradient is that of the sum; the token of rank r is
left with probability sum of p over k >= r, and whether r is within the count has the gradient of that. Only these
logits are trained. In a block, between attention and MLP, tokens are sorted by what CLS attends to; the tail is
dropped; then the lowest that are left go each to the most similar of those above, by the cosine of the states
themselves, which become the plain mean of what comes together. A merged token's size grows by its sources', each times
its similarity, and its logarithm is added in the attention of later blocks.

| | authors' code | ours |
|---|---|---|
| trained with | labels, 5 (GFLOPs - target)^2 | distillation; the language model's operations count too, as shares |
| the last block | leaves 3, since CLS alone is read | what the language model reads, whose cost counts |
| `keep` | the trained counts | any: the trained counts in shape, see :class:`schedule.Schedule` |
| other towers | – | a block of a tower of another depth has the rate of the one as far in |
| order | falling attention | raster; a merged token sits nearest to the middle of what it stands for |
| a tower that joins patches behind it | – | what leaves is dropped, by whole cells; not in training |
| no CLS | – | `attention="received"` |

What it learns serves other methods: `python -m trainers.schedule read FOLDER --out FILE`, then `tome?schedule=FILE`.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.budgets import upload
from ..core.checks import require_no_nan
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import straight_through, topk_mask
from ..core.plan import group_sum, mask_to_index
from ..core.registry import register_pruner
from ..core.schedule import Schedule
from ..core.signals import TOWER_ATTENTION

MOST_BLOCKS, MOST_TOKENS = 256, 1 << 16
ROUNDING = 1e-4
"""By how much a sum of shares may lie above a whole number and still be that."""


@dataclass(frozen=True)
class DiffRateConfig(PrunerConfig):
    """Settings of DiffRate."""

    blocks: int = 23  # vision blocks of the tower that run, from 1
    tokens: int = 576  # patches of a picture, from 1
    granularity: int = 4  # step between the counts that a block may leave, from 1
    attention: str = "cls"  # what tokens are sorted by: "cls", or "received", which towers without CLS need

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check_choices("diffrate", attention=TOWER_ATTENTION)
        most = {"blocks": MOST_BLOCKS, "tokens": MOST_TOKENS, "granularity": self.tokens}
        for name, end in most.items():
            if not 1 <= (value := getattr(self, name)) <= end:
                raise PruneZooError(f"{name}={value} of diffrate is out of range: 1 to {end}")


def kept_number(logits: Tensor, candidates: Tensor) -> Tensor:
    """The count, rounded up, of logits over candidates; its gradient is that of the sum.

    Args:
        logits: ``(..., C)``.
        candidates: ``(C,)``.

    Returns:
        ``(...)`` float.
    """
    mean = (logits.softmax(-1) * candidates).sum(-1)
    return straight_through((mean.detach() - ROUNDING).ceil(), mean)


def rank_probability(logits: Tensor, candidates: Tensor, ranks: Tensor) -> Tensor:
    """Probability that a rank is within the count.

    Args:
        logits: ``(C,)``.
        candidates: ``(C,)``, falling.
        ranks: Long, of any shape, from 1.

    Returns:
        In the shape of ``ranks``; 0 beyond the largest candidate.
    """
    within = candidates >= ranks[..., None]
    return (within * logits.softmax(-1)).sum(-1)


@register_pruner("diffrate")
class DiffRate(Pruner):
    """Counts of each block, for dropping and for merging."""

    stage = "vision"
    criteria = ("attention", "similarity")
    config_class = DiffRateConfig
    config: DiffRateConfig

    def __init__(self, config: DiffRateConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.first = min(1, self.config.blocks - 1)  # the block that has the first rates
        shape = self.config.blocks - self.first, len(range(self.config.tokens, 0, -self.config.granularity))
        self.drop, self.merge = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
        self._read: tuple[tuple[torch.dtype, int, int], list[tuple[int, int, int]]] | None = None  # see `trained`

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Attention of the block."""
        return (TOWER_ATTENTION[self.config.attention],)

    @property
    def candidates(self) -> Tensor:
        """``(C,)`` float: the counts that a block may leave, falling."""
        return torch.arange(self.config.tokens, 0, -self.config.granularity, device=self.drop.device).float()

    @classmethod
    def tiny_config(cls, feature_dim: int, text_dim: int) -> dict[str, Any]:
        """See the base class."""
        return {"blocks": 3, "tokens": 36}

    def numbers(self) -> tuple[Tensor, Tensor]:
        """``(blocks,)`` float each: what dropping and what merging would leave, with gradients; of block 0 all."""
        whole = self.candidates[:1].expand(self.first)
        left = (kept_number(logits.float(), self.candidates) for logits in (self.drop, self.merge))
        dropping, merging = (torch.cat([whole, one]) for one in left)
        return dropping, merging

    def trained(self) -> list[tuple[int, int, int]]:
        """Of each block: the tokens that it finds, those left when some are dropped, and when some are merged."""
        now = (self.drop.dtype, self.drop._version, self.merge._version)
        if self._read is None or self._read[0] != now:
            for rates in (self.drop, self.merge):
                require_no_nan(rates.detach(), self.name, "has rates that are")
            dropping, merging = torch.stack(self.numbers()).detach().int().tolist()
            behind = [self.config.tokens, *accumulate(map(min, dropping, merging), min)]
            counts = zip(behind, dropping, behind[1:], strict=False)
            self._read = now, [(n, min(n, drop), left) for n, drop, left in counts]
        return self._read[1]

    def adapt(self, vlm: nn.Module) -> AbstractContextManager[None]:
        """See the base class: the counts are read here, so that no prefill waits for the device."""
        self.trained()
        return super().adapt(vlm)

    def as_schedule(self) -> Schedule:
        """The trained counts, for any method of the vision stage."""
        return Schedule("vision", self.config.tokens, tuple(left for _, _, left in self.trained()), "diffrate")

    def stages(self, depth: int) -> tuple[int, ...]:
        """All blocks."""
        return tuple(range(depth))

    def place(self, block: int, depth: int) -> int:
        """The block of the tower that it was trained on which is as far in as ``block`` of one of that depth."""
        return -(-(block + 1) * self.config.blocks // depth) - 1

    def schedule(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """The trained counts, in shape."""
        trained = self.as_schedule().counts
        counts = tuple(trained[self.place(block, depth)] for block in range(depth))
        if depth == 1 or counts[-1] == self.config.tokens:
            return super().schedule(keep, available, depth)
        return Schedule("vision", self.config.tokens, counts).at(range(depth), keep, available, depth)

    def dropped_share(self, block: int, depth: int) -> float:
        """How much of what leaves in a block is dropped rather than merged, in [0, 1]."""
        found, dropping, left = self.trained()[self.place(block, depth)]
        return (found - dropping) / (found - left) if found > left else 0.0

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Drop the tail, merge the next lowest."""
        assert inputs.asked is not None  # `forward` has set it
        block, depth = inputs.layer or 0, inputs.depth or self.config.blocks
        scores = inputs.signal(self.needs[0]).float().masked_fill(~inputs.valid, -torch.inf)
        kept = topk_mask(scores, inputs.valid, keep)
        index, valid = mask_to_index(kept, inputs.most_asked)
        if inputs.drop_only:
            return PruneOutput(index, valid, scores=scores)
        share = self.dropped_share(min(block, depth - 1), depth)
        staying = [n - min(round(share * (n - k)), n - k) for n, k in zip(inputs.counts, inputs.asked, strict=True)]
        alive = topk_mask(scores, inputs.valid, upload(staying, keep.device))
        sizes = inputs.valid.float() if inputs.sizes is None else inputs.sizes.float()
        groups, features, sizes = merged(inputs.features, kept, alive & ~kept, sizes, index.shape[1])
        gates = None
        if self.training:
            soft = self.soft(scores, self.place(min(block, depth - 1), depth))
            gates = straight_through(kept, soft * inputs.valid)
        return PruneOutput(index, valid, features, scores=scores, gates=gates, groups=groups, sizes=sizes)

    def soft(self, scores: Tensor, block: int) -> Tensor:
        """``(B, N)``: the probability that a block leaves a token, by its rank among ``scores``."""
        if block < self.first:
            return torch.ones_like(scores)
        rank = ranks_of(scores)
        rows = (self.drop[block - self.first], self.merge[block - self.first])
        one, two = (rank_probability(row.float(), self.candidates, rank) for row in rows)
        return one * two

    def relax(self, inputs: PruneInputs, gates: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A block in training, in which every token keeps its row.

        Args:
            inputs: What is found in the block, ``inputs.layer``: states, and what CLS attends to.
            gates: ``(B, N)`` of value 0 or 1: which tokens the blocks before have left.
            sizes: ``(B, N)``.

        Returns:
            The same three behind the block; gates have the gradients of the rates.
        """
        block, features, scores = inputs.layer or 0, inputs.features, inputs.signal(self.needs[0])
        if block < self.first:
            return features, gates, sizes
        alive = gates.detach() > 0.5
        rank = ranks_of(scores.detach().masked_fill(~alive, -torch.inf))
        found = alive.sum(1, keepdim=True)
        dropping, merging = (numbers[block].detach() for numbers in self.numbers())
        left = alive & (rank <= dropping)
        kept = left & (rank <= merging)
        for logits, count, here in ((self.drop, dropping, found), (self.merge, merging, left.sum(1, keepdim=True))):
            soft = rank_probability(logits[block - self.first].float(), self.candidates, rank)
            # Only what goes here is decided here; what has gone before stays as it is.
            gates = gates * torch.where(rank <= here, straight_through(rank <= count, soft), torch.ones_like(soft))
        width = gates.shape[1]
        index, valid = mask_to_index(kept, width)
        _, means, grown = merged(features, kept, left & ~kept, sizes, width)
        where = torch.where(valid, index, width)  # filler goes nowhere
        rows = torch.cat([features, features[:, :1]], 1).scatter(1, where[..., None].expand_as(means), means)
        sizes = torch.cat([sizes, sizes[:, :1]], 1).scatter(1, where, grown)
        return rows[:, :-1], gates, sizes[:, :-1].clamp_min(1)


def ranks_of(scores: Tensor) -> Tensor:
    """``(B, N)`` long: 1 for the highest of each row, and so on; of equals the first is higher."""
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    return torch.argsort(order, dim=1) + 1


def merged(features: Tensor, kept: Tensor, sources: Tensor, sizes: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each source goes to the most similar kept token, by cosine.

    Args:
        features: ``(B, N, D)``.
        kept: ``(B, N)`` bool, at least one in a row.
        sources: ``(B, N)`` bool, none of them kept.
        sizes: ``(B, N)``.
        count: K, at least as many as are kept.

    Returns:
        Groups ``(B, N)``, plain means ``(B, K, D)`` and sizes ``(B, K)``, a column for each kept token in their order.
    """
    unit = functional.normalize(features.detach().float(), dim=-1)
    strength, partner = (unit @ unit.mT).masked_fill(~kept[:, None], -torch.inf).max(2)
    column = kept.cumsum(1) - 1
    groups = torch.where(kept, column, torch.where(sources, column.gather(1, partner), -1))
    number = group_sum((groups >= 0).float(), groups, count).clamp_min(1)
    means = group_sum(features.float(), groups, count) / number[..., None]
    grown = group_sum(torch.where(sources, sizes * strength, sizes), groups, count)
    return groups, means.to(features.dtype), grown
