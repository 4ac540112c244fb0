"""EVS: of a clip, keep what is not as it was one frame before.

Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference, Bagrov et al., 2025,
https://arxiv.org/abs/2510.14624.

The first frame stays whole; a later token is rated by 1 less its cosine to the same cell one frame before, kept or not.
So a slow drift is lost; `changed` compares with what was last kept, and over calls.

| | vLLM's code | ours |
|---|---|---|
| how many | the larger of one frame and int(tokens * (1 - rate)) | `keep`, exactly; :func:`published_count` is theirs |
| fewer than one frame, and still pictures | never | of the first frame, what is least like its mean: ours |
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..core.contract import PruneInputs, Pruner
from ..core.plan import gather_rows
from ..core.registry import register_pruner

FIRST = 255.0
"""The score of the first frame, above any that a cosine gives."""


def published_count(frames: int, cells: int, rate: float) -> int:
    """Tokens that stay of a clip of so many frames and cells in each, where ``rate`` in [0, 1) is to go.

    In floating point, as there: of 100 tokens 9 stay at a rate of 0.9.
    """
    return max(cells, int(frames * cells * (1 - rate)))


@register_pruner("evs")
class Evs(Pruner):
    """Top tokens by how unlike they are to the same cell one frame before; the first frame before all."""

    criteria = ("change",)
    needs = ("frame",)

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` float32."""
        features, before = inputs.features.float(), one_frame_before(inputs)
        changed = 1 - cosine_similarity(features, gather_rows(features, before.clamp_min(0)), dim=-1)
        there = (before >= 0) & (inputs.signal("frame") > 0)
        first = (inputs.valid & ~there)[..., None]
        mean = features.masked_fill(~first, 0).sum(1, keepdim=True) / first.sum(1, keepdim=True).clamp_min(1)
        return torch.where(there, changed, FIRST + 1 - cosine_similarity(features, mean, dim=-1))


def one_frame_before(inputs: PruneInputs) -> Tensor:
    """``(B, N)`` long: the slot of the same cell one tile before, -1 where there is none."""
    slots = np.full(tuple(inputs.valid.shape), -1)
    for row, (places, cells) in enumerate(inputs.host_grids):
        table = np.full(cells.max(0, initial=0) + 1, -1)
        table[tuple(cells.T)] = places
        tile, high, wide = cells.T
        slots[row, places] = np.where(tile > 0, table[tile - 1, high, wide], -1)
    return torch.from_numpy(slots).to(inputs.valid.device)
