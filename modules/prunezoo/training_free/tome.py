"""ToMe: merge the most similar tokens inside every block of the vision tower.

Token Merging: Your ViT But Faster, Bolya et al., ICLR 2023, https://arxiv.org/abs/2210.09461,
code https://github.com/facebookresearch/ToMe. Written from the paper.

Between attention and MLP of each block the tokens are dealt out in turns to two sets; each token of the first is linked
to the most similar one of the second, by the cosine of their keys (mean over heads); the strongest r links are merged
into means weighted by size, and from the next block on a token of size s counts s times in the attention. CLS takes no
part. What is different from the paper, where r is a setting and tokens end up in scrambled order:

* r follows from the number of tokens to keep: as even over the blocks as halving allows, and exact. Where even halving
  in every block would leave too many, each block leaves the same share and repeats the matching on what it has merged.
* Merged tokens are put back into raster order, each at the patch nearest to the middle of what it stands for, before
  the next block and before the language model.

In towers of few blocks r is far from the small shares of the paper, and objects are lost among their neighbours: on the
embedded model, whose tower runs four blocks, ToMe is below random at 1/9 of the tokens. `metric="states"` (the paper's
ablation has it) and a small `most` (reconstructed: as if there were more blocks) mend that.
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
from ..core.merge import group_mean, matching_rounds, merge_tokens
from ..core.registry import register_pruner

METRICS = ("keys", "states")


@dataclass(frozen=True)
class ToMeConfig(PrunerConfig):
    """Settings of ToMe."""

    metric: str = "keys"  # what is compared: "keys" of the block, mean over heads, or the "states" that are merged
    most: float = (
        0.5  # share of the tokens that one matching may merge, in (0, 0.5]; the matching is repeated if need be
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check_choices("tome", metric=METRICS)
        if not 0 < self.most <= 0.5:
            raise PruneZooError(f"most={self.most} of tome is out of range: it is a share in (0, 0.5]")


@register_pruner("tome")
class ToMe(Pruner):
    """Bipartite matching, in all blocks up to the projected one."""

    stage = "vision"
    criteria = ("similarity",)
    merges = True
    config_class = ToMeConfig
    config: ToMeConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Keys, if they are what is compared."""
        return ("vision_keys",) if self.config.metric == "keys" else ()

    def stages(self, depth: int) -> tuple[int, ...]:
        """All blocks."""
        return tuple(range(depth))

    def schedule(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """Equal numbers of tokens merged in each block, none of which may do more than halve them if that can be had.

        Going back from the last block, the tokens left can double at most, or grow by the share that is needed where
        doubling does not reach ``available``.
        """
        growth = (available / keep.clamp_min(1)).double().pow(1 / depth).clamp_min(2)
        steps = []
        for block in range(1, depth):
            even = available - (available - keep).double() * (block / depth)
            steps.append(torch.minimum(even, keep * growth ** (depth - block)).long())
        return [*steps, keep]

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Match and merge, in all images at once, until ``keep`` tokens are left."""
        sizes = inputs.valid.float() if inputs.sizes is None else inputs.sizes
        by_keys = self.config.metric == "keys"
        vectors = inputs.signal("vision_keys").float().mean(2) if by_keys else inputs.features.float()  # (B, N, d)
        width = vectors.shape[1]
        alive, leader = inputs.valid, torch.arange(width, device=vectors.device).expand_as(inputs.valid)
        means = vectors
        assert inputs.asked is not None  # `forward` has set it
        for step in matching_rounds(inputs.counts, inputs.asked, self.config.most):
            first = alive & (alive.cumsum(1) % 2 == 0)
            second = alive & ~first
            unit = functional.normalize(means, dim=-1)
            links = (unit @ unit.transpose(1, 2)).masked_fill(~second[:, None], -torch.inf)  # (B, N, N)
            strength, partner = links.max(2)
            merged = topk_mask(strength, first, upload(step, alive.device))
            # A merged token led itself until now, so its whole group follows it.
            leader = torch.where(merged.gather(1, leader), partner.gather(1, leader), leader)
            alive = alive & ~merged
            means = group_mean(vectors, leader.masked_fill(~inputs.valid, -1), sizes, width)
        return merge_tokens(inputs, leader)
