"""Signals of the vision tower: what its attention computes, tapped by hooks, and maps made of the rows that are needed.

Nothing switches the tower to eager attention, and what nobody asks for puts no hook anywhere. Names and shapes of the
signals: ``core/signals.py``.
Letters: R pictures that the tower sees, S their tokens, P of them before the patches, N patches, T rows of a map, H
heads, d width of a head.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Self

import torch
from torch import Tensor

from ...core.errors import PruneZooError
from ...core.signals import parse_signal
from ..parts.tower import CONTEXT, KEY, QUERY, VALUE, Seen, Tower

ROWS = 1024  # of a map of attention that are in memory at a time
PARTS = {
    "cls_attention": (QUERY, KEY, CONTEXT),
    "received_attention": (QUERY, KEY, CONTEXT),
    "vision_keys": (KEY,),
    "vision_values": (VALUE,),
}
"""What of an attention each vision signal is made from."""


class VisionTap:
    """Watches the attention of one block, and makes signals of what it sees."""

    def __init__(self, tower: Tower, block: int, kinds: Collection[str]) -> None:
        """Put the hooks on.

        Args:
            tower: The tower.
            block: Which block, from 0.
            kinds: Of VISION_SIGNALS, those that will be read.

        Raises:
            PruneZooError: CLS is wanted, and the tower has none.
        """
        if "cls_attention" in kinds and not tower.has_cls:
            raise PruneZooError(
                "this vision tower has no CLS token: use a pruner that reads 'received_attention', not 'cls_attention'"
            )
        self.tower, self.attention = tower, tower.attention(block)
        self.seen: Seen = {}
        self.handles = self.attention.watch({part for kind in kinds for part in PARTS[kind]}, self.seen)

    def read(self, kind: str) -> Tensor:
        """A signal of the last pass: ``(R, N)`` float32, or ``(R, N, H, d)`` for keys and values."""
        if kind in ("vision_keys", "vision_values"):
            return self.seen[PARTS[kind][0]][:, self.tower.prefix :]
        means = []
        for query, key, mask in self.attention.sequences(self.seen):
            rows = query[:, :1] if kind == "cls_attention" else query  # CLS is the first token wherever there is one
            means.append(mean_attention(rows, key, self.attention.scale, mask))
        return torch.cat(means, 1)[:, self.tower.prefix :]

    def __enter__(self) -> Self:
        """Leave the hooks on for the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take them off."""
        for handle in self.handles:
            handle.remove()


def mean_attention(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Softmax weights that each key gets, mean over heads and rows.

    Args:
        query: ``(R, T, H, d)``; all rows, or the ones wanted.
        key: ``(R, S, H, d)``.
        scale: Of the dot products.
        mask: As given to the attention, the same for every row: ``(R, 1, 1 or S, S)``, True or a number to add; None:
            everything is seen.

    Returns:
        ``(R, S)`` float32. Where there are all rows, those of tokens that nobody may look at are left out.
    """
    bias = None
    counted = query.new_ones(query.shape[:2], dtype=torch.float32)
    if mask is not None:
        lowest = torch.finfo(query.dtype).min
        bias = mask[:, 0, :1] if mask.is_floating_point() else query.new_zeros(()).masked_fill(~mask[:, 0, :1], lowest)
        if query.shape[1] == key.shape[1]:
            counted = (bias[:, 0] > lowest / 2).float()
    total = key.new_zeros(key.shape[:2], dtype=torch.float32)
    # One head and some rows at a time: the whole map of a large tower would be gigabytes.
    for head in range(key.shape[2]):
        keys = key[:, :, head].transpose(1, 2)
        for rows, weight in zip(query[:, :, head].split(ROWS, 1), counted.split(ROWS, 1), strict=True):
            logits = rows @ keys * scale
            logits = logits if bias is None else logits + bias
            total += (weight[:, None] @ logits.softmax(-1, dtype=torch.float32))[:, 0]
    return total / (key.shape[2] * counted.sum(1, keepdim=True))


@contextmanager
def watch_tower(tower: Callable[[], Tower], needs: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Compute the vision tower's signals among ``needs`` from the pass that it makes while the block runs.

    Args:
        tower: Gives the tower; not asked where no signal of it is wanted.
        needs: Names of signals.

    Yields:
        By name, ``(R, N, ...)``, a row for each picture that the tower saw; empty until the block has ended.

    Raises:
        PruneZooError: The tower has no such block, or no CLS where that is asked for.
    """
    wanted = {name: parse_signal(name) for name in needs if parse_signal(name).is_vision}
    signals: dict[str, Tensor] = {}
    if not wanted:
        yield signals
        return
    found = tower()
    places = {name: found.block_index(signal.number) for name, signal in wanted.items()}
    with ExitStack() as stack:
        taps = {
            block: stack.enter_context(
                VisionTap(found, block, {wanted[name].kind for name in wanted if places[name] == block})
            )
            for block in set(places.values())
        }
        yield signals
        signals.update({name: taps[places[name]].read(signal.kind) for name, signal in wanted.items()})
