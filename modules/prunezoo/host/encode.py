"""Encode the images of a batch once, with the signals that pruners ask for.

Letters: B rows of the batch, L prompt tokens, R images (or clips), N patches, M newlines, T words, D width.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..core.contract import PruneInputs
from ..core.errors import PruneZooError
from ..core.plan import gather_rows, mask_to_index
from .encoded import IGNORED, Encoded, Newlines, real_columns
from .families import Family, Visual, find_family
from .parts.model import VLM
from .signals.language import check_signals, decoder_signals
from .signals.vision import watch_tower


def encode(vlm: VLM, batch: Mapping[str, Any], needs: tuple[str, ...] = (), run_tower: bool = True) -> Encoded:
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
    visuals = (
        family.visuals(given, partial(watch_tower, family.tower, needs))
        if run_tower
        else family.outlines(given, embedded)
    )
    pixels = {k: v for k, v in given.items() if k in family.consumed}
    given = {k: v for k, v in given.items() if k not in family.consumed}

    columns, column_valid = prompt_words(family, given, labels)
    text = gather_rows(embedded, columns)

    encoded = _lay_out(family, given, labels, visuals, embedded)
    inputs = replace(encoded.inputs, text=text[encoded.sample], text_valid=column_valid[encoded.sample])
    encoded = replace(encoded, inputs=inputs, pixels=pixels)
    return add_decoder_signals(vlm, encoded, needs)


def add_decoder_signals(vlm: VLM, encoded: Encoded, needs: tuple[str, ...]) -> Encoded:
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
    is_prompt = real_columns(batch) & ~family.is_visual(batch["input_ids"])
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


def _pad(items: list[Tensor], empty: Tensor, filler: int | bool) -> Tensor:
    """Stack R tensors ``(n, ...)`` to ``(R, N, ...)``; ``empty`` where there are none."""
    return pad_sequence(items, batch_first=True, padding_value=filler) if items else empty
