"""OptiPrune: one base token in each 2 x 2 cell of the picture, and of the others those that are least like any base.

OptiPrune: Boosting Prompt-Image Consistency with Attention-Guided Noise and Dynamic Token Selection, Lu et al., 2025,
https://arxiv.org/abs/2507.00789.

Its pruning part, which it has for diffusion models. Reconstructed: its own code could not be had, and the rule is that
of SiTo, on which it builds, code https://github.com/EvelynZhang-epiclab/SiTo.

The base of a cell is the token whose cosines to all of the image add up to most. Of the other tokens those leave that
are most like a base. So every part of the picture is seen, and what leaves has a likeness among what stays: for losses
on hidden states, :func:`fill_back` puts a copy of the most similar token that stays into each slot that was left.

| | authors' code | ours |
|---|---|---|
| where | self-attention of a U-Net's first level, filled behind it | in front of the language model |
| noise on the sums | 0.1 N(0, 1) | none |
| fewer tokens than cells | not met | cells of 3 x 3, 4 x 4, …, until at most half of what stays are bases |
| cells | 2 x 2 | 2 x 2; `cell` |
| order | bases, others | raster |
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..core.budgets import upload
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.plan import gather_rows, mask_to_index
from ..core.registry import register_pruner
from ..core.select import rank_in_groups


@dataclass(frozen=True)
class OptiPruneConfig(PrunerConfig):
    """Config of `optiprune`."""

    cell: int = 2  # side of the cells that have a base each, in tokens, at least 1; larger where `keep` asks for fewer

    def __post_init__(self) -> None:
        """Check the range."""
        if self.cell < 1:
            raise PruneZooError(f"cell={self.cell} of optiprune is out of range: at least 1 token")


@register_pruner("optiprune")
class OptiPrune(Pruner):
    """A base in each cell, and what is least like the bases."""

    criteria = ("position", "diversity")
    config_class = OptiPruneConfig
    config: OptiPruneConfig

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Choose in all images at once; ``carry["source"]`` says which slot's token each one is most like."""
        valid = inputs.valid
        unit = functional.normalize(inputs.features.float(), dim=-1).masked_fill(~valid[..., None], 0.0)
        alike = unit @ unit.mT
        sums = alike.sum(2)
        first = rank_in_groups(sums, self.cells(inputs), valid) == 0
        bases = topk_mask(sums, first & valid, keep.minimum((first & valid).sum(1)))
        to_base = alike.masked_fill(~bases[:, None], -torch.inf).amax(2)
        kept = bases | topk_mask(-to_base, valid & ~bases, keep - bases.sum(1))
        index, there = mask_to_index(kept, inputs.most_asked)
        slots = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
        nearest = alike.masked_fill(~kept[:, None], -torch.inf).argmax(2)
        return PruneOutput(index, there, carry={"source": torch.where(kept, slots, nearest)})

    def cells(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` long: the cell that each token is in; 0 on padding.

        Of the configured side; where there are more of these than tokens are asked for, of the first longer one of
        which there are at most half as many. A base is the most common token of its cell, and of a picture that kept
        nothing else only background would be left.
        """
        assert inputs.asked is not None  # `forward` has set it
        grids = zip(inputs.host_grids, inputs.asked, strict=True)
        side = upload([self.side(cells, asked) for (_, cells), asked in grids], inputs.valid.device)[:, None]
        tile, row, column = inputs.cells.clamp_min(0).unbind(-1)
        row, column, most = row // side, column // side, inputs.valid.shape[1]
        return ((tile * most + row) * most + column).masked_fill(~inputs.valid, 0)

    def side(self, cells: np.ndarray, asked: int) -> int:
        """Of the cells of an image, in tokens, where ``asked`` of its tokens ``cells (n, 3)`` are to stay."""
        longest = int(cells[:, 1:].max(initial=0)) + 1
        for side in range(self.config.cell, longest):
            most = asked if side == self.config.cell else asked // 2  # as at the authors' ratio, of one half
            if len(np.unique(cells // [1, side, side], axis=0)) <= most:
                return side
        return max(longest, self.config.cell)


def fill_back(kept: Tensor, output: PruneOutput) -> Tensor:
    """Copies of what stayed in the slots of what left.

    Args:
        kept: ``(B, K, ...)``, of the tokens at ``output.index``, such as hidden states.
        output: Of :class:`OptiPrune`.

    Returns:
        ``(B, N, ...)``; arbitrary on padding.
    """
    source = output.carry["source"]
    column = torch.searchsorted(output.index.masked_fill(~output.valid, source.shape[1]), source)
    return gather_rows(kept, column)
