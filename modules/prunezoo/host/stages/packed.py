"""A tower whose pictures stand in one row of patches (Qwen-VL's) runs on some of them.

Mechanism: hooks for the length of one pass; no forward is replaced. In front of the first block the patches that are
left out are taken from the row. The tower's own loop hands every block position embeddings and seams of the whole row:
a pre-hook on each makes the shorter ones of them. Behind the mergers the row is as long as it was, with zeros.
Letters: N patches of the row, K of them left, M rows behind a merger.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..families.gaps import Short
from ..families.spread import Values

Hooked = tuple[tuple[Any, ...], dict[str, Any]]


class Handed:
    """What the loop of a tower hands to all its blocks besides the hidden states, made shorter once."""

    def __init__(self, rows: Tensor, seams: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Of a row of which some patches are left.

        Args:
            rows: ``(K,)`` long, which.
            seams: Gives the shorter ones for those of the whole row, on the host.
            device: Where they are handed over.
        """
        self.rows, self.seams, self.device = rows, seams, device
        self.made: dict[int, tuple[Any, Any]] = {}  # of each thing that is handed over, by its id

    def shorter(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keywords of a block, for what is left."""
        seams = self._once(kwargs["cu_seqlens"], self.seams)
        positions = tuple(self._once(part, lambda whole: whole[self.rows]) for part in kwargs["position_embeddings"])
        given = self._once(seams, lambda own: own.to(self.device))
        changed = {**kwargs, "cu_seqlens": given, "position_embeddings": positions}
        if kwargs.get("max_seqlen") is not None:
            changed["max_seqlen"] = int(seams.diff().numpy().max())
        return changed

    def _once(self, value: Any, make: Callable[[Any], Any]) -> Any:
        """Made of the first block's for all that are handed the same."""
        if id(value) not in self.made:
            self.made[id(value)] = (value, make(value))  # the value is held, so that its id stays its own
        return self.made[id(value)][1]


class PackedGap:
    """One pass, from ``__enter__`` to ``__exit__``."""

    def __init__(self, short: Short, find: Callable[[int, int], Tensor]) -> None:
        """Change nothing yet.

        Args:
            short: How the tower gets shorter.
            find: Gives, for one picture of N patches, which stay, ``(1, N)`` bool, in the tower's own order: whole
                tokens; on the host, as it is known before the tower runs.
        """
        self.short, self.find = short, find
        self.stack = ExitStack()
        self.sizes: list[list[int]] = []  # of whole segments, and of windows where there are such

    def __enter__(self) -> Self:
        """Put the hooks on, in front of others, which see what is left."""
        with self.stack:
            for number, block in enumerate(self.short.blocks):
                hook = self._later if number else self._first
                self.stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True, prepend=True).remove)
            for end in self.short.ends:
                self.stack.callback(end.register_forward_hook(self._give_places).remove)
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Take them off."""
        self.stack.close()

    def whole(self, values: Values) -> Values:
        """``(1, K, ...)`` to ``(1, N, ...)``; maps of segments (images, windows, frames) to those of whole ones."""
        if isinstance(values, Tensor):
            return put_back(values[0], places(self.alive), len(self.alive))[None]
        lengths = [own.shape[1] for own in values]
        for sizes in self.sizes:  # those of the block that the maps are of; a segment without survivors has no map
            found = [places(own) for own in self.alive.split(sizes)]
            if [len(own) for own in found if len(own)] == lengths:
                break
        shorter, nothing = iter(values), values[0].new_zeros(0, 0, *values[0].shape[3:])
        maps = [next(shorter)[0] if len(own) else nothing for own in found]
        rows = [put_back(own, place, size) for own, place, size in zip(maps, found, sizes, strict=True)]
        whole = zip(rows, found, sizes, strict=True)
        return [put_back(own.transpose(0, 1), place, size).transpose(0, 1)[None] for own, place, size in whole]

    def _first(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hooked:
        """Take out what does not stay."""
        hidden, *others = args
        self.alive = self.find(1, len(hidden))[0]
        self.rows = places(self.alive).to(hidden.device)
        self.before = pad(self.alive.cumsum(0), (1, 0))  # how many are left in front of each patch
        self.handed = Handed(self.rows, self._shorter_seams, hidden.device)
        return (hidden[self.rows], *others), self._shorter(kwargs)

    def _later(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hooked:
        return args, self._shorter(kwargs)

    def _shorter(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return self.handed.shorter(kwargs)

    def _shorter_seams(self, seams: Tensor) -> Tensor:
        """One of which nothing is left goes: it would be a sequence of no tokens."""
        whole = seams.long().cpu()
        self.sizes.append(whole.diff().numpy().tolist())
        return torch.from_numpy(np.unique(self.before[whole].numpy())).to(seams.dtype)

    def _give_places(self, _end: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """``(M, D)``, zeros where nothing was left."""
        cells = self.alive.view(-1, self.short.joined)[:, 0]
        return put_back(output, places(cells), len(cells))


def places(mask: Tensor) -> Tensor:
    """``(K,)`` long: where ``mask (N,)``, of the host, is set."""
    return torch.from_numpy(mask.numpy().nonzero()[0])


def put_back(values: Tensor, places: Tensor, count: int) -> Tensor:
    """``(count, ...)``: ``values (K, ...)`` in their ``places (K,)``, zeros elsewhere."""
    whole = values.new_zeros(count, *values.shape[1:])
    return whole.index_copy(0, places.to(values.device), values)
