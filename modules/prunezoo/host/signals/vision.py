"""Signals of the vision tower: what its attention computes, tapped by hooks, and maps made of the rows that are needed.

Nothing switches the tower to eager attention, and what nobody asks for puts no hook anywhere. Names and shapes of the
signals: ``core/signals.py``. Here N are patches: families deal out what was read to tokens.
Letters: R pictures that the tower sees, S their tokens, P of them before the patches, N patches, T rows of a map, H
heads, d width of a head.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from ...core.errors import PruneZooError
from ...core.signals import NEXT, parse_signal
from ..families.gaps import cut_patches
from ..parts.tower import CONTEXT, KEY, OUTPUT, QUERY, VALUE, Seen, Tower

ROWS = 1024  # of a map of attention that are in memory at a time
MAP = (QUERY, KEY, CONTEXT)
STATES, ENTERED = "states", "entered"
PARTS = {
    "cls_attention": MAP,
    "cls_head_attention": MAP,
    "cls_joint_attention": MAP,
    "cls_query": (QUERY,),
    "cls_value": (VALUE,),
    "received_attention": MAP,
    "vision_attention": MAP,
    "vision_head_attention": MAP,
    "vision_keys": (KEY,),
    "vision_values": (VALUE,),
    "vision_outputs": (OUTPUT,),
    "vision_inputs": (ENTERED,),
    "vision_states": (STATES,),
}
"""What of an attention each vision signal is made from; of the block itself, its states."""


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
        of_cls = sorted(kind for kind in kinds if kind.startswith("cls"))
        if of_cls and not tower.has_cls:
            raise PruneZooError(
                f"this vision tower has no CLS token: use a pruner that reads 'received_attention', not '{of_cls[0]}', "
                "as hiprune, or as those do that have the option attention=received"
            )
        self.tower, self.attention = tower, tower.attention(block)
        self.seen: Seen = {}
        parts = {part for kind in kinds for part in PARTS[kind]}
        self.handles = self.attention.watch(parts, self.seen)
        if ENTERED in parts:
            self.handles.append(tower.blocks[block].register_forward_pre_hook(self._write_inputs))
        if STATES in parts:
            # In front of hooks that give the places of dropped patches back: signals are of what the block has seen.
            self.handles.append(tower.blocks[block].register_forward_hook(self._write_states, prepend=True))

    def _write_inputs(self, _module: nn.Module, args: Any) -> None:
        self.seen[ENTERED] = args[0] if args[0].dim() == 3 else args[0][None]

    def _write_states(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self.seen[STATES] = output if output.dim() == 3 else output[None]  # packed pictures are one row

    def read(self, kind: str, looking: Tensor | None = None) -> Tensor:
        """A signal of the last pass, with the axes of its kind; float32 where it is attention.

        A map only of towers whose pictures all stand in rows of their own; else :meth:`maps`.

        Args:
            kind: Of VISION_SIGNALS.
            looking: ``(R, S)``: how much each row counts in a mean over rows; None: alike, but for what nobody sees.
        """
        prefix = self.tower.prefix  # CLS is the first token wherever there is one
        if kind in ("vision_attention", "vision_head_attention"):
            (whole,) = self.maps(kind)
            return whole
        if kind in ("cls_query", "cls_value"):
            part = self.seen[PARTS[kind][0]]
            return part[:, :1].expand(-1, part.shape[1] - prefix, -1, -1)
        if PARTS[kind] != MAP:
            return self.seen[PARTS[kind][0]][:, prefix:]
        means = []
        for query, key, mask in self.attention.sequences(self.seen):
            if kind == "cls_head_attention":
                means.append(attention_map(query[:, :1], key, self.attention.scale, mask, by_head=True)[:, 0])
            elif kind == "cls_joint_attention":
                means.append(joint_attention(query[:, :1], key, mask))
            else:
                of_cls = kind == "cls_attention"
                rows, counted = (query[:, :1], None) if of_cls else (query, looking)
                means.append(mean_attention(rows, key, self.attention.scale, mask, counted))
        return torch.cat(means, 1)[:, prefix:]

    def maps(self, kind: str) -> list[Tensor]:
        """Whole maps of the last pass, float32: ``(R, S, S)``, or ``(R, S, S, H)``, of all that sees but itself.

        With S without CLS; it has taken its share of the weight of each row.
        """
        prefix, by_head = self.tower.prefix, kind == "vision_head_attention"
        return [
            attention_map(query[:, prefix:], key, self.attention.scale, mask, by_head)[:, :, prefix:]
            for query, key, mask in self.attention.sequences(self.seen)
        ]

    def __enter__(self) -> Self:
        """Leave the hooks on for the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take them off."""
        for handle in self.handles:
            handle.remove()


def mean_attention(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, counted: Tensor | None = None
) -> Tensor:
    """Softmax weights that each key gets, mean over heads and rows.

    Args:
        query: ``(R, T, H, d)``; all rows, or the ones wanted.
        key: ``(R, S, H, d)``.
        scale: Of the dot products.
        mask: As given to the attention, the same for every row: ``(R, 1, 1 or S, S)``, True or a number to add; None:
            everything is seen.
        counted: ``(R, T)`` float32: weight of each row in the mean; None: 1, and 0, where there are all rows, of tokens
            that nobody may look at.

    Returns:
        ``(R, S)`` float32.
    """
    bias = _bias(query, mask)
    if counted is None:
        counted = query.new_ones(query.shape[:2], dtype=torch.float32)
        if bias is not None and query.shape[1] == key.shape[1]:
            counted = (bias[:, 0] > torch.finfo(query.dtype).min / 2).float()
    total = key.new_zeros(key.shape[:2], dtype=torch.float32)
    # One head and some rows at a time: the whole map of a large tower would be gigabytes.
    for head in range(key.shape[2]):
        keys = key[:, :, head].transpose(1, 2)
        for rows, weight in zip(query[:, :, head].split(ROWS, 1), counted.split(ROWS, 1), strict=True):
            logits = rows @ keys * scale
            logits = logits if bias is None else logits + bias
            total += (weight[:, None] @ logits.softmax(-1, dtype=torch.float32))[:, 0]
    return total / (key.shape[2] * counted.sum(1, keepdim=True))


def joint_attention(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """:meth:`mean_attention` of all heads as one, which is as wide as they are together; arguments as there."""
    query, key = (part.flatten(2)[:, :, None] for part in (query, key))
    return mean_attention(query, key, query.shape[-1] ** -0.5, mask)


def attention_map(query: Tensor, key: Tensor, scale: float, mask: Tensor | None, by_head: bool) -> Tensor:
    """Softmax weights, whole. Besides the map only :data:`ROWS` rows of one head are in memory at a time.

    Args:
        query: As of :func:`mean_attention`.
        key: Likewise.
        scale: Likewise.
        mask: Likewise.
        by_head: Of each head; else their mean.

    Returns:
        ``(R, T, S, H)`` float32, or ``(R, T, S)``.
    """
    bias, heads = _bias(query, mask), key.shape[2]
    whole = key.new_zeros(*query.shape[:2], key.shape[1], heads if by_head else 1, dtype=torch.float32)
    for head in range(heads):
        keys = key[:, :, head].transpose(1, 2)
        for first in range(0, query.shape[1], ROWS):
            rows = slice(first, first + ROWS)
            logits = query[:, rows, head] @ keys * scale
            weights = (logits if bias is None else logits + bias).softmax(-1, dtype=torch.float32)
            whole[:, rows, :, head if by_head else 0] += weights
    return whole if by_head else whole[..., 0] / heads


def _bias(query: Tensor, mask: Tensor | None) -> Tensor | None:
    """``(R, 1, S)``: what a mask, the same for every row, adds to logits."""
    if mask is None or mask.is_floating_point():
        return None if mask is None else mask[:, 0, :1]
    return query.new_zeros(()).masked_fill(~mask[:, 0, :1], torch.finfo(query.dtype).min)


class PixelTap:
    """Watches what enters a tower."""

    def __init__(self, tower: Tower) -> None:
        """Put the hook on."""
        self.seen: list[Tensor] = []
        self.embedding = tower.patch_embedding
        self.handle = self.embedding.register_forward_pre_hook(self._write)

    def _write(self, _module: nn.Module, args: tuple[Tensor]) -> None:
        self.seen[:] = args

    def read(self) -> Tensor:
        """``(R, N, C, p, p)`` of the last pass: the patches in the order in which they are given to the tower."""
        (pictures,) = self.seen
        if isinstance(self.embedding, nn.Conv3d):  # single patches already, of several frames
            return pictures.transpose(1, 2).flatten(1, 2)[None]
        return cut_patches(pictures, *self.embedding.kernel_size)

    def __enter__(self) -> Self:
        """Leave the hook on for the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take it off."""
        self.handle.remove()


@contextmanager
def watch_tower(tower: Callable[[], Tower], needs: tuple[str, ...]) -> Iterator[dict[str, Tensor | Sequence[Tensor]]]:
    """Compute the vision tower's signals among ``needs`` from the pass that it makes while the block runs.

    Args:
        tower: Gives the tower; not asked where no signal of it is wanted.
        needs: Names of signals.

    Yields:
        By name, ``(R, N, ...)``, a row for each picture that the tower saw, or the :meth:`VisionTap.maps` of a kind of
        map; empty until the block has ended.

    Raises:
        PruneZooError: The tower has no such block, or no CLS where that is asked for.
    """
    wanted = {name: parse_signal(name) for name in needs if parse_signal(name).is_vision}
    pixels = "pixels" in needs
    signals: dict[str, Any] = {}
    if not wanted and not pixels:
        yield signals
        return
    found = tower()
    places = {
        name: found.next_block() if signal.at == NEXT else found.block_index(signal.block)
        for name, signal in wanted.items()
    }
    with ExitStack() as stack:
        taps = {
            block: stack.enter_context(
                VisionTap(found, block, {wanted[name].kind for name in wanted if places[name] == block})
            )
            for block in set(places.values())
        }
        entering = stack.enter_context(PixelTap(found)) if pixels else None
        yield signals
        for name, signal in wanted.items():
            tap, is_map = taps[places[name]], signal.axes.count("N") > 1
            signals[name] = tap.maps(signal.kind) if is_map else tap.read(signal.kind)
        if entering is not None:
            signals["pixels"] = entering.read()
