"""What an encoded batch is: tokens of its images for pruners, and their columns in the prompt.

Letters: B rows of the batch, L prompt tokens, R images (or clips), N patches, M newlines, K kept, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..core.contract import PruneInputs, PruneOutput
from ..core.merge import group_mean
from ..core.plan import KeepPlan, gather_rows
from .families import find_family
from .parts.model import VLM

IGNORED = -100  # label of a token that is not trained on


@dataclass(frozen=True)
class Newlines:
    """Tokens that are no patches but end a row of them. A pruner never sees them: one lives as long as its row does."""

    features: Tensor = field(repr=False)  # (R, M, D)
    slots: Tensor = field(repr=False)  # (R, M) long: the column of each in the prompt; 0 on padding
    valid: Tensor = field(repr=False)  # (R, M) bool
    ends: Tensor = field(repr=False)  # (R, N) long: which of them ends the row of a patch, M where none does

    def alive(self, index: Tensor, valid: Tensor) -> Tensor:
        """``(R, M)`` bool: those of the rows in which a patch ``index (R, K)``, where ``valid``, is left."""
        alive = self.valid.new_zeros(len(index), self.valid.shape[1] + 1)
        ends = gather_rows(self.ends, index).masked_fill(~valid, self.valid.shape[1])
        return alive.scatter(1, ends, True)[:, :-1] & self.valid

    def after(self, output: PruneOutput, plan: KeepPlan, sample: Tensor) -> "Newlines":
        """Those that ``output`` left, in the columns of the shorter prompt."""
        alive = self.alive(output.index, output.valid)
        slots = plan.moved(self.slots, sample).masked_fill(~alive, 0)
        return Newlines(self.features, slots, alive, gather_rows(self.ends, output.index))


@dataclass(frozen=True)
class Encoded:
    """A batch whose images have been through tower and projector, once."""

    inputs: PruneInputs  # a row for each image or clip; no rows where the batch has none
    batch: dict[str, Any]  # what the caller gave, without labels and what only the vision tower reads
    labels: Tensor | None  # (B, L)
    sample: Tensor = field(repr=False)  # (R,) long: the row of the batch that an image belongs to
    slots: Tensor = field(repr=False)  # (R, N) long: the column of each patch in the prompt; 0 on padding
    newlines: Newlines | None = None  # where the family puts them
    deep: tuple[Tensor, ...] = field(default=(), repr=False)  # (R, N, D) each: added behind the first decoder layers
    pixels: dict[str, Any] = field(default_factory=dict, repr=False)  # what only the vision tower reads
    planned: tuple[
        Tensor, ...
    ] = ()  # (R,) long each: of a layer-stage pruner that has begun, what its later stages leave

    @property
    def mask(self) -> Tensor:
        """``(B, L)`` bool, False for padding."""
        return real_columns(self.batch)

    @property
    def tokens(self) -> Tensor:
        """``(R,)`` long: tokens of each image in the prompt, newlines among them."""
        patches = self.inputs.valid.sum(1)
        return patches if self.newlines is None else patches + self.newlines.valid.sum(1)

    def tokens_left(self, output: PruneOutput) -> Tensor:
        """``(R,)`` long: tokens left of each image, newlines among them."""
        if self.newlines is None:
            return output.count
        return output.count + self.newlines.alive(output.index, output.valid).sum(1)

    def columns_left(self, output: PruneOutput) -> Tensor:
        """``(B, L)`` bool: the columns of the prompt that stay; words (and padding) do."""
        keep = torch.ones_like(self.mask)
        _put(keep, self.sample, self.slots, self.inputs.valid, False)
        _put(keep, self.sample, gather_rows(self.slots, output.index), output.valid, True)
        if self.newlines is not None:
            alive = self.newlines.alive(output.index, output.valid)
            _put(keep, self.sample, self.newlines.slots, self.newlines.valid & ~alive, False)
        return keep

    def in_columns(self, values: Tensor, slots: Tensor, valid: Tensor) -> Tensor:
        """``(B, L, D)``: ``values (R, K, D)`` in their columns ``slots (R, K)``, and the newlines in theirs."""
        whole = values.new_zeros(*self.batch["input_ids"].shape, values.shape[-1])
        whole = whole.index_put(places(self.sample, slots, valid), values[valid])
        if self.newlines is None:
            return whole
        at = places(self.sample, self.newlines.slots, self.newlines.valid)
        return whole.index_put(at, self.newlines.features[self.newlines.valid].to(whole.dtype))

    def after(self, output: PruneOutput, plan: KeepPlan, batch: dict[str, Any]) -> "Encoded":
        """What ``output`` left, in the shorter prompt that ``plan`` makes.

        Args:
            output: What is left of each image.
            plan: From :meth:`columns_left`.
            batch: The inputs of the shorter prompt.
        """
        slots = plan.moved(gather_rows(self.slots, output.index), self.sample)
        return replace(
            self,
            inputs=self.inputs.after(output),
            batch=batch,
            labels=None if self.labels is None else plan.take(self.labels, IGNORED),
            slots=slots.masked_fill(~output.valid, 0),
            newlines=None if self.newlines is None else self.newlines.after(output, plan, self.sample),
            deep=tuple(_merge(level, output) for level in self.deep),
        )

    def still_open(self, gates: Tensor) -> "Encoded":
        """The same without the patches whose gate ``(R, N)`` is 0: what is ajar can still be chosen."""
        valid = self.inputs.valid & (gates.detach() > 0)
        return replace(self, inputs=replace(self.inputs, valid=valid))

    def model_inputs(self, vlm: VLM, generating: bool = False, **others: Any) -> dict[str, Any]:
        """What the model takes, with every visual token, made anew and free to be edited.

        Args:
            vlm: The model.
            generating: It is for `generate`.
            others: In place of the batch's own inputs.
        """
        parts = (self.inputs.features, *self.deep)
        values, *deep = (self.in_columns(part, self.slots, self.inputs.valid) for part in parts)
        return find_family(vlm).hand_over({**self.batch, **others}, values, deep, generating)


def places(sample: Tensor, slots: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column in the batch of ``slots (R, K)``, where ``valid``."""
    return sample[:, None].expand_as(slots)[valid], slots[valid]


def _put(mask: Tensor, sample: Tensor, slots: Tensor, valid: Tensor, value: bool) -> None:
    """Set ``mask (B, L)`` at ``slots (R, K)``, where ``valid``."""
    mask[places(sample, slots, valid)] = value


def real_columns(batch: Mapping[str, Any]) -> Tensor:
    """``(B, L)`` bool: the attention mask, all true where none was given."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _merge(level: Tensor, output: PruneOutput) -> Tensor:
    """``(R, K, D)``: what a deepstack level ``(R, N, D)`` has for what is left: the mean of what was merged."""
    if output.groups is None:
        return gather_rows(level, output.index)
    return group_mean(level, output.groups, torch.ones_like(output.groups), output.index.shape[1])
