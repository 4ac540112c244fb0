"""What an encoded batch is: tokens of its images for pruners, and their columns in the prompt.

Letters: B rows of the batch, L prompt tokens, R images (or clips), N patches, M newlines, K kept, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..core.contract import PruneInputs, PruneOutput
from ..core.merge import group_mean
from ..core.plan import KeepPlan, gather_rows, mask_to_index
from ..core.roles import ChatMarkers, TextEncoder
from .families import PIXELS, find_family
from .families.base import TAKES_FEATURES, Kind
from .parts.model import VLM

IGNORED = -100  # label of a token that is not trained on


@dataclass(frozen=True)
class Newlines:
    """Tokens that are no patches but end a row of them. A pruner never sees them: one lives as long as its row does."""

    features: Tensor = field(repr=False)  # (R, M, D)
    slots: Tensor = field(repr=False)  # (R, M) long: the column of each in the prompt; 0 on padding
    valid: Tensor = field(repr=False)  # (R, M) bool
    ends: Tensor = field(repr=False)  # (R, N) long: which of them ends the row of a patch, M where none does
    known: tuple[int, ...] | None = None  # (R) how many of each image, where the host knows

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many of each image. Which of them live hangs on what was chosen, so the device may be asked."""
        return tuple(self.valid.sum(1).tolist()) if self.known is None else self.known

    def alive(self, index: Tensor, valid: Tensor) -> Tensor:
        """``(R, M)`` bool: those of the rows in which a patch ``index (R, K)``, where ``valid``, is left."""
        alive = self.valid.new_zeros(len(index), self.valid.shape[1] + 1)
        ends = gather_rows(self.ends, index).masked_fill(~valid, self.valid.shape[1])
        return alive.scatter(1, ends, True)[:, :-1] & self.valid


Words = tuple[Tensor, Tensor]
"""Columns of the prompt's words ``(B, T)``, ascending, and which of them are no filler ``(B, T)`` bool; T >= 1."""


@dataclass(frozen=True)
class Source:
    """What a batch was encoded from, for stages that have the tower run again."""

    batch: Mapping[str, Any] = field(repr=False)  # as the caller gave it
    markers: ChatMarkers | None = None
    text_encoder: TextEncoder | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Encoded:
    """A batch whose images have been through tower and projector, once."""

    inputs: PruneInputs  # a row for each image or clip; no rows where the batch has none
    batch: dict[str, Any]  # what the caller gave, without labels and what only the vision tower reads
    labels: Tensor | None  # (B, L)
    sample: Tensor = field(repr=False)  # (R,) long: the row of the batch that an image belongs to
    slots: Tensor = field(repr=False)  # (R, N) long: the column of each patch in the prompt; 0 on padding
    words: Words  # the prompt's words
    rows: tuple[int, ...]  # (R) `sample`, on the host
    kinds: tuple[Kind, ...]  # (R) what each is
    real: tuple[int, ...]  # (B) real columns of each row of the prompt
    newlines: Newlines | None = None  # where the family puts them
    deep: tuple[Tensor, ...] = field(default=(), repr=False)  # (R, N, D) each: added behind the first decoder layers
    pixels: dict[str, Any] = field(default_factory=dict, repr=False)  # what only the vision tower reads
    source: Source | None = field(default=None, repr=False)  # None: it cannot be encoded again
    start: PruneOutput | None = None  # what an input stage left, of which the tower is to be given no more
    clips: bool = False  # the images of each prompt are one row, the frames of a clip
    planned: tuple[Tensor, ...] = ()  # (R,) long each, on the host: what later stages of a begun pruner leave

    @property
    def mask(self) -> Tensor:
        """``(B, L)`` bool, False for padding."""
        return real_columns(self.batch)

    @cached_property
    def tokens(self) -> Tensor:
        """``(R,)`` long, on the host: tokens of each image in the prompt, newlines among them."""
        return _total(self.inputs.counts, self.newlines)

    @cached_property
    def placeholders(self) -> dict[Kind, list[int]]:
        """(B) placeholders of each kind in each row of the prompt."""
        counts: dict[Kind, list[int]] = {kind: [0] * len(self.real) for kind in PIXELS}
        for row, kind, count in zip(self.rows, self.kinds, self.tokens.numpy().tolist(), strict=True):
            counts[kind][row] += count
        return counts

    def columns_left(self, output: PruneOutput) -> Tensor:
        """``(B, L)`` bool: the columns of the prompt that stay; words (and padding) do."""
        keep = torch.ones_like(self.mask)
        no, yes = keep.new_zeros(()), keep.new_ones(())
        keep = put(keep, self.sample, self.slots, self.inputs.valid, no)
        keep = put(keep, self.sample, gather_rows(self.slots, output.index), output.valid, yes)
        if self.newlines is not None:
            alive = self.newlines.alive(output.index, output.valid)
            keep = put(keep, self.sample, self.newlines.slots, self.newlines.valid & ~alive, no)
        return keep

    def plan(self, output: PruneOutput) -> tuple[KeepPlan, "Newlines | None"]:
        """What becomes of the prompt's columns, and of the newlines, when the images are brought to ``output``."""
        lines = self.newlines
        if output.is_all(self.inputs):
            return KeepPlan.of_all(self.mask, self.real), lines
        if lines is not None:
            alive = lines.alive(output.index, output.valid)
            known = lines.counts if output.counts == self.inputs.counts and output.groups is None else None
            lines = replace(lines, valid=alive, ends=gather_rows(lines.ends, output.index), known=known)
        left = list(self.real)
        gone = self.tokens - _total(output.counts, lines)
        for row, count in zip(self.rows, gone.numpy().tolist(), strict=True):
            left[row] -= count
        plan = KeepPlan.from_mask(self.columns_left(output), self.mask, self.real, left)
        if lines is not None:
            lines = replace(lines, slots=plan.moved(lines.slots, self.sample).masked_fill(~lines.valid, 0))
        return plan, lines

    def in_columns(self, values: Tensor) -> Tensor:
        """``(B, L, D)``: ``values (R, N, D)`` of the patches in their columns, and the newlines in theirs."""
        whole = values.new_zeros(*self.batch["input_ids"].shape, values.shape[-1])
        whole = put(whole, self.sample, self.slots, self.inputs.valid, values)
        if self.newlines is None:
            return whole
        lines = self.newlines
        return put(whole, self.sample, lines.slots, lines.valid, lines.features.to(whole.dtype))

    def after(self, output: PruneOutput, plan: KeepPlan, lines: "Newlines | None", batch: dict[str, Any]) -> "Encoded":
        """What ``output`` left, in the shorter prompt that ``plan`` makes.

        Args:
            output: What is left of each image.
            plan: From :meth:`plan`.
            lines: Likewise.
            batch: The inputs of the shorter prompt.
        """
        if output.is_all(self.inputs):
            return replace(self, inputs=self.inputs.after(output), batch=batch)
        slots = plan.moved(gather_rows(self.slots, output.index), self.sample)
        columns, real = self.words
        return replace(
            self,
            inputs=self.inputs.after(output),
            batch=batch,
            labels=None if self.labels is None else plan.take(self.labels, IGNORED),
            slots=slots.masked_fill(~output.valid, 0),
            words=(plan.moved(columns), real),
            real=plan.counts,
            newlines=lines,
            deep=tuple(_merge(level, output) for level in self.deep),
        )

    def still_open(self, output: PruneOutput) -> "Encoded":
        """The same without the patches whose gate is 0: what is ajar can still be chosen."""
        assert output.gates is not None  # who trains with gates has seen to it
        valid = self.inputs.valid & (output.gates.detach() > 0)
        return replace(self, inputs=replace(self.inputs, valid=valid, known=None, carry=output.carry))

    def model_inputs(self, vlm: VLM, generating: bool = False, **others: Any) -> dict[str, Any]:
        """What the model takes, with every visual token, made anew and free to be edited.

        Args:
            vlm: The model.
            generating: It is for `generate`.
            others: In place of the batch's own inputs.
        """
        family, batch, parts = find_family(vlm), {**self.batch, **others}, (self.inputs.features, *self.deep)
        if not any(map(any, self.placeholders.values())):
            return batch
        if not TAKES_FEATURES:
            values, *deep = map(self.in_columns, parts)
            return family.hand_over_embedded(batch, values, deep, generating)
        tokens = {kind: token for kind, token in family.placeholders.items() if any(self.placeholders[kind])}
        return family.hand_over(
            batch, {kind: [self.by_row(part, kind, token) for part in parts] for kind, token in tokens.items()}
        )

    def by_row(self, values: Tensor, kind: Kind, placeholder: int) -> list[Tensor]:
        """``(n, D)`` for each row of the prompt that has any: its tokens of a kind, in the order of their columns.

        Args:
            values: ``(R, N, D)`` of the patches; those of newlines are known.
            kind: Of the images that are wanted.
            placeholder: What stands for each token in the prompt.
        """
        if self.newlines is None and self.inputs.known is not None:  # tokens of an image come first, then padding
            found: dict[int, list[Tensor]] = {}
            for number, (row, own, count) in enumerate(zip(self.rows, self.kinds, self.inputs.known, strict=True)):
                if own == kind and count:
                    found.setdefault(row, []).append(values[number, :count])
            return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in found.values()]
        sizes = self.placeholders[kind]
        columns = mask_to_index(self.batch["input_ids"] == placeholder, max(sizes))[0]
        rows = zip(gather_rows(self.in_columns(values), columns), sizes, strict=True)
        return [row[:count] for row, count in rows if count]


def put(whole: Tensor, sample: Tensor, slots: Tensor, valid: Tensor, values: Tensor) -> Tensor:
    """``whole (B, L, ...)`` with ``values (R, K, ...)``, or one for all, in the columns ``slots (R, K)``, if ``valid``.

    What is not goes into a column behind the last, which is cut off again: so no device is asked how many there are.
    """
    length = whole.shape[1]
    wider = torch.cat([whole, whole[:, :1]], 1)
    return wider.index_put((sample[:, None].expand_as(slots), slots.masked_fill(~valid, length)), values)[:, :length]


def real_columns(batch: Mapping[str, Any]) -> Tensor:
    """``(B, L)`` bool: the attention mask, all true where none was given."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _merge(level: Tensor, output: PruneOutput) -> Tensor:
    """``(R, K, D)``: what a deepstack level ``(R, N, D)`` has for what is left: the mean of what was merged."""
    if output.groups is None:
        return gather_rows(level, output.index)
    return group_mean(level, output.groups, torch.ones_like(output.groups), output.index.shape[1])


def _total(counts: Sequence[int], lines: Newlines | None) -> Tensor:
    """``(R,)`` long: patches and newlines of each image."""
    patches = torch.tensor(counts, dtype=torch.long)
    return patches if lines is None else patches + torch.tensor(lines.counts, dtype=torch.long)
