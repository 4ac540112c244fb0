"""A tower that sees pictures in a batch (CLIP's, SigLIP's and InternVL's make) runs on some of their patches.

Mechanism: hooks for the length of one pass; no forward is replaced. In front of the first block each picture keeps the
patches that stay, filled up to the longest; a pre-hook on every attention hides the filler, and whatever the tower's
own mask hides. A picture of which nothing stays does not enter. Then each patch has its place again, with zeros.
Letters: R pictures, R' of them left, P tokens before the patches (CLS or none), N patches of one, K the most left.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...core.errors import PruneZooError
from ...core.plan import gather_rows, mask_to_index
from ..families.gaps import Short
from ..families.spread import Values
from ..parts.tower import Tower


class PlainGap:
    """One pass, from ``__enter__`` to ``__exit__``."""

    def __init__(self, short: Short, find: Callable[[int, int], Tensor]) -> None:
        """Change nothing yet.

        Args:
            short: How the tower gets shorter.
            find: Gives, for R pictures of N patches, which stay, ``(R, N)`` bool; on the host, as it is known before
                the tower runs.
        """
        self.short, self.find, self.tower = short, find, short.tower
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        """Put the hooks on, in front of others, which see what is left."""
        with self.stack:
            blocks = self.short.blocks
            self._hook(blocks[0].register_forward_pre_hook, self._first, prepend=True)
            for number in range(len(blocks)):
                attention = self.tower.attention(number).module
                self._hook(attention.register_forward_pre_hook, self._hide, with_kwargs=True, prepend=True)
            # In front of the hooks with which transformers records hidden states: the projector reads such a record.
            (end,) = self.short.ends
            self._hook(end.register_forward_hook, self._give_places, prepend=True)
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Take them off."""
        self.stack.close()

    def _hook(self, register: Callable[..., Any], hook: Callable[..., Any], **options: Any) -> None:
        self.stack.callback(register(hook, **options).remove)

    def whole(self, values: Values) -> Values:
        """``(R', K, ...)`` to ``(R, N, ...)``; a map, ``(R', K, K, ...)``, to ``(R, N, N, ...)``."""
        if isinstance(values, Tensor):
            return self._put_back(values)
        return [self._whole_map(own) for own in values]

    def _whole_map(self, values: Tensor) -> Tensor:
        """The rows, then in these the columns."""
        rows = self._put_back(values)[self.pictures]  # (R', N, K, ...)
        return self._put_back(rows.transpose(1, 2)).transpose(1, 2)

    def _first(self, _block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Take out what does not stay."""
        hidden, prefix = args[0], self.tower.prefix
        self.shape = (len(hidden), hidden.shape[1] - prefix)
        alive = self.find(*self.shape)
        pictures = torch.from_numpy(alive.any(1).numpy().nonzero()[0])
        index, valid = mask_to_index(alive[pictures], int(alive.sum(1).numpy().max()))
        self.ragged = not valid.numpy().all()
        row, column = (torch.from_numpy(part) for part in valid.numpy().nonzero())
        taken = row * index.shape[1] + column  # of what is left, as one row
        given = pictures[row] * self.shape[1] + index[row, column]  # and where it goes, of all
        self.taken, self.given = taken.to(hidden.device), given.to(hidden.device)
        self.pictures, self.index, self.valid = (part.to(hidden.device) for part in (pictures, index, valid))
        self.mask: Tensor | None = None
        self.masked = False
        hidden = hidden[self.pictures]
        return (torch.cat([hidden[:, :prefix], gather_rows(hidden[:, prefix:], self.index)], 1), *args[1:])

    def _hide(self, _attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Every attention is handed the same, so the first one's mask is made into that of all."""
        if not self.masked:
            self.mask, self.masked = self._make_mask(args[0] if args else kwargs["hidden_states"], kwargs), True
        return args, {**kwargs, "attention_mask": self.mask}

    def _make_mask(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """``(R', 1, 1, P + K)``: 0, and the lowest number for filler and what the tower hides; None if nothing is."""
        own = kwargs.get("attention_mask")
        if own is None and not self.ragged:
            return None
        own = None if own is None else own[self.pictures]
        return mask_of_left(self.tower, own, self.index, self.valid, hidden.dtype)

    def _give_places(self, end: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """``(R, N, D)``, behind a block with what stands before the patches."""
        if not self.short.at_block:
            return self._put_back(output)
        prefix = self.tower.prefix
        head = output.new_zeros(self.shape[0], prefix, output.shape[2])
        head = head.index_copy(0, self.pictures, output[:, :prefix])
        return torch.cat([head, self._put_back(output[:, prefix:])], 1)

    def _put_back(self, values: Tensor) -> Tensor:
        """``(R', K, ...)`` in their places of ``(R, N, ...)``, zeros elsewhere."""
        whole = values.new_zeros(self.shape[0] * self.shape[1], *values.shape[2:])
        return whole.index_copy(0, self.given, values.flatten(0, 1)[self.taken]).unflatten(0, self.shape)


def mask_of_left(tower: Tower, own: Tensor | None, index: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention logits where pictures have some of their patches.

    Args:
        tower: The tower.
        own: ``(R, 1, 1 or S, S)``, what it would be given for all patches, the same for every row; None: nothing.
        index: ``(R, K)`` long, the patches that are left.
        valid: ``(R, K)`` bool, False for filler.
        dtype: Of the states.

    Returns:
        ``(R, 1, 1, P + K)``: 0, and the lowest number for filler and what the tower hides.

    Raises:
        PruneZooError: The tower's attention takes no such mask.
    """
    if tower.kernel not in ("sdpa", "eager"):
        raise PruneZooError(
            "pictures that keep different numbers of patches in the vision tower need attn_implementation 'sdpa' or "
            f"'eager' there, which has '{tower.kernel}': keep a fixed number of tokens"
        )
    seen = valid
    if own is not None:
        open_ = own if own.dtype == torch.bool else own == 0
        seen = seen & gather_rows(open_[:, 0, 0, tower.prefix :], index)
    weight = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return pad(weight, (tower.prefix, 0))[:, None, None]
