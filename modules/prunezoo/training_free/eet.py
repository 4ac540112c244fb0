"""EET: rate patches by what CLS attends to, each head weighing as much as it has to say of the patch.

EET, Jiang et al., 2025, https://arxiv.org/abs/2504.16691, code https://github.com/WhiteJiang/EET. Written from a
description of the code; made there for fine-grained image retrieval, with a tower that is tuned.

The content of head h at patch i is n_h,i, the norm of what the head gives the patch before heads are joined. Then

    score_i = sum over heads of A_h[cls, i] * n_h,i / (sum over heads of n_h,i + 1e-8),

and the best patches stay behind the blocks 3, 7 and 9 of 12, from 0: 98, 49 and 12 of 196.

| | authors' code | ours |
|---|---|---|
| blocks | 3, 7, 9 of 12 | as far into any tower; `blocks` |
| counts | 98, 49, 12 | of three blocks each does the same part of the whole, in factors; else the same share in each |
| order of what is kept | falling score | raster |
| no CLS | – | `attention="received"`: what a patch receives of each head, mean over the patches (not the paper's) |
| training | the tower is tuned, the unpruned one being its teacher, and parts are blanked | none: the tower is frozen |
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.budgets import upload
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, Pruner
from ..core.registry import register_pruner
from ..core.schedule import Schedule

NEEDS = {
    "cls": ("cls_head_attention", "vision_outputs"),
    "received": ("vision_head_attention", "vision_outputs"),
}
BLOCKS, COUNTS, TOKENS, DEPTH = (3, 7, 9), (98, 49, 12), 196, 12
EPSILON = 1e-8


@dataclass(frozen=True)
class EETConfig(PrunerConfig):
    """Settings of EET."""

    attention: str = "cls"  # "cls", or "received" for vision towers without CLS
    blocks: tuple[int, ...] | None = None  # behind which blocks patches go; None: 4/12, 8/12 and 10/12 of the depth

    def __post_init__(self) -> None:
        """Check the name."""
        self.check_choices("eet", attention=NEEDS)


@register_pruner("eet")
class EET(Pruner):
    """CLS's attention, weighted by the content of its heads, behind a few blocks."""

    stage = "vision"
    criteria = ("attention",)
    after_block = True
    config_class = EETConfig
    config: EETConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Attention of the block by head, and what the heads give."""
        return NEEDS[self.config.attention]

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured blocks, or those as far in as the paper's."""
        if self.config.blocks is not None:
            return self.config.blocks
        return tuple(sorted({max(round((block + 1) * depth / DEPTH), 1) - 1 for block in BLOCKS}))

    def schedule(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """Of three blocks each does the part that it does in the paper."""
        if len(self.stages(depth)) != len(COUNTS):
            return super().schedule(keep, available, depth)
        return Schedule("vision", TOKENS, COUNTS).at(range(len(COUNTS)), keep, available, len(COUNTS))

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` float32."""
        attention = inputs.signal(self.needs[0]).float()
        if self.config.attention == "received":
            rows = upload(inputs.counts, attention.device).clamp_min(1)
            attention = attention.masked_fill(~inputs.valid[:, :, None, None], 0).sum(1) / rows[:, None, None]
        content = torch.linalg.vector_norm(inputs.signal("vision_outputs").float(), dim=-1)  # (B, N, H)
        return (attention * content / (content.sum(2, keepdim=True) + EPSILON)).sum(2)
