"""The vision stage: a pruner inside the blocks of a plain ViT, so that tower, projector and language model get less.

Mechanism: hooks for the length of one pass; no forward is replaced. In a pre-norm block

    h = x + attention(norm1(x));  out = h + mlp(norm2(h))

a pre-hook on norm2 meets the whole of h and gives the norm, and thereby the MLP, the fewer tokens h' that the pruner
makes of it; a hook on the block hands on h' + mlp(norm2(h')), which is what the block would have made of h'. Blocks
behind see fewer tokens; a pre-hook on their attention adds, through the mask that it takes anyway, log(size) to the
logits of tokens that stand for several (proportional attention, Bolya et al., https://arxiv.org/abs/2210.09461), and
takes out what fills up images that have fewer tokens than others of the batch. A pruner with `after_block` gets the
block's output instead. CLS always stays, and no pruner sees it.

In the prompt, what is left takes the slot of the patch that is nearest to the middle of those it stands for. Where a
pruner says `restore`, a hook on the last block makes a token of every patch again, so that tower alone gets less.
Letters: R images, P tokens before the patches (CLS or none), N patches, M tokens alive, K kept, D width of the tower.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...core.budgets import Keep, counts_of
from ...core.contract import PruneInputs, PruneOutput, Pruner
from ...core.errors import PruneZooError
from ...core.merge import kept_groups, place_groups
from ...core.plan import gather_rows, mask_to_index
from ...core.signals import INSIDE_SIGNALS
from ..encoded import Encoded
from ..families import find_family
from ..parts.model import VLM
from ..parts.tower import Tower
from ..signals.vision import VisionTap
from .cut import Timer


def choose(vlm: VLM, encoded: Encoded, pruner: Pruner, keep: Keep, timer: Timer) -> PruneOutput:
    """What a pruner in front of the language model, of the prompt or vision stage, leaves of the images of a batch.

    Args:
        vlm: The model that made ``encoded``.
        encoded: From :func:`encode`; for the vision stage with or without features, since the tower runs again.
        pruner: The pruner.
        keep: As in :meth:`Pruner.forward`.
        timer: Counts what the pruner takes itself, without the tower.

    Raises:
        PruneZooError: As the pruner and :class:`VisionStage` do.
    """
    if pruner.stage != "vision" or not len(encoded.sample):
        with timer.running():
            return pruner(encoded.inputs, keep)
    family = find_family(vlm)
    counts = counts_of(keep, encoded.inputs.counts)
    with VisionStage(family.tower(), pruner, encoded.inputs, counts, timer, encoded.start) as stage:
        features = family.run_encoder("image", {**encoded.batch, **encoded.pixels}).pooler_output
    return stage.output(features if isinstance(features, Tensor) else torch.stack(list(features)))


def check_vision_stage(tower: Tower, pruner: Pruner) -> None:
    """Raise PruneZooError on a tower that cannot be shortened, blocks that it has not, or signals of elsewhere."""
    tower.check_can_shrink(pruner.name, pruner.merges)
    blocks = pruner.stages(tower.depth)
    if not blocks or list(blocks) != sorted(set(blocks)) or not 0 <= blocks[0] <= blocks[-1] < tower.depth:
        raise PruneZooError(
            f"pruner '{pruner.name}' acts inside vision blocks {list(blocks)}, and of this tower {tower.depth} run "
            "up to the projected one: configure blocks that it has, in ascending order"
        )
    if pruner.given_schedule is not None:
        one = torch.ones(1, dtype=torch.long)
        pruner.steps(one, one, tower.depth)  # which says whether it fits
    for name in pruner.needs:
        if name not in INSIDE_SIGNALS:
            raise PruneZooError(
                f"pruner '{pruner.name}' needs '{name}', and the vision stage has, of the block inside which it "
                f"stands: {', '.join(INSIDE_SIGNALS)}"
            )


class VisionStage:
    """A pruner inside a tower, from ``__enter__`` to ``__exit__``, for one pass over R images."""

    def __init__(
        self,
        tower: Tower,
        pruner: Pruner,
        inputs: PruneInputs,
        keep: tuple[int, ...],
        timer: Timer,
        start: PruneOutput | None = None,
    ) -> None:
        """Plan the pass.

        Args:
            tower: A plain ViT.
            pruner: Of the vision stage.
            inputs: The patches of the images; their features are not looked at.
            keep: (R) tokens that the last block leaves of each image.
            timer: Of what the pruner takes.
            start: Which patches of each picture ``inputs`` are, where an input stage left some; None: all.

        Raises:
            PruneZooError: As :func:`check_vision_stage` does.
        """
        check_vision_stage(tower, pruner)
        blocks = pruner.stages(tower.depth)
        self.tower, self.pruner = tower, pruner
        asked, found = (torch.tensor(counts, dtype=torch.long) for counts in (keep, inputs.counts))
        self.steps = dict(zip(blocks, pruner.steps(asked, found, tower.depth), strict=True))
        """By block, how many tokens it leaves of each image as scheduled, ``(R,)`` on the host."""
        self.patches, self.alive = inputs, inputs
        self.owner = torch.arange(inputs.valid.shape[1], device=inputs.valid.device).masked_fill(~inputs.valid, -1)
        """``(R, N)``: the token that each patch went into, -1 for none."""
        self.mask: Tensor | None = None  # (R, 1, 1, P + M) for the attention of the blocks to come
        self.dropped: Tensor | None = None  # (R, N, D) for `restore`: what dropped patches were when they were dropped
        self.back: Tensor | None = None  # (R, N, M) instead: shares of tokens that make each patch again
        self.heads: Tensor | None = None  # (R, H): which heads give something in the blocks to come
        self.left: dict[int, tuple[int, ...]] = {}  # tokens of each image behind blocks where the pruner has acted
        self.timer, self.start = timer, start
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        """Put the hooks on."""
        with self.stack:  # which takes them off again if one of them cannot be put on
            self._hook_rows()
            for block in range(self.tower.depth):
                attention = self.tower.attention(block)
                self._hook(getattr(attention.module, attention.joiner).register_forward_pre_hook, self._silence)
            for block in self.steps:
                tap = self.stack.enter_context(VisionTap(self.tower, block, self.pruner.needs))
                (self._act_behind if self.pruner.after_block else self._act_inside)(block, tap)
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Take them off."""
        self.stack.close()

    def _hook_rows(self) -> None:
        """Hook what lets blocks run on fewer tokens."""
        if self.start is not None:
            self._hook(self.tower.blocks[0].register_forward_pre_hook, self._begin)
        for block in range(0 if self.start is not None else min(self.steps) + 1, self.tower.depth):
            attention = self.tower.attention(block).module
            self._hook(attention.register_forward_pre_hook, self._add_mask, with_kwargs=True)
        if self.pruner.restore:  # put in front before the hooks of `_act_…` are, it comes behind them
            self._hook(self.tower.blocks[self.tower.depth - 1].register_forward_hook, self._restore, prepend=True)

    def output(self, features: Tensor) -> PruneOutput:
        """What is left after the pass.

        Args:
            features: ``(R, K, D)``, what was made, for the language model, of the tokens that left the tower; K is N
                where the pruner says `restore`.
        """
        blocks = self._work()
        if self.pruner.restore:
            counts = self.patches.counts
            index, valid = mask_to_index(self.patches.valid, max(counts))
            return PruneOutput(index, valid, gather_rows(features, index), known=counts, blocks=blocks)
        sizes, width = (self.owner >= 0).float(), features.shape[1]
        index, valid, groups = place_groups(self.owner, self.patches.cells, sizes, width, max(self.alive.counts))
        order = gather_rows(self.owner, index).clamp_min(0)
        features = gather_rows(features, order)
        return PruneOutput(index, valid, features, groups=groups, known=self.alive.counts, blocks=blocks)

    def _work(self) -> Tensor:
        """``(R, blocks, 2)`` long: tokens in the attention and in the MLP of each block."""
        found, blocks = self.patches.counts, []
        for block in range(self.tower.depth):
            left = self.left.get(block, found)
            blocks.append((found, found if self.pruner.after_block else left))
            found = left
        return torch.tensor(blocks).permute(2, 0, 1)

    def _hook(self, register: Callable[..., Any], hook: Callable[..., Any], **options: Any) -> None:
        self.stack.callback(register(hook, **options).remove)

    def _begin(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Take out what an input stage did not leave."""
        assert self.start is not None  # else the hook is not on
        hidden, prefix = args[0], self.tower.prefix
        self.mask = self._make_mask(hidden.dtype)
        return (torch.cat([hidden[:, :prefix], gather_rows(hidden[:, prefix:], self.start.index)], 1), *args[1:])

    def _act_behind(self, block: int, tap: VisionTap) -> None:
        """Hook a block so that its output gets shorter."""

        def shorten(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            return self._prune(block, tap, output)

        # In front of the hooks with which transformers records hidden states: the projector reads such a record.
        self._hook(self.tower.blocks[block].register_forward_hook, shorten, prepend=True)

    def _act_inside(self, block: int, tap: VisionTap) -> None:
        """Hook a block so that its MLP gets less, and the block hands on what the MLP made."""
        norm, mlp = self.tower.mlp(block)
        fewer: list[Tensor] = []  # h', and what the MLP makes of it

        def give_less(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
            fewer.clear()
            shorter = self._prune(block, tap, args[0])
            if shorter is None:
                return None
            fewer.append(shorter)
            return (shorter,)

        def hold(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            if not fewer:
                return None
            fewer.append(output)
            return output.new_zeros(())  # what the block can add to the whole of h, to no effect

        def hand_on(_module: nn.Module, _args: Any, _output: Tensor) -> Tensor | None:
            return fewer[0] + self.tower.scaled(block, fewer[1]) if fewer else None

        self._hook(norm.register_forward_pre_hook, give_less)
        self._hook(mlp.register_forward_hook, hold)
        self._hook(self.tower.blocks[block].register_forward_hook, hand_on, prepend=True)

    def _prune(self, block: int, tap: VisionTap, hidden: Tensor) -> Tensor | None:
        """Ask the pruner: ``(R, P + K, D)`` for ``hidden (R, P + M, D)``; None where it keeps everything."""
        signals = {name: self._signal(tap, name) for name in self.pruner.needs}
        step = list(self.steps).index(block)
        inputs = replace(self.alive, features=self._states(hidden), signals=signals, step=step)
        inputs = replace(inputs, layer=block, depth=self.tower.depth)
        with self.timer.running():
            output = self.pruner(inputs, self.pruner.step(inputs, self.steps[block], len(self.steps) - 1 - step))
        self.heads, self.left[block] = output.heads, output.counts
        if output.counts == inputs.counts:
            self.alive = replace(self.alive, carry=output.carry)
            return None
        return self._shorten(hidden, inputs, output)

    def _signal(self, tap: VisionTap, name: str) -> Tensor:
        """Of the tokens alive."""
        return tap.read(name)

    def _states(self, hidden: Tensor) -> Tensor:
        """``(R, M, D)``: of the tokens alive."""
        return hidden[:, self.tower.prefix :]

    def _shorten(self, hidden: Tensor, inputs: PruneInputs, output: PruneOutput) -> Tensor:
        """What is left of ``hidden``, which is noted."""
        prefix = self.tower.prefix
        groups = kept_groups(output, hidden.shape[1] - prefix) if output.groups is None else output.groups
        before, self.owner = self.owner, torch.where(self.owner < 0, -1, groups.gather(1, self.owner.clamp_min(0)))
        if output.back is not None:
            self.back = output.back if self.back is None else self.back @ output.back
        elif self.pruner.restore:
            states = gather_rows(hidden[:, prefix:], before.clamp_min(0))
            gone = ((before >= 0) & (self.owner < 0))[..., None]
            self.dropped = states if self.dropped is None else states.where(gone, self.dropped)
        self.alive = inputs.after(output)
        self.mask = self._make_mask(hidden.dtype)
        return torch.cat([hidden[:, :prefix], self.alive.features], 1)

    def _restore(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        """``(R, P + N, D)`` for ``output (R, P + K, D)``; None where nothing went."""
        prefix, own = self.tower.prefix, self.owner[..., None]
        left = output[:, prefix:]
        if self.back is not None:
            states = self.back.to(output.dtype) @ left
        elif self.dropped is not None:
            states = gather_rows(left, self.owner.clamp_min(0)).where(own >= 0, self.dropped)
            made = self.pruner.recover(self.dropped, left, self.alive.valid)
            if made is not None:
                whole = self.alive.valid.sum(1) == self.patches.valid.sum(1)
                states = states.where(whole[:, None, None], made.to(states.dtype))
        else:
            return None
        return torch.cat([output[:, :prefix], states], 1)

    def _make_mask(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to attention logits: log(size), and the lowest number for filler; None if nothing is."""
        valid, sizes = self.alive.valid, self.alive.sizes
        if sizes is None and len(set(self.alive.counts)) == 1:
            return None
        kernel = self.tower.kernel
        if kernel not in ("sdpa", "eager"):
            raise PruneZooError(
                f"pruner '{self.pruner.name}' needs attn_implementation 'sdpa' or 'eager' in the vision tower, which "
                f"has '{kernel}': it weighs merged tokens by size, or keeps different numbers of tokens in a batch"
            )
        sizes = torch.ones(valid.shape, device=valid.device) if sizes is None else sizes.float()
        weight = sizes.clamp_min(torch.finfo(torch.float32).tiny).log().to(dtype)
        weight = weight.masked_fill(~valid, torch.finfo(dtype).min)
        return functional.pad(weight, (self.tower.prefix, 0))[:, None, None]

    def _silence(self, _module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """What the heads of a block give, before they are joined: 0 for those that are out."""
        if self.heads is None:
            return None
        given = args[0].unflatten(-1, (self.heads.shape[1], -1))
        return (given.masked_fill(~self.heads[:, None, :, None], 0).flatten(-2),)

    def _add_mask(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        return None if self.mask is None else (args, {**kwargs, "attention_mask": self.mask})
