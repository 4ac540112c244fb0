"""Changed: of a stream of pictures, keep what is not as it was when the language model last saw it.

Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference, Bagrov et al., 2025,
https://arxiv.org/abs/2510.14624.

Ours, for calls one after another. The rule is that of Efficient Video Sampling, which drops what is like the same cell
one frame before, by cosine of the projected tokens, inside of one clip. Two things differ.

* A cell is compared with what was last **kept** of it, not with the frame before: so a slow drift adds up until it is
  seen, where frame by frame it would be lost.
* A cell of which nothing was kept yet is compared with the mean token of its own picture. So a first picture, or any
  without a memory, keeps what stands out, and a picture that stands still is shown bit by bit until all of it was.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.registry import register_pruner


@register_pruner("changed")
class Changed(Pruner):
    """Top tokens by how unlike they are to what was last kept of their cell, else to the mean of the picture."""

    criteria = ("change",)
    remembers = True

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: 1 - cosine to what is expected of each token."""
        tokens = inputs.features.float().masked_fill(~inputs.valid[..., None], 0)
        expected = (tokens.sum(1, keepdim=True) / inputs.valid.sum(1)[:, None, None].clamp_min(1)).expand_as(tokens)
        if inputs.memory is not None:
            pairs = zip(expected, inputs.cells, inputs.memory, strict=True)
            expected = torch.stack([_last_seen(own, cells, state) for own, cells, state in pairs])
        return 1 - functional.cosine_similarity(tokens, expected, dim=-1)

    def remember(self, inputs: PruneInputs, output: PruneOutput) -> list[Mapping[str, Tensor]]:
        """Cells ``(n, 3)`` of which something was kept at any time, and what it was last, ``(n, D)``."""
        states: list[Mapping[str, Tensor]] = []
        for row, state in enumerate(inputs.memory or (None,) * len(inputs.valid)):
            index = output.index[row, output.valid[row]]
            cells, features = inputs.cells[row, index], inputs.features[row, index].detach()
            if state is not None:
                stale = (state["cells"][:, None] == cells).all(-1).any(1)
                cells = torch.cat([state["cells"][~stale], cells])
                features = torch.cat([state["features"][~stale], features])
            states.append({"cells": cells, "features": features})
        return states


def _last_seen(expected: Tensor, cells: Tensor, state: Mapping[str, Tensor] | None) -> Tensor:
    """``expected (N, D)`` of tokens in ``cells (N, 3)``, with what is held of them in its place."""
    if state is None:
        return expected
    same = (cells[:, None] == state["cells"]).all(-1)  # (N, n)
    held = state["features"].to(expected)[same.int().argmax(1)]
    return torch.where(same.any(1, keepdim=True), held, expected)
