"""Encode the images of a batch once, with the signals that pruners ask for.

Letters: B rows of the batch, L prompt tokens, R images (or clips), N patches, M newlines, T words, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..core.budgets import upload
from ..core.contract import PruneInputs
from ..core.errors import PruneZooError
from ..core.plan import gather_rows
from ..core.roles import ChatMarkers, JointEncoder, Role, TextEncoder
from ..core.signals import DECODER_SIGNALS, follow_tokens, join_images, parse_signal, stack_images
from .encoded import IGNORED, Encoded, Newlines, Source, Words
from .families import Family, Visual, find_family
from .families.gaps import Gaps, no_gaps
from .parts.model import VLM, execution_device
from .signals.language import check_signals, decoder_signals
from .signals.vision import watch_tower
from .signals.words import match_words, words_behind


def encode(
    vlm: VLM,
    batch: Mapping[str, Any],
    needs: tuple[str, ...] = (),
    run_tower: bool = True,
    markers: ChatMarkers | None = None,
    text_encoder: TextEncoder | None = None,
    gaps: Gaps = no_gaps,
    clips: bool = False,
) -> Encoded:
    """Run vision tower and projector once, and lay out what pruners and forwards need.

    Args:
        vlm: A supported model.
        batch: What the processor returned, perhaps with ``labels (B, L)``. With labels the pruner's ``text`` is the
            unlabelled tokens before the last labelled one, so an answer never leaks into it.
        needs: Signals to compute, `Pruner.needs`.
        run_tower: False leaves tower and projector to a pruner of the input or vision stage; until then features are
            zeros, and there are no signals to be had.
        markers: Of the chat template that wrote the prompts, by which `text_roles` are read; from :func:`chat_markers`.
        text_encoder: Makes the signal `text_features`, of all words of a prompt where no markers tell the question; and
            `image_features`, if it has a method of that name.
        gaps: Entered around each run of the tower; leaves patches out of it, whose tokens are zeros then.
        clips: The images of a prompt are the frames of one clip: they are one row to pruners.

    Raises:
        PruneZooError: Unsupported family, unknown signal, or placeholders that do not fit the images; `text_features`
            or `image_features` without a text encoder that makes them.
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
    device = execution_device(family.vlm)
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
    ids = given["input_ids"]
    labels = batch["labels"].to(device) if batch.get("labels") is not None else None

    host = HostPrompt.read(family, batch)
    words = columns, real = host.word_columns(device)
    embedded = family.embed(ids.gather(1, columns))  # (B, T, D): of the words alone
    joint = _joint_encoder(text_encoder) if "image_features" in needs else None
    watch = partial(watch_tower, family.tower, (*needs, "vision_states") if joint else needs)
    seen = {**given, "input_ids": torch.from_numpy(host.ids)}
    visuals = family.visuals(seen, watch, gaps) if run_tower else family.outlines(seen, embedded)
    pixels = {k: v for k, v in given.items() if k in family.consumed}
    given = {k: v for k, v in given.items() if k not in family.consumed}

    placed = _place(family, host, visuals)
    encoded = _lay_out(host, given, labels, _join(placed) if clips else placed, embedded, words)
    text, text_valid = embedded[encoded.sample], real[encoded.sample]
    inputs = replace(encoded.inputs, text=text, text_valid=text_valid, sample=encoded.sample)
    if "frame" in needs:  # the tile of a clip
        moving = upload([clips or kind == "video" for kind in encoded.kinds], device)
        inputs = replace(
            inputs, signals={**inputs.signals, "frame": inputs.cells[..., 0].clamp_min(0) * moving[:, None]}
        )
    asked = torch.from_numpy(host.words)  # on the host until somebody wants them
    if markers is not None:
        roles = markers.roles(torch.from_numpy(host.ids), torch.from_numpy(host.real))
        asked = asked & (roles == Role.QUESTION)
        roles = gather_rows(roles.to(device), columns).masked_fill(~real, Role.TEMPLATE)
        inputs = replace(inputs, text_roles=roles[encoded.sample])
    if "text_features" in needs:
        text_features = encode_text(text_encoder, ids, asked.to(device))[encoded.sample]
        inputs = replace(inputs, signals={**inputs.signals, "text_features": text_features})
    if joint and inputs.signals:  # there are images
        signals = {**inputs.signals, "image_features": encode_images(joint, inputs.signal("vision_states"))}
        inputs = replace(inputs, signals={n: s for n, s in signals.items() if n in needs})
    source = Source(batch, markers, text_encoder)
    return add_late_signals(vlm, replace(encoded, inputs=inputs, pixels=pixels, source=source, clips=clips), needs)


def encode_text(text_encoder: TextEncoder | None, ids: Tensor, asked: Tensor) -> Tensor:
    """``(B, E)``: what a text encoder makes of the question, those of ``ids (B, L)`` that are ``asked (B, L)``.

    Raises:
        PruneZooError: There is none, or it gives something else.
    """
    if text_encoder is None:
        raise PruneZooError("signal 'text_features' needs a text encoder: give text_encoder=… to attach or encode")
    made = text_encoder(ids, asked)
    if not isinstance(made, Tensor) or made.dim() != 2 or len(made) != len(ids) or not made.is_floating_point():
        given = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
        raise PruneZooError(f"text_encoder gave {given} for {len(ids)} prompts: it must give floats ({len(ids)}, E)")
    return made


def _joint_encoder(text_encoder: TextEncoder | None) -> JointEncoder:
    """A text encoder that has a place for pictures; raises PruneZooError for any other."""
    if not isinstance(text_encoder, JointEncoder):
        raise PruneZooError(
            "signal 'image_features' needs a text encoder that has a method image_features, such as ClipText: give "
            "text_encoder=… to attach or encode"
        )
    return text_encoder


def encode_images(encoder: JointEncoder, states: Tensor) -> Tensor:
    """``(R, N, E)``: what a text encoder makes of ``states (R, N, C)``, to be compared with its text.

    Raises:
        PruneZooError: It gives something else.
    """
    made = encoder.image_features(states)
    if not isinstance(made, Tensor) or made.shape[:-1] != states.shape[:-1] or not made.is_floating_point():
        given = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
        rows, tokens, _ = states.shape
        raise PruneZooError(
            f"text_encoder.image_features gave {given} for {rows} images of {tokens} tokens: it must give floats "
            f"({rows}, {tokens}, E)"
        )
    return made


def is_late(name: str) -> bool:
    """Whether a signal is made of the tokens that the language model reads: where some have gone, of the others."""
    return parse_signal(name).kind in (*DECODER_SIGNALS, "relevance", "word_behind", "word_match")


def add_late_signals(vlm: VLM, encoded: Encoded, needs: tuple[str, ...]) -> Encoded:
    """The same with the signals among ``needs`` that :func:`is_late`."""
    inputs, wanted = encoded.inputs, {"word_behind", "word_match"}.intersection(needs)
    if wanted and len(encoded.sample):
        columns, real = (part[encoded.sample] for part in encoded.words)
        behind = words_behind(columns, real, encoded.slots)
        beside = {"word_behind": behind.float()}
        if "word_match" in wanted:
            assert inputs.text is not None  # it is the words, embedded
            beside["word_match"] = match_words(inputs.features, inputs.valid, inputs.text, behind)
        inputs = replace(inputs, signals={**inputs.signals, **{name: beside[name] for name in wanted}})
    return add_decoder_signals(vlm, replace(encoded, inputs=inputs), needs)


def add_decoder_signals(vlm: VLM, encoded: Encoded, needs: tuple[str, ...]) -> Encoded:
    """The same with the signals among ``needs`` that come from the language model; see :func:`decoder_signals`."""
    inputs, late = encoded.inputs, decoder_signals(vlm, encoded, encoded.words, needs)
    return replace(encoded, inputs=replace(inputs, signals={**inputs.signals, **late}))


@dataclass(frozen=True)
class HostPrompt:
    """A batch of prompts as the host knows it. All that follows is laid out from that, so the device is read once."""

    ids: np.ndarray  # (B, L)
    real: np.ndarray  # (B, L) bool, False for padding
    words: np.ndarray  # (B, L) bool: real tokens that are neither placeholders nor part of an answer

    @classmethod
    def read(cls, family: Family, batch: Mapping[str, Any]) -> Self:
        """From what the caller gave, with ``labels (B, L)`` or without."""
        ids, mask, labels = (batch.get(key) for key in ("input_ids", "attention_mask", "labels"))
        assert ids is not None  # `encode` has seen to it
        whole = torch.stack([ids, torch.ones_like(ids) if mask is None else mask.to(ids)]).cpu().numpy()
        real = whole[1] != 0
        words = real & ~np.isin(whole[0], list(family.placeholders.values()))
        if labels is not None:
            # From the right, a labelled token has been met: everything later is template around the end of the answer.
            labelled = labels.cpu().numpy() != IGNORED
            before_last = labelled[:, ::-1].cumsum(1)[:, ::-1] > 0
            words &= ~labelled & (before_last | ~before_last.any(1, keepdims=True))
        return cls(whole[0], real, words)

    def word_columns(self, device: torch.device) -> Words:
        """Where the words are; a single filler where there are none."""
        columns = [torch.from_numpy(row.nonzero()[0]) for row in self.words]
        valid = [torch.ones_like(own, dtype=torch.bool) for own in columns]
        index, real = pad_sequence(columns, batch_first=True), pad_sequence(valid, batch_first=True)
        if not index.shape[1]:  # no words at all, or all of them are the answer
            index, real = index.new_zeros(len(index), 1), real.new_zeros(len(real), 1)
        return index.to(device), real.to(device)


Placed = list[tuple[int, Tensor, Visual]]
"""Images, each with its row and its columns ``(n,)`` in the prompt, in reading order."""


def _lay_out(
    host: HostPrompt, batch: dict[str, Any], labels: Tensor | None, placed: Placed, like: Tensor, words: Words
) -> Encoded:
    """Part patches from newlines; ``like`` has the type and width of embeddings."""
    patches = [_where(visual.cells[:, 2] >= 0) for _, _, visual in placed]
    counts = tuple(map(len, patches))
    parted = any(count < len(visual.cells) for count, (_, _, visual) in zip(counts, placed, strict=True))  # by newlines
    places = [own.to(like.device) for own in patches] if parted else []

    def pick(values: list[Tensor]) -> list[Tensor]:
        """Those of the patches, of what the device has of all tokens."""
        return [v[own] for v, own in zip(values, places, strict=True)] if parted else values

    def stack(name: str) -> Tensor:
        """A signal of the patches of all images."""
        values = [visual.signals[name] for _, _, visual in placed]
        if parted:
            values = [follow_tokens(name, v[None], own[None])[0] for v, own in zip(values, places, strict=True)]
        return stack_images(values)

    empty = like.new_zeros(0, 0, like.shape[-1])
    own_cells = [visual.cells[own] for own, (_, _, visual) in zip(patches, placed, strict=True)]
    cells = _pad(own_cells, torch.zeros(0, 0, 3, dtype=torch.long), -1)
    slots = [columns[own] for own, (_, columns, _) in zip(patches, placed, strict=True)]
    valid = torch.arange(max(counts, default=0)) < torch.tensor(counts, dtype=torch.long)[:, None]
    inputs = PruneInputs(
        _pad(pick([visual.features for _, _, visual in placed]), empty, 0),
        valid.to(like.device),
        cells.to(like.device),
        signals={name: stack(name) for name in (placed[0][2].signals if placed else ())},
        known=counts,
        host_cells=cells.numpy(),
    )
    rows = tuple(row for row, _, _ in placed)
    levels = zip(*(visual.deep for _, _, visual in placed), strict=True)
    return Encoded(
        inputs,
        batch,
        labels,
        sample=upload(rows, like.device),
        slots=_pad(slots, torch.zeros(0, 0, dtype=torch.long), 0).to(like.device),
        words=words,
        rows=rows,
        kinds=tuple(visual.kind for _, _, visual in placed),
        real=tuple(host.real.sum(1).tolist()),
        newlines=_newlines(placed) if parted else None,
        deep=tuple(_pad(pick(list(level)), empty, 0) for level in levels),
    )


def _join(placed: Placed) -> Placed:
    """The images of each prompt as one, frame after frame."""
    clips: Placed = []
    for row in dict.fromkeys(row for row, _, _ in placed):
        frames = [(columns, visual) for at, columns, visual in placed if at == row]
        cells, frame = [], 0
        for _, visual in frames:
            cells.append(visual.cells + torch.tensor([frame, 0, 0]))
            frame = int(cells[-1][:, 0].max()) + 1
        shown = [visual for _, visual in frames]
        deep = tuple(torch.cat(level) for level in zip(*(visual.deep for visual in shown), strict=True))
        signals = {name: join_images(name, [visual.signals[name] for visual in shown]) for name in shown[0].signals}
        features = torch.cat([visual.features for visual in shown])
        columns = torch.cat([columns for columns, _ in frames])
        clips.append((row, columns, Visual(shown[0].kind, features, torch.cat(cells), deep, signals)))
    return clips


def _place(family: Family, host: HostPrompt, visuals: list[Visual]) -> Placed:
    """Where each image is.

    Raises:
        PruneZooError: Placeholders that do not fit the images.
    """
    placed: Placed = []
    for kind, token in family.placeholders.items():
        own = [visual for visual in visuals if visual.kind == kind]
        sizes = [len(visual.cells) for visual in own]
        row, column = (torch.from_numpy(part) for part in (host.ids == token).nonzero())
        if len(row) != sum(sizes):
            raise PruneZooError(
                f"the prompt has {len(row)} {kind} placeholders, the {kind}s have {sum(sizes)} tokens: "
                "use one processor for both"
            )
        for rows, columns, visual in zip(row.split(sizes), column.split(sizes), own, strict=True):
            first, last = rows.numpy()[[0, -1]].tolist()
            if first != last:
                raise PruneZooError(
                    f"the placeholders of one {kind} run over two samples: use one processor for text and images"
                )
            placed.append((first, columns, visual))
    return sorted(placed, key=lambda place: (place[0], place[1].numpy()[0]))


def _where(mask: Tensor) -> Tensor:
    """The set places of a mask ``(n,)`` of the host."""
    return torch.from_numpy(mask.numpy().nonzero()[0])


def _newlines(placed: list[tuple[int, Tensor, Visual]]) -> Newlines:
    """What is no patch: each with the patches of its row."""
    device = placed[0][2].features.device
    counts = tuple(int((visual.cells[:, 2] < 0).numpy().sum()) for _, _, visual in placed)
    width = max(counts)
    features, slots, ends = [], [], []
    for _, columns, visual in placed:
        newline = _where(visual.cells[:, 2] < 0)
        row, patch = visual.cells[newline, None, :2], visual.cells[None, _where(visual.cells[:, 2] >= 0), :2]
        same = ((row == patch) | (row == -1)).all(-1)  # (M, N)
        none = same.new_ones(1, same.shape[1])  # found where no newline is
        ends.append(torch.cat([same, none]).int().argmax(0).masked_fill(~same.any(0), width))
        features.append(visual.features[newline.to(device)])
        slots.append(columns[newline])
    valid = torch.arange(width) < torch.tensor(counts)[:, None]
    return Newlines(
        pad_sequence(features, batch_first=True),
        pad_sequence(slots, batch_first=True).to(device),
        valid.to(device),
        pad_sequence(ends, batch_first=True, padding_value=width).to(device),
        counts,
    )


def _pad(items: list[Tensor], empty: Tensor, filler: int | bool) -> Tensor:
    """Stack R tensors ``(n, ...)`` to ``(R, N, ...)``; ``empty`` where there are none."""
    if len(items) == 1:
        return items[0][None]  # which need not be copied
    return pad_sequence(items, batch_first=True, padding_value=filler) if items else empty
