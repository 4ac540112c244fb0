"""VisionZip: the tokens that CLS attends to, and a few more into which the rest is merged.

VisionZip: Longer is Better but Not Necessary in Vision Language Models, Yang et al., CVPR 2025,
https://arxiv.org/abs/2412.04467, code https://github.com/dvlab-research/VisionZip. Written from the paper and from a
reading of what the code computes.

*Dominant* tokens are the most attended ones. Of the rest, every so-manieth is a *contextual* one, and each other token
joins the contextual token whose key is most similar (cosine of the mean over heads). As in the official code, a
contextual token is its target **plus** the mean of those that joined it, not the mean over all. Unlike there

* tokens are merged after the projector, which is where the prompt stage stands, not before it;
* CLS itself is not handed to the language model; its place in the budget goes to one more dominant token. The split of
  the paper, 54 dominant (CLS among them) and 10 contextual of 64, is kept for every budget;
* tokens stay in raster order (there the contextual ones come last), each contextual one at its target's slot.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.merge import group_mean
from ..core.plan import gather_rows, mask_to_index
from ..core.registry import register_pruner
from ..core.signals import TOWER_ATTENTION

MERGES = ("sum", "mean")


@dataclass(frozen=True)
class VisionZipConfig(PrunerConfig):
    """Settings of VisionZip."""

    contextual: float = 10 / 64  # share of the tokens kept that are merged ones, in [0, 1)
    attention: str = "cls"  # "cls", or "received" for vision towers without CLS
    merge: str = "sum"  # "sum": target + mean of those that join it; "mean": mean over all of them

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.contextual < 1:
            raise PruneZooError(f"contextual={self.contextual} of visionzip is out of range: it is a share in [0, 1)")
        self.check_choices("visionzip", attention=TOWER_ATTENTION, merge=MERGES)


@register_pruner("visionzip")
class VisionZip(Pruner):
    """Dominant tokens by attention, contextual ones by merging on keys."""

    criteria = ("attention", "similarity")
    config_class = VisionZipConfig
    config: VisionZipConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Attention and keys of the block whose output is projected."""
        return (TOWER_ATTENTION[self.config.attention], "vision_keys")

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Choose and merge, in all images at once."""
        attention = inputs.signal(TOWER_ATTENTION[self.config.attention])
        contextual = (keep.double() * self.config.contextual).round().long()
        dominant = topk_mask(attention, inputs.valid, keep - contextual)
        rest = inputs.valid & ~dominant
        place = rest.cumsum(1) - 1
        stride = (rest.sum(1) // contextual.clamp_min(1)).clamp_min(1)[:, None]
        target = rest & (place % stride == 0) & (place // stride < contextual[:, None])
        joins = rest & ~target & (contextual > 0)[:, None]

        unit = functional.normalize(inputs.signal("vision_keys").float().mean(2), dim=-1)
        nearest = (unit @ unit.transpose(1, 2)).masked_fill(~target[:, None], -torch.inf).argmax(2)
        kept = dominant | target
        index, valid = mask_to_index(kept, inputs.most_asked)
        column = kept.cumsum(1) - 1  # where a token that stays is found among those kept
        groups = torch.where(joins, column.gather(1, nearest), column.masked_fill(~kept, -1))

        ones = inputs.valid.float()
        if self.config.merge == "mean":
            features = group_mean(inputs.features, groups, ones, index.shape[1])
        else:
            joined = group_mean(inputs.features, groups.masked_fill(~joins, -1), ones, index.shape[1])
            features = gather_rows(inputs.features, index) + joined
        return PruneOutput(index, valid, features, groups=groups)
