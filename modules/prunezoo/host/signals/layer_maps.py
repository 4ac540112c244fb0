"""Maps of a decoder layer's attention, whole: between image tokens and the prompt's words.

Letters: R images, N image tokens, T words, L tokens, H heads.
"""

import torch
from torch import Tensor

from ...core.signals import Signal
from ..parts.decoder import Decoder
from .entry import ROWS, Entry

Places = tuple[Tensor, Tensor]
"""Columns of the prompt, ``(R, M)``, and which of them count, ``(R, M)`` bool."""


def layer_map(
    decoder: Decoder, signal: Signal, layer: int, entry: Entry, words: Places, sample: Tensor, images: Places
) -> Tensor:
    """A map of one layer, made of some rows at a time.

    Args:
        decoder: The language model.
        signal: Of MAP_KINDS.
        layer: Which, from 0.
        entry: What enters it, rows of the batch.
        words: The prompt's words, of each image.
        sample: ``(R,)`` row of the batch that each image belongs to.
        images: The image tokens.

    Returns:
        With the axes of its kind, float32; 0 where a row or column does not count.
    """
    by_words = signal.kind in ("word_attention", "word_head_attention", "among_words_head_attention")
    of_words = signal.kind in ("seen_word_head_attention", "among_words_head_attention")
    if signal.kind == "word_rotation":
        return rotation(decoder, entry, words, sample, images)
    rows, row_counts = words if by_words else images
    columns, column_counts = words if of_words else images
    entry, by_head = entry.of_images(sample), "head" in signal.kind
    pieces = []
    for some in rows.split(ROWS, 1):
        weights = decoder.attention_rows(layer, entry.hidden, entry.rotary if signal.rotary else None, some, entry.mask)
        weights = weights if by_head else weights.mean(1, keepdim=True)
        pieces.append(weights.gather(3, columns[:, None, None].expand(-1, *weights.shape[1:3], -1)))
    counts = row_counts[:, None, :, None] & column_counts[:, None, None]
    whole = torch.cat(pieces, 2).masked_fill(~counts, 0)  # (R, H or 1, rows, columns)
    if by_words and not of_words:
        whole = whole.transpose(2, 3)  # image tokens first
    return whole.movedim(1, -1) if by_head else whole[:, 0]


def rotation(decoder: Decoder, entry: Entry, words: Places, sample: Tensor, images: Places) -> Tensor:
    """``(R, N, T)`` float32: what a query of ones at a word gives a key of ones at an image token, at most 1.

    Args:
        decoder: The language model.
        entry: What enters a layer.
        words: As in :func:`layer_map`, and so are ``sample`` and ``images``.
        sample: As there.
        images: As there.
    """
    (columns, seen), (slots, valid) = words, images
    counts = valid[..., None] & seen[:, None]
    angles = torch.cat(decoder.join(entry.rotary), -1).float()  # cosines and sines: their product is that of the turn
    angles = angles.expand(len(entry.hidden), -1, -1)
    turned = angles[sample[:, None], slots] @ angles[sample[:, None], columns].transpose(1, 2)
    return (turned * 2 / angles.shape[-1]).masked_fill(~counts, 0)
