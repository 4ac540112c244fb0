"""The vision stage by whole cells, in towers behind which patches are joined or put together to a grid.

A **cell** is the part of a picture that becomes one token of the language model: the patches that are merged two by
two, shuffled or pooled behind the tower; one patch where crops are put together. What a pruner sees of a cell is the
mean over its patches, of states and of signals, and a cell goes with all of them. Then, as in the input stage, each
patch has its place again, with zeros, or with what it was when it stopped where the pruner says `restore`. So all that
follows (splitting by image, the order of windows, pixel shuffle, pooling, grids) is as long as ever, and the prompt is
shortened as in the prompt stage. Nothing is merged: what stands for several has no cell to be joined in.

In a packed tower, whose pictures stand in one row, blocks behind are handed shorter seams and position embeddings; in
others what fills up pictures with fewer patches is hidden.
Letters: R rows, pictures that the tower sees (1 where it is packed), N patches of one, W of them left, P tokens before
the patches, B images, M tokens alive of one, n tokens of all with newlines, k patches of a token, D width of the tower.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...core.contract import PruneInputs, PruneOutput, Pruner
from ...core.errors import PruneZooError
from ...core.plan import gather_rows
from ...core.signals import parse_signal
from ..families import Family
from ..signals.vision import VisionTap
from .cut import Timer
from .packed import Handed
from .plain import mask_of_left
from .rows import Rows
from .vision import VisionStage


class CellStage(VisionStage):
    """A pruner inside a tower, for one pass over the pictures of one kind of a batch."""

    def __init__(
        self, family: Family, numbers: Sequence[Tensor], pruner: Pruner, inputs: PruneInputs, keep: tuple[int, ...],
        timer: Timer, deal: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        """Plan the pass.

        Args:
            family: Whose tower.
            numbers: (B) long, on the host: which of the n tokens those of ``inputs`` are, of each image.
            pruner: Of the vision stage; it only drops.
            inputs: The B images; their features are not looked at.
            keep: (B) tokens that the last block leaves of each.
            timer: Of what the pruner takes.
            deal: Deals numbers of patches, ``(R, N, 1)`` on the host, out to tokens, ``(n, k)``.

        Raises:
            PruneZooError: As :func:`vision.check_vision_stage` does.
        """
        self.short = family.short()
        super().__init__(self.short.tower, pruner, replace(inputs, drop_only=True), keep, timer)
        self.numbers = torch.stack([pad(own, (0, inputs.valid.shape[1] - len(own))) for own in numbers])
        self.deal = deal
        self.kept = torch.arange(inputs.valid.shape[1], device=inputs.valid.device).expand(inputs.valid.shape)
        """``(B, M)`` long: the slot among those found of each token alive."""
        self.rows: Rows | None = None  # from the first block on
        self.cut = False  # whether anything has gone
        self.ragged = False  # whether there is filler
        self.handed: Handed | None = None

    def result(self) -> PruneOutput:
        """What is left after the pass, in slots of what was found."""
        blocks = self._work() * self.members.shape[2]
        if self.pruner.restore:
            found = self.patches
            index = torch.arange(found.valid.shape[1], device=found.valid.device).expand(found.valid.shape)
            return PruneOutput(index.masked_fill(~found.valid, 0), found.valid, known=found.counts, blocks=blocks)
        alive = self.alive
        return PruneOutput(self.kept.masked_fill(~alive.valid, 0), alive.valid, known=alive.counts, blocks=blocks)

    # Hooks

    def _hook_rows(self) -> None:
        first, *_ = blocks = self.short.blocks
        self._hook(first.register_forward_pre_hook, self._begin)
        for number, block in enumerate(blocks):
            if self.short.packed:
                self._hook(block.register_forward_pre_hook, self._hand, with_kwargs=True)
            elif number < self.tower.depth:  # what a block behind the projected one makes is not read
                attention = self.tower.attention(number).module
                self._hook(attention.register_forward_pre_hook, self._add_mask, with_kwargs=True)
        for end in self.short.ends:
            if self.short.at_block:  # put in front before the hooks of `_act_…` are, it comes behind them
                self._hook(end.register_forward_hook, self._restore, prepend=True)
            elif self.pruner.restore:
                self._hook(end.register_forward_pre_hook, self._give_states)
            else:
                self._hook(end.register_forward_hook, self._give_places, prepend=True)

    def _begin(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Find the patches of each token; take out what an input stage did not leave."""
        hidden = args[0]
        rows, patches = self._rows_of(hidden).shape[:2]
        dealt = self.deal(torch.arange(1, rows * patches + 1).view(rows, patches, 1))  # (n, k), 0 for none
        members = (dealt[self.numbers] - 1).clamp_min(0)  # (B, M, k); 0 for padding
        valid = torch.from_numpy(np.arange(members.shape[1]) < np.array(self.alive.counts)[:, None])
        free = torch.ones(rows * patches + 1, dtype=torch.bool)  # of no token, as those of a margin; they stay
        free[dealt] = False
        image = torch.zeros(rows * patches + 1, dtype=torch.long)
        image[(members + 1).masked_fill(~valid[..., None], 0)] = torch.arange(len(members))[:, None, None]
        image = image[1:].view(rows, patches)
        self.image = (image if self.short.packed else image.amax(1)).to(hidden.device)
        """Whose each patch is, where it is packed, ``(1, N)``; else whose each row is, ``(R,)``."""
        self.whole_rows = rows == len(members) and not free[1:].numpy().any()  # one for each image
        self.members, self.free = members.to(hidden.device), free[1:].view(rows, patches).to(hidden.device)
        self.rows = Rows(rows, patches, hidden.device)
        if sum(self.alive.counts) == int((dealt > 0).numpy().any(1).sum()):
            return args
        return (self._take(hidden), *args[1:])

    def _hand(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """What a packed tower hands to its blocks, for what is left."""
        if not self.cut:
            return None
        assert self.rows is not None
        if self.handed is None:
            places = self.rows.index[0]
            host = self.tower.kernel in ("sdpa", "eager")  # which ask for the lengths of parts in every block
            self.handed = Handed(places, self._seams, torch.device("cpu") if host else places.device)
        return args, self.handed.shorter(kwargs)

    def _seams(self, whole: Tensor) -> Tensor:
        """Of parts that see themselves alone; one of which nothing is left goes."""
        assert self.rows is not None
        if len(whole) == len(self.alive.counts) + 1:  # a part is an image, and the host knows how much is left of it
            many = self.members.shape[2]
            ends = torch.tensor([0, *accumulate(many * count for count in self.alive.counts)])
        else:
            before = pad(self.rows.alive[0].cumsum(0), (1, 0))
            ends = torch.from_numpy(np.unique(before[whole.long()].cpu().numpy()))
        return ends.to(whole.dtype)

    def _add_mask(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Hide filler, and what the tower hides."""
        own = kwargs.get("attention_mask")
        if not self.cut or (own is None and not self.ragged):
            return None
        if self.mask is None:
            assert self.rows is not None
            hidden = args[0] if args else kwargs["hidden_states"]
            self.mask = mask_of_left(self.tower, own, self.rows.index, self.rows.valid, hidden.dtype)
        return args, {**kwargs, "attention_mask": self.mask}

    def _silence(self, _module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if self.heads is None:
            return None
        assert self.rows is not None
        of = self.image.gather(1, self.rows.index)[0] if self.short.packed else self.image
        heads = self.heads[of][..., None]  # (W, H, 1) or (R, H, 1)
        given = args[0].unflatten(-1, (heads.shape[1], -1))
        return (given.masked_fill(~(heads if self.short.packed else heads[:, None]), 0).flatten(-2),)

    def _restore(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        """``(R, P + N, D)``, behind the last block."""
        if not self.cut:
            return None
        assert self.rows is not None
        return self._with_rows(output, self.rows.whole(self._rows_of(output), gone=self.dropped))

    def _give_places(self, _end: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        """A row of what the end makes for each cell that there was, zeros where it has gone."""
        if not self.cut:
            return None
        assert self.rows is not None
        made = self.rows.whole(output[None] if self.short.packed else output, self.short.joined)
        return made[0] if self.short.packed else made

    def _give_states(self, _end: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Each patch has its place in front of the end already, with the state in which it stopped."""
        if not self.cut:
            return None
        assert self.rows is not None
        states = args[0][None] if self.short.packed else args[0]
        whole = self.rows.whole(states, gone=self.dropped)
        return (whole[0] if self.short.packed else whole, *args[1:])

    # What the pruner sees, and what it leaves

    def _signal(self, tap: VisionTap, name: str) -> Tensor:
        assert self.rows is not None
        if parse_signal(name).axes.count("N") > 1:
            return self._filled(self.rows.maps_of_tokens(tap.maps(name), self.members))
        return self._filled(self.rows.of_tokens(tap.read(name), self.members))

    def _states(self, hidden: Tensor) -> Tensor:
        assert self.rows is not None
        return self._filled(self.rows.of_tokens(self._rows_of(hidden), self.members))

    def _filled(self, values: Tensor) -> Tensor:
        """Padding 0: it points at any patch, and one of a row that has nothing left can be nan."""
        return values.masked_fill(~self.alive.valid.view(*values.shape[:2], *[1] * (values.dim() - 2)), 0)

    def _shorten(self, hidden: Tensor, inputs: PruneInputs, output: PruneOutput) -> Tensor:
        if any(made is not None for made in (output.features, output.groups, output.sizes, output.back)):
            raise PruneZooError(
                f"pruner '{self.pruner.name}' makes or merges tokens, and this vision tower is pruned by whole cells: "
                "use one that only drops, as flowcut, spatten or zero_tprune"
            )
        self.alive = inputs.after(output)
        self.members, self.kept = gather_rows(self.members, output.index), gather_rows(self.kept, output.index)
        return self._take(hidden)

    def _take(self, hidden: Tensor) -> Tensor:
        """Of ``hidden`` the patches of tokens alive, and those of none."""
        rows, before, many = self.rows, self._rows_of(hidden), self.members.shape[2]
        assert rows is not None
        ours = self.members.masked_fill(~self.alive.valid[..., None], rows.alive.numel()).flatten()
        alive = pad(self.free.flatten(), (0, 1)).index_fill(0, ours, True)[:-1].view_as(rows.alive)
        if self.pruner.restore:
            states = rows.whole(before)
            gone = (rows.alive & ~alive)[..., None]
            self.dropped = states if self.dropped is None else states.where(gone, self.dropped)
        counts = [many * count for count in self.alive.counts]
        if self.short.packed:
            counts = [sum(counts)]
        elif not self.whole_rows:  # how much of a tile is left the device must tell
            counts = alive.sum(1).tolist()
        self.cut, self.ragged, self.mask, self.handed = True, len(set(counts)) > 1, None, None
        return self._with_rows(hidden, rows.shorten(before, alive, max(counts)))

    def _rows_of(self, hidden: Tensor) -> Tensor:
        """``(R, W, D)``: without what stands before the patches."""
        return hidden[None] if self.short.packed else hidden[:, self.tower.prefix :]

    def _with_rows(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """``rows (R, W, D)`` behind what stands before the patches in ``hidden``."""
        return rows[0] if self.short.packed else torch.cat([hidden[:, : self.tower.prefix], rows], 1)
