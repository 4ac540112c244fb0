"""A-CLIP: a scorer that says early in the vision tower what CLS will attend to in all its blocks; whole 2x2 cells stay.

Attentive Mask CLIP, Yang et al., ICCV 2023, https://arxiv.org/abs/2212.08653, code https://github.com/microsoft/A-CLIP.

There, in pre-training, a running mean of the encoder looks at the picture first; what its CLS attends to, mean over
all blocks and heads, is pooled to cells of 2x2 patches, and the best cells are what the encoder itself gets. So
attention is no more than a label that is smoother than the last block's. Here nothing is pre-trained and the tower is
frozen, so it is its own teacher, and the look ahead would cost more than it saves: a small scorer learns to guess that
mean from an early block, and the blocks behind that get the cells which it likes best.

| | authors' code | ours |
|---|---|---|
| labels | the running mean's attention, of CLS, in all | the frozen tower's own; without CLS what is received |
| who chooses | the labels | a scorer behind `block`, trained by KL, see `trainers.training.heads` |
| the scorer reads | – | a few numbers on each patch, see `_patch_facts.py`: so it goes with any width |
| cells | 2x2 patches, the mean of the map | the same, of the scores; `cell=1` for single patches |
| how many | int(cells * ratio) + 1 cells | exactly `keep` patches; the last cell may be in part |
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, Pruner
from ..core.errors import PruneZooError
from ..core.registry import register_pruner
from ..core.signals import TOWER_ATTENTION
from ._patch_facts import FactsHead, facts_needed

MOST_HIDDEN, MOST_SIDE = 4096, 64
MOST_ROWS = 1 << 20
"""Of a grid; so that a cell has one number."""


@dataclass(frozen=True)
class ACLIPConfig(PrunerConfig):
    """Settings of A-CLIP."""

    attention: str = "cls"  # the label, and what the scorer reads: "cls", or "received" for vision towers without CLS
    hidden: int = 32  # width of the scorer, from 1
    block: int | None = None  # behind which block the others go; None: 1/6 of the depth
    cell: int = 2  # patches along a cell, from 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check_choices("a_clip", attention=TOWER_ATTENTION)
        for name, most in (("hidden", MOST_HIDDEN), ("cell", MOST_SIDE)):
            if not 1 <= (value := getattr(self, name)) <= most:
                raise PruneZooError(f"{name}={value} of a_clip is out of range: 1 to {most}")


def same_cell(inputs: PruneInputs, side: int) -> Tensor:
    """``(B, N, N)`` bool: whether two patches are in one cell of ``side`` by ``side``; no column of padding."""
    tile, row, column = inputs.cells.unbind(-1)
    number = (tile * MOST_ROWS + row // side) * MOST_ROWS + column // side
    return (number[:, None] == number[..., None]) & inputs.valid[:, None]


def by_cells(scores: Tensor, inputs: PruneInputs, side: int) -> Tensor:
    """The mean of the scores in the cell that each patch is in.

    Args:
        scores: ``(B, N)``.
        inputs: The images.
        side: Patches along a cell.

    Returns:
        ``(B, N)``, the same number for all patches of a cell; arbitrary on padding.
    """
    weights = same_cell(inputs, side).to(scores.dtype)
    total = weights @ scores.masked_fill(~inputs.valid, 0)[..., None]
    return total[..., 0] / weights.sum(2).clamp_min(1)


@register_pruner("a_clip")
class ACLIP(Pruner):
    """A scorer behind an early block, pooled over cells."""

    stage = "vision"
    criteria = ("learned score",)
    after_block = True
    config_class = ACLIPConfig
    config: ACLIPConfig

    def __init__(self, config: ACLIPConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.head = FactsHead(self.config.attention, self.config.hidden)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """What the scorer reads."""
        return facts_needed(self.config.attention)

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured block, or the one at 1/6 of the depth."""
        return (max(round(depth / 6), 1) - 1 if self.config.block is None else self.config.block,)

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: the logit of the attention that is to come, mean over the cell."""
        return by_cells(self.head(inputs), inputs, self.config.cell)

    def learns_from(self, depth: int) -> tuple[str, ...]:
        """Signals that its lesson is of: the attention of all blocks."""
        return tuple(f"{TOWER_ATTENTION[self.config.attention]}@{block}" for block in range(depth))

    def lesson(self, inputs: PruneInputs) -> Tensor:
        """KL in nats of the mean attention of all blocks, as a distribution over patches, to that of the logits."""
        assert inputs.depth is not None
        labels = torch.stack([inputs.signal(name).float() for name in self.learns_from(inputs.depth)]).mean(0)
        labels = labels.masked_fill(~inputs.valid, 0)
        labels = labels / labels.sum(1, keepdim=True)
        ours = self.head(inputs).float().masked_fill(~inputs.valid, -torch.inf).log_softmax(1)
        terms = torch.special.xlogy(labels, labels) - labels * ours.masked_fill(~inputs.valid, 0)
        return terms.sum(1).mean()
