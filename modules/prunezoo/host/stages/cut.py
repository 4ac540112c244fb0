"""What each stage did to a batch, and how many image tokens each layer of the language model read because of it.

Letters: R images.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Timer:
    """Time on one device, in some pieces. It is read when all is done, so that nothing waits for the device before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pieces: list[tuple[Any, Any]] = []  # marks at the beginning and end of each

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the block."""
        start = self._mark()
        yield
        self.pieces.append((start, self._mark()))

    @property
    def seconds(self) -> float:
        """So far."""
        if self.device.type != "cuda":
            return float(sum(end - start for start, end in self.pieces))
        if self.pieces:
            self.pieces[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in self.pieces) / 1000

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


@dataclass(frozen=True)
class Cut:
    """What one stage did to a batch."""

    stage: str
    layer: int | None  # in front of which decoder layer; None: before the language model
    before: Tensor  # (R,) long, on the host: tokens found
    after: Tensor  # (R,) long, on the host: tokens left
    timer: Timer = field(default_factory=lambda: Timer(torch.device("cpu")))  # in the pruner, and the signals of layers


def layer_tokens(cuts: Sequence[Cut], depth: int) -> Tensor:
    """``(R, depth)`` long: image tokens that each layer of the language model reads; ``cuts`` in their order."""
    tokens = cuts[0].before[:, None].repeat(1, depth)
    for cut in cuts:
        tokens[:, cut.layer or 0 :] = cut.after[:, None]
    return tokens


def layer_mean(cuts: Sequence[Cut], depth: int) -> Tensor:
    """``(R,)`` float: the mean of :func:`layer_tokens` over the layers."""
    return layer_tokens(cuts, depth).float().mean(1)
