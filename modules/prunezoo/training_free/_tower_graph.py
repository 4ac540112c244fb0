"""Attention of a vision block as a graph over its tokens, with CLS where the tower has it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..core.contract import PruneInputs

SIGNALS = {"cls": ("vision_head_attention", "cls_head_attention"), "received": ("vision_head_attention",)}
"""What the option `attention` of a method reads: with "cls" the graph has CLS as its first node, else patches alone."""


def head_maps(inputs: PruneInputs, needs: Sequence[str]) -> Tensor:
    """The maps of all heads, 0 wherever padding looks or is looked at.

    Args:
        inputs: What a pruner of the vision stage is given.
        needs: One of :data:`SIGNALS`.

    Returns:
        ``(B, H, P + N, P + N)`` float32, row = who looks; P is 1 with CLS, whose column is what is left of each row,
        else 0.
    """
    both = inputs.valid[:, None, :, None] & inputs.valid[:, None, None]
    maps = inputs.signal(needs[0]).float().movedim(3, 1).masked_fill(~both, 0)
    if len(needs) == 1:
        return maps
    of_cls = inputs.signal(needs[1]).float().movedim(2, 1).masked_fill(~inputs.valid[:, None], 0)[:, :, None]
    rows = torch.cat([of_cls, maps], 2)  # (B, H, 1 + N, N)
    looks = functional.pad(inputs.valid, (1, 0), value=True)[:, None]
    to_cls = (1 - rows.sum(-1)).clamp_min(0).masked_fill(~looks, 0)
    return torch.cat([to_cls[..., None], rows], 3)
