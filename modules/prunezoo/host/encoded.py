"""Encode the images of a batch once, and say what became of them: tokens for pruners, columns of the prompt.

Letters: B rows of the batch, L prompt tokens, R images (or clips), N patches, M newlines, K kept, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..core.contract import PruneInputs, PruneOutput
from ..core.errors import PruneZooError
from ..core.merge import group_mean
from ..core.plan import KeepPlan, gather_rows, mask_to_index
from .families import Family, Visual, find_family
from .signals.language import check_signals, decoder_signals

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
        return _real(self.batch)

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

    def model_inputs(self, vlm: PreTrainedModel, generating: bool = False, **others: Any) -> dict[str, Any]:
        """What the model takes, with every visual token, made anew and free to be edited.

        Args:
            vlm: The model.
            generating: It is for `generate`.
            others: In place of the batch's own inputs.
        """
        parts = (self.inputs.features, *self.deep)
        values, *deep = (self.in_columns(part, self.slots, self.inputs.valid) for part in parts)
        return find_family(vlm).hand_over({**self.batch, **others}, values, deep, generating)


def encode(
    vlm: PreTrainedModel, batch: Mapping[str, Any], needs: tuple[str, ...] = (), run_tower: bool = True
) -> Encoded:
    """Run vision tower and projector once, and lay out what pruners and forwards need.

    Args:
        vlm: A supported model.
        batch: What the processor returned, perhaps with ``labels (B, L)``. With labels the pruner's ``text`` is the
            unlabelled tokens before the last labelled one, so an answer never leaks into it.
        needs: Signals to compute, `Pruner.needs`.
        run_tower: False leaves tower and projector to a pruner of the vision stage; until then features are zeros, and
            there are no signals to be had.

    Raises:
        PruneZooError: Unsupported family, unknown signal, or placeholders that do not fit the images.
    """
    check_signals(needs)
    if needs and not run_tower:
        raise PruneZooError(f"signals need the tower to run: {', '.join(needs)}")
    family = find_family(vlm)
    if batch.get("input_ids") is None:
        raise PruneZooError("pruning needs input_ids: inputs_embeds alone do not say where the images are")
    mask = batch.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != batch["input_ids"].shape):
        raise PruneZooError("pruning needs the processor's attention_mask, as many rows and columns as input_ids")
    device = family.vlm.device
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
    ids = given["input_ids"]
    labels = batch["labels"].to(device) if batch.get("labels") is not None else None

    embedded = family.embed(ids)
    visuals = family.visuals(given, needs) if run_tower else family.outlines(given, embedded)
    pixels = {k: v for k, v in given.items() if k in family.consumed}
    given = {k: v for k, v in given.items() if k not in family.consumed}

    columns, column_valid = prompt_words(family, given, labels)
    text = gather_rows(embedded, columns)

    encoded = _lay_out(family, given, labels, visuals, embedded)
    inputs = replace(encoded.inputs, text=text[encoded.sample], text_valid=column_valid[encoded.sample])
    encoded = replace(encoded, inputs=inputs, pixels=pixels)
    return add_decoder_signals(vlm, encoded, needs)


def add_decoder_signals(vlm: PreTrainedModel, encoded: Encoded, needs: tuple[str, ...]) -> Encoded:
    """The same with the signals among ``needs`` that come from the language model; see :func:`decoder_signals`."""
    words = prompt_words(find_family(vlm), encoded.batch, encoded.labels)
    inputs, late = encoded.inputs, decoder_signals(vlm, encoded, words, needs)
    return replace(encoded, inputs=replace(inputs, signals={**inputs.signals, **late}))


def prompt_words(family: Family, batch: Mapping[str, Any], labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the prompt's words are: real tokens that are neither placeholders nor part of an answer.

    Args:
        family: Whose placeholders.
        batch: With ``input_ids (B, L)`` and perhaps ``attention_mask``.
        labels: ``(B, L)`` or None.

    Returns:
        Columns ``(B, T)``, ascending, and which of them are no filler ``(B, T)`` bool; T is at least 1.
    """
    is_prompt = _real(batch) & ~family.is_visual(batch["input_ids"])
    if labels is not None:
        # From the right, a labelled token has been met: everything later is template around the end of the answer.
        before_last = (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0
        is_prompt &= (labels == IGNORED) & (before_last | ~before_last.any(1, keepdim=True))
    columns, valid = mask_to_index(is_prompt)
    if not columns.shape[1]:  # no words at all, or all of them are the answer
        return columns.new_zeros(len(columns), 1), valid.new_zeros(len(valid), 1)
    return columns, valid


def _lay_out(
    family: Family, batch: dict[str, Any], labels: Tensor | None, visuals: list[Visual], like: Tensor
) -> Encoded:
    """Find the columns of each image, and part patches from newlines; ``like`` has the type and width of embeddings."""
    ids = batch["input_ids"]
    placed: list[tuple[int, Tensor, Visual]] = []
    for kind, token in family.placeholders.items():
        own = [visual for visual in visuals if visual.kind == kind]
        sizes = [len(visual.cells) for visual in own]
        row, column = (ids == token).nonzero(as_tuple=True)
        if len(row) != sum(sizes):
            raise PruneZooError(
                f"the prompt has {len(row)} {kind} placeholders, the {kind}s have {sum(sizes)} tokens: "
                "use one processor for both"
            )
        for rows, columns, visual in zip(row.split(sizes), column.split(sizes), own, strict=True):
            first, last = int(rows[0]), int(rows[-1])
            if first != last:
                raise PruneZooError(
                    f"the placeholders of one {kind} run over two samples: use one processor for text and images"
                )
            placed.append((first, columns, visual))
    placed.sort(key=lambda place: (place[0], int(place[1][0])))  # in reading order

    patches = [visual.cells[:, 2] >= 0 for _, _, visual in placed]
    features = [visual.features for _, _, visual in placed]
    columns = [own for _, own, _ in placed]
    empty = like.new_zeros(0, 0, like.shape[-1])
    picked = [(f[p], c[p], v.cells[p]) for f, c, p, (_, _, v) in zip(features, columns, patches, placed, strict=True)]
    inputs = PruneInputs(
        _pad([f for f, _, _ in picked], empty, 0),
        _pad(
            [torch.ones_like(c, dtype=torch.bool) for _, c, _ in picked], ids.new_zeros(0, 0, dtype=torch.bool), False
        ),
        _pad([cells for _, _, cells in picked], ids.new_zeros(0, 0, 3), -1),
        signals={
            name: _pad([v.signals[name][p] for p, (_, _, v) in zip(patches, placed, strict=True)], empty, 0)
            for name in (placed[0][2].signals if placed else ())
        },
    )
    levels = [visual.deep for _, _, visual in placed]
    return Encoded(
        inputs,
        batch,
        labels,
        sample=torch.tensor([row for row, _, _ in placed], dtype=torch.long, device=ids.device),
        slots=_pad([c for _, c, _ in picked], ids.new_zeros(0, 0), 0),
        newlines=_newlines(placed),
        deep=tuple(_pad(list(level), empty, 0) for level in zip(*levels, strict=True)),
    )


def _newlines(placed: list[tuple[int, Tensor, Visual]]) -> Newlines | None:
    """What is no patch, if there is any: each with the patches of its row."""
    if all(bool((visual.cells[:, 2] >= 0).all()) for _, _, visual in placed):
        return None
    width = max(int((visual.cells[:, 2] < 0).sum()) for _, _, visual in placed)
    features, slots, ends = [], [], []
    for _, columns, visual in placed:
        newline = visual.cells[:, 2] < 0
        row, patch = visual.cells[newline, None, :2], visual.cells[None, ~newline, :2]
        same = ((row == patch) | (row == -1)).all(-1)  # (M, N)
        none = torch.ones_like(same[:1])  # found where no newline is
        ends.append(torch.cat([same, none]).int().argmax(0).masked_fill(~same.any(0), width))
        features.append(visual.features[newline])
        slots.append(columns[newline])
    valid = [torch.ones_like(own, dtype=torch.bool) for own in slots]
    return Newlines(
        pad_sequence(features, batch_first=True),
        pad_sequence(slots, batch_first=True),
        pad_sequence(valid, batch_first=True),
        pad_sequence(ends, batch_first=True, padding_value=width),
    )


def places(sample: Tensor, slots: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column in the batch of ``slots (R, K)``, where ``valid``."""
    return sample[:, None].expand_as(slots)[valid], slots[valid]


def _put(mask: Tensor, sample: Tensor, slots: Tensor, valid: Tensor, value: bool) -> None:
    """Set ``mask (B, L)`` at ``slots (R, K)``, where ``valid``."""
    mask[places(sample, slots, valid)] = value


def _pad(items: list[Tensor], empty: Tensor, filler: int | bool) -> Tensor:
    """Stack R tensors ``(n, ...)`` to ``(R, N, ...)``; ``empty`` where there are none."""
    return pad_sequence(items, batch_first=True, padding_value=filler) if items else empty


def _real(batch: Mapping[str, Any]) -> Tensor:
    """``(B, L)`` bool: the attention mask, all true where none was given."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _merge(level: Tensor, output: PruneOutput) -> Tensor:
    """``(R, K, D)``: what a deepstack level ``(R, N, D)`` has for what is left: the mean of what was merged."""
    if output.groups is None:
        return gather_rows(level, output.index)
    return group_mean(level, output.groups, torch.ones_like(output.groups), output.index.shape[1])
