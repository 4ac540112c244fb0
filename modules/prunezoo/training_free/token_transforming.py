"""Token Transforming: every token that is left is a mixture of all that were there, by a dense map.

Token Transforming: A Unified and Training-Free Token Compression Framework for Vision Transformer Acceleration,
Zeng et al., 2025, https://arxiv.org/abs/2506.05709, code https://github.com/AuroraZengfh/TokenTransforming (which holds
no code). Known is the frame: x' = W x with W of as many rows as tokens are left. Rows of a single 1 are pruning, rows
that share no column are merging, and theirs is dense, many to many, and needs no training. How W is made is not public.
So this is inspired by it, and the map is ours:

* the tokens that receive most attention are anchors; each stands for one row of W, in its own place;
* W = softmax over all tokens of (cosine(key of the anchor, key) / tau + log(size * attention)), where an anchor has at
  least `own` of its row: what is less is made up, and its other shares shrink alike;
* shares of a token in the anchors, its column of W made to sum to 1, say how far each stands for it: sizes go over by
  them, and a token of size s counts s times in the attention of the blocks behind (proportional attention, as ToMe);
* the same shares make each token again from what is left, which `token_transforming_inverse` does behind the tower.

With tau near 0, or `own` near 1, it is pruning. On the embedded model what mixes much loses much: at half of the tokens
retention is 76 % with `own=0.9`, the default, and 61 % with 0.5 (140 questions of scenes, validation split).

Where it acts is not known either: here inside the blocks at 1/4, 1/2 and 3/4 of the depth, each of which leaves the
same share.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.plan import gather_rows, mask_to_index
from ..core.registry import register_pruner
from ..core.signals import TOWER_ATTENTION


@dataclass(frozen=True)
class TokenTransformingConfig(PrunerConfig):
    """Settings of Token Transforming."""

    attention: str = "received"  # what makes an anchor: "received" attention, or "cls", what CLS attends to
    tau: float = 0.1  # temperature of the cosines, above 0
    own: float = 0.9  # what an anchor has of its own row at least, in [0, 1)
    blocks: tuple[int, ...] | None = None  # inside which blocks it acts; None: 1/4, 1/2 and 3/4 of the depth

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check_choices("token_transforming", attention=TOWER_ATTENTION)
        if not self.tau > 0:
            raise PruneZooError(f"tau={self.tau} of token_transforming is out of range: it is above 0")
        if not 0 <= self.own < 1:
            raise PruneZooError(f"own={self.own} of token_transforming is out of range: it is a share in [0, 1)")


@register_pruner("token_transforming")
class TokenTransforming(Pruner):
    """Anchors by attention, and a dense map of all tokens onto them."""

    stage = "vision"
    criteria = ("attention", "similarity")
    merges = True
    config_class = TokenTransformingConfig
    config: TokenTransformingConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Attention and keys of the block."""
        return (TOWER_ATTENTION[self.config.attention], "vision_keys")

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured blocks, or those at the quarters of the depth."""
        return self.config.blocks or tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)}))

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Choose the anchors, mix all tokens into them."""
        scores = inputs.signal(self.needs[0]).float().masked_fill(~inputs.valid, 0)
        index, valid = mask_to_index(topk_mask(scores, inputs.valid, keep), inputs.most_asked)
        sizes = inputs.valid.float() if inputs.sizes is None else inputs.sizes.float()
        logs = self.log_map(inputs, index, scores * sizes)
        # An image that keeps everything keeps it as it is.
        whole = (keep >= inputs.valid.sum(1))[:, None, None]
        own = index[..., None] == torch.arange(scores.shape[1], device=index.device)
        logs = torch.where(whole, torch.zeros_like(logs).masked_fill(~own, -torch.inf), logs)
        logs = logs.masked_fill(~valid[..., None], -torch.inf)
        features = (logs.exp() @ inputs.features.float()).to(inputs.features.dtype)
        shares = logs.softmax(1).masked_fill(~inputs.valid[:, None], 0)  # (B, K, N), columns sum to 1
        made = (shares @ sizes.masked_fill(~inputs.valid, 0)[..., None])[..., 0]
        back = shares.mT if self.restore else None
        return PruneOutput(index, valid, features, scores=scores, sizes=made, back=back)

    def log_map(self, inputs: PruneInputs, index: Tensor, weights: Tensor) -> Tensor:
        """The logarithm of W.

        Args:
            inputs: The images, with keys.
            index: ``(B, K)`` slots of the anchors.
            weights: ``(B, N)`` size times attention.

        Returns:
            ``(B, K, N)`` float32; -inf on padding.
        """
        unit = functional.normalize(inputs.signal("vision_keys").float().flatten(2), dim=-1)
        tiny = torch.finfo(torch.float32).tiny
        logits = gather_rows(unit, index) @ unit.mT / self.config.tau + weights.clamp_min(tiny).log()[:, None]
        logs = logits.masked_fill(~inputs.valid[:, None], -torch.inf).log_softmax(2)
        at = index[..., None]
        own = logs.gather(2, at).exp()
        least = own.clamp_min(self.config.own)
        shrunk = logs + ((1 - least) / (1 - own).clamp_min(tiny)).clamp_min(tiny).log()
        return torch.where(own < self.config.own, shrunk.scatter(2, at, least.clamp_min(tiny).log()), logs)
