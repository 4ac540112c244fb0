"""``with attach(vlm, pruner, keep=64): vlm.generate(...)``: prune inside a model that somebody else calls.

What is on the model meanwhile is :mod:`call`'s; who may have it, :mod:`hold`'s. Here it is put on and taken off, whole,
whatever interrupts that.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Self

from ..core.budgets import Keep, read_keep
from ..core.contract import Pruner
from ..core.errors import PruneZooError
from ..core.registry import load_pruner
from ..core.roles import ChatMarkers, TextEncoder
from .call import Calls
from .hold import Hold
from .parts.hooks import copy_error, remove_hooks
from .parts.model import VLM, execution_device
from .run import split_parts
from .stages.prompt import Positions
from .stats import AttachStats

log = logging.getLogger(__name__)
Attachable = Pruner | str | Path
PASSING_BY = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""Methods of a model that run its parts in a way of their own."""


def spread(keep: Any, count: int) -> Sequence[Any]:
    """A ``keep`` for each of so many pruners."""
    keeps = keep if isinstance(keep, list | tuple) else [keep]
    if len(keeps) != count or (count > 1 and keeps is not keep):
        raise PruneZooError(f"{count} pruners need a list of {count} keeps, got {keep!r}")
    return keeps


class Attached(Calls):
    """Pruners for a model, on it from :meth:`enable` to :meth:`disable`; what a ``with attach(...)`` block is given."""

    def __init__(
        self,
        vlm: VLM,
        pruners: Sequence[Pruner],
        keeps: Sequence[Any],
        positions: Positions,
        markers: ChatMarkers | None,
        text_encoder: TextEncoder | None,
        timeout: float | None,
        clips: bool = False,
    ) -> None:
        """Change nothing yet; ``timeout`` is that of :meth:`enable`, in seconds."""
        super().__init__(vlm, pruners, keeps, positions, markers, text_encoder, clips)
        self.timeout = timeout

    @property
    def keep(self) -> Any:
        """What is kept, as in :func:`attach`; may be set between calls."""
        return self.keeps[0] if len(self.given) == 1 else tuple(self.keeps)

    @keep.setter
    def keep(self, keep: Any) -> None:
        self.check_between_calls()
        new = [read_keep(one) for one in spread(keep, len(self.given))]
        early, layer = split_parts(self.parts(new), self.depth)
        try:
            self._turn.take()
            self.keeps, self.early = new, early
            if self.layers and layer:
                self.layers.plan = replace(self.layers.plan, keep=layer[1])
        finally:
            self._turn.give()

    def reset(self, *streams: Hashable) -> None:
        """Have pruners that remember forget these streams, or all: what comes next is the first of its stream."""
        self.memory.reset(*streams)

    def enable(self) -> Self:
        """Put the pruners on the model.

        Raises:
            PruneZooError: This thread put some on it already, or a thread that has it did not leave it in time.
        """
        hold = Hold(self.vlm, self, self._turn)
        try:
            hold.take(self.timeout)
            self._put_on(hold.undo)
            return self
        except BaseException:
            hold.leave()
            raise

    def disable(self) -> None:
        """Take them off; the model is what it was. Without effect where they are not on it."""
        self.check_between_calls()
        hold = Hold.on(self.vlm)
        if hold is not None and hold.owner is self:
            try:
                hold.leave()
            finally:
                hold.leave()  # what an interrupt left of it

    def _put_on(self, undo: list[Callable[[], Any]]) -> None:
        """Put everything on the model, each time after what takes it off again has been added to ``undo``."""
        vlm, device, names = self.vlm, execution_device(self.vlm), vars(self.vlm)
        undo.append(self.memory.reset)
        for pruner in self.pruners:
            # A part may be in another mode than the whole.
            undo += [partial(setattr, module, "training", module.training) for module in pruner.modules()]
            pruner.to(device).eval()
        for pruner in self.pruners:
            context = pruner.adapt(vlm)
            context.__enter__()
            undo.append(partial(context.__exit__, None, None, None))
            undo.append(partial(pruner.go_on, False))
        if self.layers:
            undo.append(partial(self.layers.__exit__))
            self.layers.__enter__()
        undo.append(partial(remove_hooks, vlm, self))
        vlm.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        vlm.register_forward_hook(self._after_forward, always_call=True)
        self._shadowed = names.get("generate")
        own = {"generate": self.generate, **dict.fromkeys(PASSING_BY, self._refuse_batches)}
        undo += [partial(names.pop, name, None) for name in own if name not in names]
        undo += [partial(names.__setitem__, name, names[name]) for name in own if name in names]
        names.update(own)

    def _refuse_batches(self, *_: Any, **__: Any) -> NoReturn:
        """Stands before the ways of generating that no hook sees."""
        raise PruneZooError(f"{', '.join(PASSING_BY)} cannot be pruned: call `generate`, or leave the block first")

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        """No copy of the model is made."""
        raise copy_error()


class Attachment:
    """A ``with`` block of :func:`attach`. One that an interrupt kept from leaving leaves when it is forgotten."""

    def __init__(self, attached: Attached) -> None:
        self._attached, self._entered, self._used = attached, False, False

    def __enter__(self) -> Attached:
        """Attach."""
        self._entered = self._used = True
        return self._attached.enable()

    def __exit__(self, *_: object) -> None:
        """Detach, when a call of another thread that is under way has ended; the model is what it was."""
        self._attached.disable()
        self._entered = False

    def __del__(self) -> None:
        """Make good what was left undone, or say that nothing was done."""
        if getattr(self, "_entered", False):
            self._attached.disable()
        elif not getattr(self, "_used", True):
            log.warning("attach(...) changed nothing: write `with attach(...):`, or call its enable()")

    def enable(self) -> Attached:
        """See :meth:`Attached.enable`; until :meth:`disable`, without a block."""
        self._used = True
        return self._attached.enable()

    def disable(self) -> None:
        """See :meth:`Attached.disable`."""
        self._attached.disable()

    @property
    def stats(self) -> AttachStats:
        """What was done so far."""
        return self._attached.stats

    @property
    def keep(self) -> Any:
        """See :attr:`Attached.keep`."""
        return self._attached.keep

    @keep.setter
    def keep(self, keep: Any) -> None:
        self._attached.keep = keep


def attach(
    vlm: VLM,
    pruner: Attachable | Sequence[Attachable],
    keep: Keep | Sequence[Keep],
    positions: Positions = "original",
    markers: ChatMarkers | None = None,
    text_encoder: TextEncoder | None = None,
    timeout: float | None = None,
    clips: bool = False,
) -> Attachment:
    """Prune the visual tokens of every call of a model inside a ``with`` block.

    ``vlm.generate(**inputs)`` and ``vlm(**inputs)`` are called as always: batches padded on either side, samples with
    no image or several, sampling, beams, several returned sequences, assisted decoding, and going on with a dialogue on
    the cache that an earlier call filled (inside this block; or, unless the layer stage cut it, a later one). Threads
    take turns: with the calls inside a block, and with blocks on one model. Without a block, `enable()` attaches until
    `disable()`. `generate` returns sequences that begin with the caller's own prompt; a direct call returns logits of
    the shorter prompt (labels are shortened alike, for the loss).

    Args:
        vlm: A supported model, perhaps with PEFT adapters around it.
        pruner: A pruner, or what :func:`load_pruner` takes; or several, of the input, vision, prompt and layer
            stage in turn, one of each at most. They are moved to the model's device and run in eval mode.
        keep: Tokens per image (int), or a share of them (float in (0, 1]); one for each pruner where there are several.
            A share, also as "1/9", is of the tokens that the stage finds. In the layer stage it is what the last of
            its layers leaves. "auto", and "auto:64" for a mean of 64 over images, are for pruners that set budgets.
        positions: "original": the tokens left keep their position ids. "compact": they are numbered anew.
        markers: For pruners that ask what a word of the prompt is, question or template: ``chat_markers(processor)``.
        text_encoder: For pruners that need `text_features`: from ids ``(B, L)``, and which are the question, to
            ``(B, E)``; and with a method that makes `image_features`, as :class:`ClipText` has, for those that need it.
        timeout: Seconds to wait for another thread to leave this model; None: as long as it takes.
        clips: The images of each prompt are the frames of one clip: a pruner of the prompt or layer stage sees them
            together, as one image of many tiles, and ``keep`` is of the clip.

    Returns:
        A context manager; its ``stats`` tell the tokens before and after each stage, KV bytes saved, and seconds; its
        ``keep`` may be set between calls. For a pruner that remembers, ``memory.streams`` names the stream of each
        sample of a batch, and ``reset()`` forgets.

    Raises:
        PruneZooError: Unsupported family or stage, a pruner of another model, ``keep`` out of range, unknown
            ``positions``.
    """
    given = [pruner] if isinstance(pruner, Pruner | str | Path) else list(pruner)
    keeps = [keep] if isinstance(pruner, Pruner | str | Path) else spread(keep, len(given))
    loaded = [one if isinstance(one, Pruner) else load_pruner(one) for one in given]
    return Attachment(Attached(vlm, loaded, keeps, positions, markers, text_encoder, timeout, clips))
