"""Zero-TPrune: rate patches by PageRank on the attention graph of a vision block, then drop those like others.

Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained Transformers, Wang et al.,
CVPR 2024, https://arxiv.org/abs/2305.17328. No code of the authors was found. Reconstructed from second-hand notes.

In each of its blocks, in this order:

* I': one step of the ranking below gives a first order.
* S: the less important half is set A, the other B. Each token of A is matched to the most similar one of B, by the
  cosine of their keys; those most similar to their match are dropped, not merged. So a large even region cannot vote
  for itself in what follows.
* I: weighted PageRank of each head, s <- A^T s: a token is important if important ones attend to it. It is repeated
  often in the first quarter of the blocks, less in the middle, once in the last. The heads are joined by the root of
  the mean of squares, and the least important tokens go.

| | notes on the paper | ours |
|---|---|---|
| where, and how many | not found beyond examples | at 1/4, 1/2 and 3/4 of the depth, each the same share; `blocks` |
| how many of those by S | not found | `similar` of them, at most all of A |
| repeats | 30 to 50, 5 to 10, 1 | `repeats`: 30, 5, 1 |
| CLS | starts sqrt(N) times as high; "-uni": equal | `attention="cls"`; "received": it is left out, for any tower |
| behind S | – | the rows of what is left are made to sum to 1 again |
| heads whose variance is outside of 0.01 to 0.7 go | yes, of what is unclear | no |
| keys | – | of all heads, one behind the other |
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..core.budgets import upload
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.plan import mask_to_index
from ..core.registry import register_pruner
from ._tower_graph import SIGNALS, head_maps

MOST_REPEATS = 1000


@dataclass(frozen=True)
class ZeroTPruneConfig(PrunerConfig):
    """Settings of Zero-TPrune."""

    attention: str = "received"  # the graph: "cls" with CLS in it, or "received", of patches alone, for any tower
    blocks: tuple[int, ...] | None = None  # inside which blocks tokens go; None: 1/4, 1/2 and 3/4 of the depth
    similar: float = 0.5  # share of the tokens that go by similarity, in [0, 1]
    repeats: tuple[int, ...] = (30, 5, 1)  # of the ranking: in the first quarter of the blocks, the middle, the last

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check_choices("zero_tprune", attention=SIGNALS)
        if not 0 <= self.similar <= 1:
            raise PruneZooError(f"similar={self.similar} of zero_tprune is out of range: it is a share in [0, 1]")
        if len(self.repeats) != 3 or not all(1 <= times <= MOST_REPEATS for times in self.repeats):
            raise PruneZooError(f"repeats={self.repeats} of zero_tprune: give three, from 1 to {MOST_REPEATS}")


@register_pruner("zero_tprune")
class ZeroTPrune(Pruner):
    """A vote, similarity, and PageRank, in a few blocks."""

    stage = "vision"
    criteria = ("attention", "similarity")
    config_class = ZeroTPruneConfig
    config: ZeroTPruneConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Maps of the block, and its keys."""
        return (*SIGNALS[self.config.attention], "vision_keys")

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured blocks, or those at the quarters of the depth."""
        return self.config.blocks or tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)}))

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """I', S, I."""
        maps = head_maps(inputs, SIGNALS[self.config.attention])
        gone = self.by_similarity(inputs, self.importance(maps, inputs.valid, 1))
        left = inputs.valid & ~gone
        scores = self.importance(maps, left, self.times(inputs)).masked_fill(~left, -torch.inf)
        index, valid = mask_to_index(topk_mask(scores, left, keep), inputs.most_asked)
        return PruneOutput(index, valid, scores=scores)

    def times(self, inputs: PruneInputs) -> int:
        """How often the ranking is repeated in this block."""
        block, depth = inputs.layer or 0, inputs.depth or 1
        first, middle, last = self.config.repeats
        return first if 4 * block < depth else last if 4 * block >= 3 * depth else middle

    def importance(self, maps: Tensor, alive: Tensor, times: int) -> Tensor:
        """PageRank of each head, and the root of the mean of their squares.

        Args:
            maps: ``(B, H, P + N, P + N)`` of :func:`head_maps`.
            alive: ``(B, N)`` bool, the patches of the graph.
            times: How often it is repeated.

        Returns:
            ``(B, N)``, of patches; all tokens together start with 1.
        """
        prefix = maps.shape[2] - alive.shape[1]
        nodes = functional.pad(alive, (prefix, 0), value=True)
        maps = maps.masked_fill(~(nodes[:, None, :, None] & nodes[:, None, None]), 0)
        maps = maps / maps.sum(-1, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
        start = nodes.to(maps.dtype)
        if prefix:
            start[:, 0] = alive.sum(1).to(maps.dtype).sqrt()
        rank = (start / start.sum(1, keepdim=True))[:, None, None]  # (B, 1, 1, P + N)
        for _ in range(times):
            rank = rank @ maps
        return rank[:, :, 0, prefix:].square().mean(1).sqrt()

    def by_similarity(self, inputs: PruneInputs, order: Tensor) -> Tensor:
        """Which tokens of the less important half go for being like one of the other: ``(B, N)`` bool."""
        assert inputs.asked is not None  # `forward` has set it
        counts = [(n, round(self.config.similar * (n - k))) for n, k in zip(inputs.counts, inputs.asked, strict=True)]
        halves = upload([n - n // 2 for n, _ in counts], order.device)
        going = upload([min(out, n // 2) for n, out in counts], order.device)
        better = topk_mask(order, inputs.valid, halves)
        unit = functional.normalize(inputs.signal("vision_keys").float().flatten(2), dim=-1)
        likeness = (unit @ unit.mT).masked_fill(~better[:, None], -torch.inf).amax(2)
        return topk_mask(likeness, inputs.valid & ~better, going)
