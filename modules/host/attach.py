"""``with attach(vlm, pruner, keep=64): vlm.generate(...)``: prune inside a model that somebody else calls.

Mechanism, for transformers 5.6 and later: no forward is replaced, no class is touched. While attached, the model has

* one **forward pre-hook with keywords**: a call that brings pixels is rewritten to the shorter prompt;
* one **instance attribute** ``generate`` that stands before the class's own: it rewrites the prompt *before* the
  generation loop starts and hands on to the class's method. So everything in that loop (cache length, beams, static
  caches, chunked prefill, prompt look-up) sees a prompt that simply is shorter, and nothing has to be repaired at
  decode steps. It then puts the caller's own prompt back in front of what was generated. Logits processors and
  streamers that look at the prompt see the shorter one.

A pre-hook alone would also do, with masks mended at every decode step, but then each cache length that the loop
computes from the caller's ids would be wrong, silently so where it crops a cache. Both are taken off on leaving.
"""

import inspect
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.contract import Keep, PruneOutput, Pruner, check_keep
from ..core.errors import PruneZooError
from ..core.plan import KeepPlan
from ..core.registry import load_pruner
from .encoded import Encoded, encode
from .families import PIXELS, find_family
from .prompt import Positions, check_positions, shorten_prompt
from .signals import check_signals, encode_needs
from .vision import check_vision_stage, choose


@dataclass
class AttachStats:
    """What an attached pruner did so far. One entry for each image, in the order of the calls."""

    stage: str
    before: list[int] = field(default_factory=list)  # tokens of the image
    after: list[int] = field(default_factory=list)  # tokens left of it
    seconds: float = 0.0  # in the pruner itself, without vision tower and language model

    def __str__(self) -> str:
        if not self.before:
            return f"{self.stage} stage: no images so far"
        before, after = sum(self.before), sum(self.after)
        return (
            f"{self.stage} stage: {len(self.before)} images, {before} -> {after} tokens "
            f"({100 * after / before:.1f} %), {self.seconds:.3f} s in the pruner"
        )


class Attachment:
    """A pruner on a model, from ``__enter__`` to ``__exit__``; made by :func:`attach`."""

    def __init__(self, vlm: PreTrainedModel, pruner: Pruner, keep: Keep, positions: Positions) -> None:
        """Check everything that can be checked before a call; change nothing yet."""
        find_family(vlm)
        check_keep(keep)
        check_signals(pruner.needs)
        check_positions(positions)
        if pruner.stage == "layer":
            raise PruneZooError(f"pruner '{pruner.name}' is of the layer stage, which attach does not take")
        if pruner.stage == "vision":
            check_vision_stage(find_family(vlm).tower(), pruner)
        self.vlm, self.pruner, self.keep, self.positions = vlm, pruner, keep, positions
        self.stats = AttachStats(pruner.stage)
        self._handles: list[Any] = []
        self._shadowed: Any = None  # a `generate` that somebody else had put on the instance
        self._was_training = False
        self._running: KeepPlan | None = None  # the plan of the `generate` call that is under way
        self._encoding = False  # the call under way is our own, to compute signals
        self._shortened = False  # the direct call under way is on a shorter prompt
        self._short_caches: WeakSet[Any] = WeakSet()  # caches that are shorter than their callers' ids

    def __enter__(self) -> Self:
        """Attach."""
        self._shadowed = vars(self.vlm).get("generate")
        if isinstance(getattr(self._shadowed, "__self__", None), Attachment):
            raise PruneZooError("this model has a pruner attached already: leave the other `with attach(...)` first")
        self._was_training = self.pruner.training
        self.pruner.to(self.vlm.device).eval()
        self._handles = [
            self.vlm.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.vlm.register_forward_hook(self._after_forward),
        ]
        vars(self.vlm)["generate"] = self.generate
        return self

    def __exit__(self, *_: object) -> None:
        """Detach; the model is what it was."""
        for handle in self._handles:
            handle.remove()
        del vars(self.vlm)["generate"]
        if self._shadowed is not None:
            vars(self.vlm)["generate"] = self._shadowed
        self.pruner.train(self._was_training)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate`` on the shorter prompt; what it returns begins with the caller's own prompt."""
        own = self._shadowed or type(self.vlm).generate.__get__(self.vlm)
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if not self._has_images(kwargs):
            return own(None, *args, **kwargs)
        if kwargs.get("attention_mask") is None and len(kwargs["input_ids"]) > 1:
            raise PruneZooError("a batch may be padded: pass the processor's attention_mask to generate")
        with torch.no_grad():
            encoded, output = self._prune(kwargs)
            shorter, _, plan = shorten_prompt(self.vlm, encoded, output, self.positions, generating=True)
        self._move_lengths(shorter, encoded.mask.shape[1] - plan.index.shape[1])
        config = kwargs.get("generation_config") or self.vlm.generation_config
        if "inputs_embeds" in shorter and (kwargs.get("prefill_chunk_size") or config.prefill_chunk_size):
            raise PruneZooError("prefill_chunk_size with images needs transformers 5.19 or later while pruning")
        self._running = plan
        try:
            result = own(None, *args, **shorter)
        finally:
            self._running = None
        if plan.identity:
            return result
        prompt = encoded.batch["input_ids"]
        if isinstance(result, Tensor):
            return _restore_prompt(result, prompt, plan)
        result.sequences = _restore_prompt(result.sequences, prompt, plan)
        self._remember_cache(result)
        return result

    def _prune(self, batch: Mapping[str, Any]) -> tuple[Encoded, PruneOutput]:
        """Encode the images of a call and prune them, and count."""
        self._encoding = True
        try:
            encoded = encode(self.vlm, batch, encode_needs(self.pruner), run_tower=self.pruner.stage != "vision")
        finally:
            self._encoding = False
        start = _now(self.vlm.device)
        output = choose(self.vlm, encoded, self.pruner, self.keep)
        self.stats.seconds += _now(self.vlm.device) - start
        self.stats.before += encoded.tokens.tolist()
        self.stats.after += encoded.tokens_left(output).tolist()
        return encoded, output

    def _before_forward(self, _vlm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Rewrite a direct call; inside `generate` only guard against the packed-sequence reading."""
        if self._encoding:  # a signal looks into the language model, which reads all tokens for it
            return args, kwargs
        if args:
            names = list(inspect.signature(type(self.vlm).forward).parameters)[1:]
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        if self._running is not None:
            # `generate` drops a mask of ones; without mask and cache, gaps in the positions would be read as the seams
            # of packed sequences.
            bare = kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is None
            if bare and not self._running.identity:
                kwargs = {**kwargs, "attention_mask": torch.ones_like(kwargs["input_ids"])}
            return (), kwargs
        self._shortened = False
        if self._has_images(kwargs):
            encoded, output = self._prune(kwargs)
            kwargs, labels, plan = shorten_prompt(self.vlm, encoded, output, self.positions)
            kwargs["labels"] = labels
            self._shortened = not plan.identity
        return (), kwargs

    def _after_forward(self, _vlm: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """Remember the cache that a direct call on a shorter prompt has filled."""
        if self._running is None and self._shortened:
            self._remember_cache(output)

    def _remember_cache(self, output: Any) -> None:
        if getattr(output, "past_key_values", None) is not None:
            self._short_caches.add(output.past_key_values)

    def _has_images(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call brings pixels; what cannot be pruned rightly is refused, since it would fail silently."""
        cache = kwargs.get("past_key_values")
        if cache is not None and cache in self._short_caches:
            raise PruneZooError("this cache holds a pruned prompt: pass the whole conversation without past_key_values")
        if all(kwargs.get(pixels) is None for pixels in PIXELS.values()):
            if kwargs.get("mm_encoder_outputs"):
                raise PruneZooError("an attached pruner needs pixel_values, not mm_encoder_outputs")
            return False
        if cache is not None and cache.get_seq_length() > 0:
            raise PruneZooError("images cannot be added to a filled cache while pruning: pass the whole conversation")
        return True

    def _move_lengths(self, kwargs: dict[str, Any], dropped: int) -> None:
        """Lengths that count the prompt, given for the caller's, become those for the shorter one."""
        config = kwargs.get("generation_config") or self.vlm.generation_config
        for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            value = kwargs.get(total) or getattr(config, total)
            if value and not (kwargs.get(new) or getattr(config, new)):
                kwargs[total] = max(value - dropped, 0)


def attach(
    vlm: PreTrainedModel, pruner: Pruner | str | Path, keep: Keep, positions: Positions = "original"
) -> Attachment:
    """Prune the visual tokens of every call of a model inside a ``with`` block.

    ``vlm.generate(**inputs)`` and ``vlm(**inputs)`` are called as always: batches padded on either side, samples with
    no image or several, beams, several returned sequences. `generate` returns sequences that begin with the caller's
    own prompt; a direct call returns logits of the shorter prompt (labels are shortened alike, for the loss).

    Args:
        vlm: A supported model (now: LLaVA).
        pruner: A pruner, or what :func:`load_pruner` takes. It is moved to the model's device and runs in eval mode.
        keep: Tokens per image (int), or a share of them (float in (0, 1]).
        positions: "original": the tokens left keep their position ids. "compact": they are numbered anew.

    Returns:
        A context manager; its ``stats`` tell the tokens before and after and the seconds in the pruner.

    Raises:
        PruneZooError: Unsupported family or stage, ``keep`` out of range, unknown ``positions``.
    """
    return Attachment(vlm, pruner if isinstance(pruner, Pruner) else load_pruner(pruner), keep, positions)


def _restore_prompt(sequences: Tensor, prompt: Tensor, plan: KeepPlan) -> Tensor:
    """Sequences ``(B * copies, S + new)`` with the caller's prompt ``(B, L)`` in place of the shorter one."""
    copies = len(sequences) // len(prompt)
    return torch.cat([prompt.repeat_interleave(copies, 0), sequences[:, plan.index.shape[1] :]], dim=1)


def _now(device: torch.device) -> float:
    """Seconds on a clock, with the device's queue run empty."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
