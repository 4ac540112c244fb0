"""What each stage did to a batch, and how many image tokens each layer of the language model read because of it.

Letters: R images.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """What one stage did to a batch."""

    stage: str
    layer: int | None  # in front of which decoder layer; None: before the language model
    before: Tensor  # (R,) long, tokens found
    after: Tensor  # (R,) long, tokens left
    seconds: float  # in the pruner, and in the layer stage in the signals that it needs of the layers


def layer_tokens(cuts: Sequence[Cut], depth: int) -> Tensor:
    """``(R, depth)`` long: image tokens that each layer of the language model reads; ``cuts`` in their order."""
    tokens = cuts[0].before[:, None].repeat(1, depth)
    for cut in cuts:
        tokens[:, cut.layer or 0 :] = cut.after[:, None]
    return tokens


def layer_mean(cuts: Sequence[Cut], depth: int) -> Tensor:
    """``(R,)`` float: the mean of :func:`layer_tokens` over the layers."""
    return layer_tokens(cuts, depth).float().mean(1)


def now(device: torch.device) -> float:
    """Seconds on a clock, with the device's queue run empty."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
