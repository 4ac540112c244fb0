"""What is on a model while pruners are attached: its calls rewritten, counted, and taken in turns.

Mechanism, for transformers 5.6 and later: no forward is replaced, no class is touched. While attached, the model has

* one **forward pre-hook with keywords**: a call that brings pixels is rewritten to the shorter prompt;
* one **instance attribute** ``generate`` that stands before the class's own: it rewrites the prompt *before* the
  generation loop starts and hands on to the class's method. So everything in that loop (cache length, beams, static
  caches, chunked prefill, prompt look-up) sees a prompt that simply is shorter, and nothing has to be repaired at
  decode steps. It then puts the caller's own prompt back in front of what was generated. Logits processors,
  stopping criteria and streamers that look at the prompt see the shorter one;
* for the layer stage, pre-hooks on decoder layers; see :mod:`layers`. There the prompt keeps its length outside.

A pre-hook alone would also do for the stages in front of the language model, with masks mended at every decode step,
but then each cache length that the loop computes from the caller's ids would be wrong, silently so where it crops a
cache. All is taken off on leaving.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..core.base_model import check_base_model
from ..core.budgets import Keep, read_keep
from ..core.checks import Check, deferred, settle
from ..core.contract import Pruner
from ..core.errors import PruneZooError
from ..core.memory import Memory
from ..core.roles import ChatMarkers, TextEncoder
from .conversation import WHOLE, ShortPrompt, check_unnoted, go_on, note, noted, restore_prompt
from .encode import encode
from .encoded import Encoded
from .families import PIXELS, find_family
from .hold import Hold, Turn
from .parts.model import VLM, find_cache
from .run import check_parts, reduce_early, split_parts
from .signals.language import encode_needs
from .stages.cut import Cut
from .stages.layer import LayerStage
from .stages.layer_prompt import Prompt
from .stages.prompt import Positions, check_positions
from .stats import AttachStats, StageStats, kv_bytes_saved

ASSISTANTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
"""Options of `generate` that bring candidates to take or leave."""


@dataclass(frozen=True)
class Running:
    """A call under way whose prompt has images."""

    encoded: Encoded  # as the language model is given it
    cuts: tuple[Cut, ...]  # of the stages before
    length: int  # columns of the caller's prompt
    rewritten: bool  # it is not the caller's prompt any more
    checks: Sequence[Check]  # to be settled when the prompt has been read

    @property
    def width(self) -> int:
        """Columns of it."""
        return self.encoded.mask.shape[1]

    def begins(self, ids: Tensor) -> bool:
        """Whether ``ids (B * copies, …)`` begin with it."""
        own = self.encoded.batch["input_ids"]
        return torch.equal(ids[:, : self.width], own.repeat_interleave(max(len(ids) // len(own), 1), 0))

    @property
    def dropped(self) -> int:
        """Columns by which it is shorter."""
        return self.length - self.width


class Calls:
    """The calls of a model while pruners are attached to it."""

    def __init__(
        self,
        vlm: VLM,
        pruners: Sequence[Pruner],
        keeps: Sequence[Any],
        positions: Positions,
        markers: ChatMarkers | None = None,
        text_encoder: TextEncoder | None = None,
        clips: bool = False,
    ) -> None:
        """Check everything that can be checked before a call; change nothing yet."""
        family = find_family(vlm)
        vlm, self.depth = family.vlm, family.decoder().depth  # without what PEFT or torch.compile put around it
        check_positions(positions)
        for pruner in pruners:
            check_base_model(pruner.name, pruner.base_model, vlm)
        self.vlm, self.positions = vlm, positions
        self.given, self.keeps = list(pruners), [read_keep(keep) for keep in keeps]
        parts = self.parts(self.keeps)
        check_parts(family, parts)
        self.early, layer = split_parts(parts, self.depth)
        self.memory, self.text, self.clips = Memory(), (markers, text_encoder), clips
        self.layers = LayerStage(vlm, *layer, positions, memory=self.memory) if layer else None
        self.needs = tuple(dict.fromkeys(name for pruner, _ in parts for name in encode_needs(pruner)))
        self.pruners = list(dict.fromkeys([*pruners, *(pruner for pruner, _ in parts)]))
        stages = [StageStats(p.name, p.stage, 0 if p.stage == "layer" else None) for p, _ in self.early]
        if self.layers:
            stages += [StageStats(self.layers.plan.pruner.name, "layer", number) for number in self.layers.plan.stages]
        self.stats = AttachStats(stages)
        self._turn = Turn()  # hooks tell of one call at a time
        self._shadowed: Any = None  # a `generate` that somebody else had put on the instance
        self._encoding = False  # the call under way is our own, to compute signals
        self._inside: int | None = None  # a `generate` call is under way, in this thread
        self._generating: Running | None = None  # it is on a prompt with images
        self._filling: Running | None = None  # the first forward on such a prompt is under way
        self._rows = 0  # of that forward
        self._prompt: Prompt | None = None  # what the layer stage does to it

    def parts(self, keeps: Sequence[Keep]) -> list[tuple[Pruner, Keep]]:
        """What the pruners consist of, each with its own ``keep``, which is checked."""
        parts = [part for pruner, keep in zip(self.given, keeps, strict=True) for part in pruner.parts(keep)]
        for pruner, keep in parts:
            pruner.check_keep(keep)
        return parts

    def check_between_calls(self) -> None:
        """Refuse what would change a call that is under way."""
        if self._inside == get_ident():
            raise PruneZooError("this call of `generate` is under way: change what is attached when it has ended")

    @property
    def is_attached(self) -> bool:
        """Whether the model has these pruners now."""
        hold = Hold.on(self.vlm)
        return hold is not None and hold.owner is self

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate`` on the shorter prompt; what it returns begins with the caller's own prompt."""
        within = self._inside == get_ident()  # of a call from whose streamer or criteria this one comes
        try:
            self._turn.take()
            if not self.is_attached:
                raise PruneZooError("this `generate` is of a block that has been left: take vlm.generate anew")
            return self._generate(inputs, *args, **kwargs)
        finally:
            if not within:
                self._turn.give()

    def _generate(self, inputs: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """Of one thread at a time."""
        own = self._shadowed or type(self.vlm).generate.__get__(self.vlm)
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if args:
            kwargs["generation_config"], args = args[0], args[1:]
        prompt, short, running = kwargs.get("input_ids"), self._short_prompt(kwargs), None
        rows = 0 if prompt is None else len(prompt)
        before, after = 0, 0  # columns that stand for each other: the caller's, and those of the shorter prompt
        with torch.no_grad():
            images = self._has_images(kwargs)
            if (images or short) and kwargs.get("attention_mask") is None and rows > 1:
                raise PruneZooError("a batch may be padded: pass the processor's attention_mask to generate")
            if images:
                running, kwargs = self._reduce(kwargs, generating=True)
                if running.rewritten:
                    before, after = running.length, kwargs["input_ids"].shape[1]
            elif short is not None:
                mask = kwargs.get("attention_mask")
                whole = mask is None or prompt is None or mask.shape[1] == prompt.shape[1]
                kwargs = go_on(kwargs, short, generating=True, whole=whole)
                if whole:
                    before, after = short.length, short.ids.shape[1]
        self._check_options(kwargs)
        self._move_lengths(kwargs, before - after)
        outer = (self._inside, self._generating, self._filling) if self._inside else (None, None, None)
        self._inside, self._generating, self._filling = get_ident(), running, running
        try:
            result = own(None, *args, **kwargs)
        finally:
            self._inside, self._generating, self._filling = outer
        if not before:
            return result
        assert prompt is not None  # without ids there are no images and no short prompt
        if isinstance(result, Tensor):
            return restore_prompt(result, prompt[:, :before], after)
        result.sequences = restore_prompt(result.sequences, prompt[:, :before], after)
        return result

    def _reduce(self, kwargs: Mapping[str, Any], generating: bool) -> tuple[Running, dict[str, Any]]:
        """Encode the images of a call and prune before the language model: what is run now, and with what."""
        self._encoding = True
        try:
            # Pruners of the input and vision stage run the tower themselves. What others need is of all tokens that
            # the tower sees.
            stages = {pruner.stage for pruner, _ in self.early}
            alone = "input" in stages or (not self.needs and "vision" in stages)
            needs = () if alone else self.needs
            encoded = encode(self.vlm, kwargs, needs, not alone, *self.text, clips=self.clips)
            with deferred() as checks:
                early = reduce_early(self.vlm, encoded, self.early, self.positions, generating, self.memory, self.needs)
        finally:
            self._encoding = False
        rewritten = not all(plan.identity for plan in early.plans)
        running = Running(early.encoded, early.cuts, encoded.mask.shape[1], rewritten, checks)
        return running, early.encoded.model_inputs(self.vlm, generating)

    @torch.compiler.disable
    def _before_forward(self, _vlm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Rewrite a direct call; inside `generate` only guard against the packed-sequence reading. Tell the layers."""
        if self._inside not in (None, get_ident()):
            raise PruneZooError("another thread generates with this model: call it directly when that has ended")
        self._turn.take()  # given back behind the forward
        if self._encoding:  # a signal looks into the language model, which reads all tokens for it
            if self.layers:
                self.layers.pass_by()
            return args, kwargs
        if args:
            names = list(inspect.signature(type(self.vlm).forward).parameters)[1:]
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = kwargs.get("past_key_values")
        filled = cache is not None and cache.get_seq_length() > 0
        if cache is not None and not filled:  # it may be an old one, emptied
            note(cache, None)
            if self.layers:
                self.layers.pasts.pop(cache, None)
        running = None if filled else self._generating
        if self._inside:
            if any(kwargs.get(pixels) is not None for pixels in PIXELS.values()):
                raise PruneZooError("within `generate`, in a streamer or criteria, ask the model by `generate` too")
            ids = kwargs.get("input_ids")
            if running is not None and cache is None and ids is not None and not running.begins(ids):
                running = None  # the first step without this prompt, or with a negative one, to guide by
            # `generate` drops a mask of ones; without mask and cache, gaps in the positions would be read as the seams
            # of packed sequences.
            bare = kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is None
            if bare and running is not None and running.rewritten:
                kwargs = {**kwargs, "attention_mask": torch.ones_like(kwargs["input_ids"])}
        elif self._has_images(kwargs):
            if isinstance(kwargs.get("logits_to_keep"), Tensor):
                raise PruneZooError("logits_to_keep as a tensor counts columns that pruning moves: give a number, or 0")
            running, kwargs = self._reduce(kwargs, generating=False)
            self._filling = running
            if running.encoded.labels is not None:
                kwargs["labels"] = running.encoded.labels.clone()
        else:
            self._filling, short = None, self._short_prompt(kwargs)
            if short is not None:
                kwargs = go_on(kwargs, short, generating=False, whole=False)
        given = kwargs.get("input_ids")
        self._rows = len(kwargs["inputs_embeds"] if given is None else given) if running is not None else 0
        if self.layers:
            if running is not None:
                self._prompt = self.layers.prefill(running.encoded, kwargs.get("labels"))
            elif filled:
                self.layers.resume(cache, kwargs.get("attention_mask"))
            else:
                self.layers.pass_by()
        return (), kwargs

    @torch.compiler.disable
    def _after_forward(self, _vlm: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """Behind a forward, also one that failed (``output`` is None): give the turn back, count what was pruned."""
        try:
            if self._inside in (None, get_ident()) and not self._encoding:
                self._count(output)
        finally:
            if not self._encoding and self._inside != get_ident():
                self._turn.give()

    def _count(self, output: Any) -> None:
        """Count what was pruned, and remember the cache that it filled."""
        prompt, self._prompt = self._prompt, None
        if self.layers:
            self.layers.pass_by()  # until the next call of the whole model
        if self._filling is None:
            return
        running, self._filling = self._filling, None
        if output is None:
            return
        settle([*running.checks, *(prompt.checks if prompt else ())])
        self.stats.add([*running.cuts, *(prompt.cuts if prompt else ())], self.depth)
        cache = find_cache(output)
        if cache is None:
            return
        past = self.layers.pasts.get(cache) if self.layers else None
        segments = [past.at(layer) if past else None for layer in range(self.depth)]
        width = running.width
        gone = [running.dropped + (width - segment.columns.shape[1] if segment else 0) for segment in segments]
        self.stats.add_saved(kv_bytes_saved(cache, gone))
        if not running.rewritten:
            note(cache, WHOLE)
        else:
            batch, mask = running.encoded.batch, running.encoded.mask
            copies = self._rows // len(mask)
            if "position_ids" in batch:
                last = batch["position_ids"][..., -1:].expand(*batch["position_ids"].shape[:-2], len(mask), 1)
            else:
                last = (mask if self._inside else torch.ones_like(mask)).sum(1, keepdim=True) - 1
            ids, mask, last = (part.repeat_interleave(copies, -2) for part in (batch["input_ids"], mask.long(), last))
            note(cache, ShortPrompt(ids, mask, last, running.length))

    def _short_prompt(self, kwargs: Mapping[str, Any]) -> ShortPrompt | None:
        """What the cache of a call begins with, if that was rewritten; the pruners are told."""
        cache = kwargs.get("past_key_values")
        short = noted(cache)
        if short is None and cache is not None and cache.get_seq_length() > 0:
            check_unnoted(cache, kwargs, find_family(self.vlm).is_visual)
        for pruner in self.pruners:
            pruner.go_on(short is not None)
        return short

    def _has_images(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call brings pixels; what cannot be pruned rightly is refused, since it would fail silently."""
        cache = kwargs.get("past_key_values")
        if all(kwargs.get(pixels) is None for pixels in PIXELS.values()):
            if kwargs.get("mm_encoder_outputs"):
                raise PruneZooError(
                    "an attached pruner needs pixel_values, not mm_encoder_outputs: call the model's `generate`, "
                    "not a reference to it from before it was attached"
                )
            return False
        if cache is not None and cache.get_seq_length() > 0:
            raise PruneZooError("images cannot be added to a filled cache while pruning: pass the whole conversation")
        return True

    def _check_options(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse options of `generate` that cannot work in this release of transformers."""
        prepare = vars(self.vlm).get("prepare_inputs_for_generation")  # PEFT puts its own there while it generates
        if prepare is not None:
            find_family(getattr(prepare, "__self__", self.vlm))  # refused with virtual tokens
        config = kwargs.get("generation_config") or self.vlm.generation_config
        if "inputs_embeds" in kwargs and (kwargs.get("prefill_chunk_size") or config.prefill_chunk_size):
            raise PruneZooError("prefill_chunk_size with images needs transformers 5.19 or later while pruning")
        if self.layers and any(kwargs.get(key) or getattr(config, key, None) for key in ASSISTANTS):
            self.layers.check_assisted()

    def _move_lengths(self, kwargs: dict[str, Any], dropped: int) -> None:
        """Lengths that count the prompt, given for the caller's, become those for the shorter one."""
        # `generate` takes what a caller's config leaves open from the model's own.
        configs = [kwargs.get("generation_config"), self.vlm.generation_config]

        def given(name: str) -> int | None:
            return next(filter(None, [kwargs.get(name), *(getattr(config, name, None) for config in configs)]), None)

        for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            value = given(total)
            if dropped and value and not given(new):
                kwargs[total] = max(value - dropped, 0)
