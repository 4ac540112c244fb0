"""DivPrune: keep the subset whose members are as unlike each other as can be (max-min diversity).

DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models, Alvar et al., CVPR 2025,
https://arxiv.org/abs/2503.02175, code https://github.com/vbdi/divprune. Written from the paper.

Distance is 1 - cosine of the projected tokens. The first token is the one whose nearest other token is farthest; then,
K - 1 times, the token whose nearest chosen token is farthest. Here batched and exact, chosen tokens masked out (in
half precision duplicates could be chosen twice), original positions kept by default.

`together` is ours: images of one prompt, which often show the same things, are chosen from at once. Each keeps its own
count, but a token is also as near as the nearest one that is chosen in another image of the prompt.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.plan import mask_to_index, picks_mask
from ..core.registry import register_pruner


@dataclass(frozen=True)
class DivPruneConfig(PrunerConfig):
    """Config of `divprune`."""

    together: bool = False  # images of one prompt are to differ from one another, too


@register_pruner("divprune")
class DivPrune(Pruner):
    """Greedy farthest-first choice on cosine distance."""

    criteria = ("diversity",)
    config_class = DivPruneConfig
    config: DivPruneConfig

    @property
    def together(self) -> bool:  # type: ignore[override]  # a class attribute where it is not configured
        """As configured."""
        return self.config.together

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Choose one token of each image per step, in all images at once."""
        valid = inputs.valid
        unit = functional.normalize(inputs.features.float(), dim=-1)
        unit = unit.masked_fill(~valid[..., None], 0.0)  # padding may hold anything, NaN too
        distance = (unit @ unit.mT).neg_().add_(1)  # (B, N, N)
        rows = torch.arange(len(valid), device=valid.device)
        itself = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
        nearest = distance.masked_fill(itself | ~valid[:, None], torch.inf).amin(2).masked_fill(~valid, -torch.inf)
        picks = valid.new_empty(len(valid), inputs.most_asked, dtype=torch.long)
        for step in range(inputs.most_asked):
            best = nearest.argmax(1)
            picks[:, step] = best
            to_best = distance[rows, best]  # (B, N)
            if self.together and inputs.sample is not None:
                to_best = to_best.minimum(self.to_others(unit, unit[rows, best], inputs.sample, step < keep))
            nearest = nearest.minimum(to_best) if step else to_best.masked_fill(~valid, -torch.inf)
            nearest.scatter_(1, best[:, None], -torch.inf)
        index, kept = mask_to_index(picks_mask(picks, keep, valid.shape[1]), inputs.most_asked)
        return PruneOutput(index=index, valid=kept)

    def to_others(self, unit: Tensor, picked: Tensor, sample: Tensor, picks: Tensor) -> Tensor:
        """``(B, N)``: how far each token is from the nearest that other images of its prompt pick in this step.

        Args:
            unit: ``(B, N, D)`` tokens of length 1.
            picked: ``(B, D)`` what each image picks.
            sample: ``(B,)`` the prompt of each image.
            picks: ``(B,)`` bool, False for images that have all theirs.
        """
        others = (sample[:, None] == sample) & ~torch.eye(len(sample), dtype=torch.bool, device=sample.device) & picks
        distance = 1 - torch.einsum("bnd,cd->bnc", unit, picked)
        return distance.masked_fill(~others[:, None], torch.inf).amin(2)
