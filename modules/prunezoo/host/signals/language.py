"""Signals of the language model: attention, made from queries and keys for the rows that are needed, and hidden states.

Nothing switches the model to eager attention (but `relevance`, which needs all of it), and no layer runs that nobody
asks for. Names and shapes of the signals: ``core/signals.py``; those of the vision tower: ``vision.py``.
Letters: R images, N image tokens, B rows of the batch, L its tokens, T words, D width.
"""

from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...core.contract import Pruner
from ...core.errors import PruneZooError
from ...core.signals import DECODER_SIGNALS, MAP_KINDS, PREVIOUS, STATE_KINDS, WORD_KINDS, Signal, parse_signal
from ..encoded import Encoded
from ..families import find_family
from ..parts.decoder import Decoder
from ..parts.model import VLM
from .entry import ROWS, Entry
from .layer_maps import layer_map
from .layer_states import layer_states
from .relevance import relevance_map


def check_signals(needs: tuple[str, ...]) -> None:
    """Raise PruneZooError on a name that is no signal."""
    for name in needs:
        parse_signal(name)


def encode_needs(pruner: Pruner) -> tuple[str, ...]:
    """What `encode` has to bring for a pruner: the rest of its `needs` is made where it stands, in its own stage."""
    needs: dict[str, None] = {}
    for part, _ in pruner.parts(1.0):
        if part.stage == "prompt":
            needs |= dict.fromkeys(part.needs)
        elif part.stage == "layer":
            needs |= dict.fromkeys(name for name in part.needs if parse_signal(name).kind not in DECODER_SIGNALS)
    return tuple(needs)


class _Enough(Exception):
    """Raised in front of the last layer that is wanted: it and those behind it are not computed."""


def enter_layers(vlm: VLM, decoder: Decoder, encoded: Encoded, layers: Collection[int]) -> dict[int, Entry]:
    """Run the model up to the highest of some decoder layers, and no further, and record what enters them.

    Args:
        vlm: The model.
        decoder: Its decoder.
        encoded: The batch.
        layers: Which, from 0; at least one.

    Raises:
        PruneZooError: The decoder has no such layer.
    """
    last = max(layers)
    if last >= decoder.depth:
        raise PruneZooError(f"decoder layer {last} is wanted; this model's are 0 to {decoder.depth - 1}")
    entries: dict[int, Entry] = {}

    def watch(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mask = kwargs["attention_mask"]
            entries[layer] = Entry(args[0], kwargs["position_embeddings"], encoded.mask if mask is None else mask)
            if layer == last:
                raise _Enough

        return hook

    handles = [decoder.layers[layer].register_forward_pre_hook(watch(layer), with_kwargs=True) for layer in layers]
    try:
        with suppress(_Enough):
            vlm(**encoded.model_inputs(vlm), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return entries


def decoder_signals(
    vlm: VLM, encoded: Encoded, words: tuple[Tensor, Tensor], needs: tuple[str, ...]
) -> dict[str, Tensor]:
    """The signals among ``needs`` that come from the language model when it reads all tokens.

    The layers in front of the highest one wanted are run once more: for layer 0 there are none. `relevance` takes a
    pass through all of the model and back, for the model's own next token, whatever answer is in the labels.

    Args:
        vlm: The model that made ``encoded``.
        encoded: The batch.
        words: Columns of the prompt's words ``(B, T)``, ascending, and which of them are no filler ``(B, T)`` bool.
        needs: Names of signals.

    Returns:
        By name.

    Raises:
        PruneZooError: No such layer, or ``@previous``, which means something in the layer stage only.
    """
    wanted = {name: parse_signal(name) for name in needs if not parse_signal(name).is_vision}
    if not wanted or not len(encoded.sample):
        return {}
    for name, signal in wanted.items():
        if signal.at == PREVIOUS:
            raise PruneZooError(f"signal '{name}': '@{PREVIOUS}' is for pruners of the layer stage")
    signals: dict[str, Tensor] = {}
    layers = {name: signal.number or 0 for name, signal in wanted.items() if signal.kind in DECODER_SIGNALS}
    if layers:
        decoder = find_family(vlm).decoder()
        entries = enter_layers(vlm, decoder, encoded, set(layers.values()))
    for name, layer in layers.items():
        images = encoded.sample, encoded.slots, encoded.inputs.valid
        signals[name] = read_layer(decoder, wanted[name], layer, entries[layer], words, *images)
    if "relevance" in wanted:
        signals["relevance"] = _relevance(vlm, encoded, words)
    return signals


def read_layer(
    decoder: Decoder,
    signal: Signal,
    layer: int,
    entry: Entry,
    words: tuple[Tensor, Tensor],
    sample: Tensor,
    slots: Tensor,
    valid: Tensor,
) -> Tensor:
    """A signal of one layer of the language model, of what enters it.

    Args:
        decoder: The language model.
        signal: Of DECODER_SIGNALS.
        layer: Which, from 0.
        entry: What enters it.
        words: Columns of the prompt's words ``(B, T)``, ascending, and which of them are no filler ``(B, T)`` bool.
        sample: ``(R,)`` row of the batch that each image belongs to.
        slots: ``(R, N)`` column of each image token.
        valid: ``(R, N)`` bool, False for padding.

    Returns:
        With the axes of its kind; attention is float32.
    """
    own_words = words[0][sample], words[1][sample]
    if signal.kind in MAP_KINDS:
        return layer_map(decoder, signal, layer, entry, own_words, sample, (slots, valid))
    if signal.kind in STATE_KINDS:
        return layer_states(decoder, signal, layer, entry, sample, (slots, valid))
    if signal.kind in WORD_KINDS:
        return layer_states(decoder, signal, layer, entry, sample, own_words)
    return attention_to_images(decoder, signal, layer, entry, words, sample, slots, valid)


def attention_to_images(
    decoder: Decoder,
    signal: Signal,
    layer: int,
    entry: Entry,
    words: tuple[Tensor, Tensor],
    sample: Tensor,
    slots: Tensor,
    valid: Tensor,
) -> Tensor:
    """What attention the image tokens receive in one layer of the language model.

    Args:
        decoder: The language model.
        signal: From ``prompt_attention`` (all words behind the image), ``prompt_head_attention`` (likewise),
            ``last_attention`` (the last word), or ``self_attention`` (the image's own tokens).
        layer: Which, from 0.
        entry: What enters it.
        words: Columns of the prompt's words ``(B, T)``, ascending, and which of them are no filler ``(B, T)`` bool.
        sample: ``(R,)`` row of the batch that each image belongs to.
        slots: ``(R, N)`` column of each image token.
        valid: ``(R, N)`` bool, False for padding.

    Returns:
        ``(R, N)`` float32: the softmax weight, mean over heads and over the words, or over those of the image's tokens
        that may look at it; 0 where there is none. ``(R, N, H)`` for ``prompt_head_attention``. With ``+images`` the
        softmax is over the image's tokens ``valid``, and the weights of an image add up to 1.
    """
    if signal.kind == "self_attention":
        return _self_attention(decoder, layer, entry, signal.rotary, sample, slots, valid)
    columns, real = words
    if signal.kind == "last_attention":
        last = real.sum(1, keepdim=True)
        columns, real = columns.gather(1, (last - 1).clamp_min(0)), last > 0
    rotary = entry.rotary if signal.rotary else None
    read = decoder.attention_logits if signal.images else decoder.attention_rows
    rows = read(layer, entry.hidden, rotary, columns, entry.mask)  # (B, H, T, L)
    if signal.kind != "prompt_head_attention" and not signal.images:
        rows = rows.mean(1, keepdim=True)  # before they are dealt out to images: less to hold
    counted = real[sample]  # (R, T)
    if signal.kind != "last_attention":
        counted = counted & (columns[sample] > slots.amax(1, keepdim=True))
    seen = rows[sample].gather(3, slots[:, None, None].expand(-1, *rows.shape[1:3], -1))  # (R, H or 1, T, N)
    if signal.images:
        seen = seen.masked_fill(~valid[:, None, None], -torch.inf).softmax(-1, dtype=torch.float32)
    mean = (seen * counted[:, None, :, None]).sum(2) / counted.sum(1).clamp_min(1)[:, None, None]
    return mean.transpose(1, 2) if signal.kind == "prompt_head_attention" else mean.mean(1)


def _self_attention(
    decoder: Decoder, layer: int, entry: Entry, rotary: bool, sample: Tensor, slots: Tensor, valid: Tensor
) -> Tensor:
    """What image tokens receive from one another, ``(R, N)``; arguments as in :func:`attention_to_images`."""
    entry = entry.of_images(sample)
    total, lookers = torch.zeros_like(slots, dtype=torch.float32), torch.zeros_like(slots)
    # Some rows at a time: the whole map of a large picture would be gigabytes.
    for rows, counted in zip(slots.split(ROWS, 1), valid.split(ROWS, 1), strict=True):
        weights = decoder.attention_rows(layer, entry.hidden, entry.rotary if rotary else None, rows, entry.mask)
        weights = weights.mean(1).gather(2, slots[:, None].expand(-1, rows.shape[1], -1)) * counted[..., None]
        total, lookers = total + weights.sum(1), lookers + (weights > 0).sum(1)
    return total / lookers.clamp_min(1)


def _relevance(vlm: VLM, encoded: Encoded, words: tuple[Tensor, Tensor]) -> Tensor:
    """The map of the model's own next token, with the answer, if there is one in the batch, cut off."""
    columns, real = words
    end = columns.masked_fill(~real, -1).amax(1, keepdim=True)
    before = torch.arange(encoded.mask.shape[1], device=end.device) <= end
    batch = {**encoded.batch, "attention_mask": (encoded.mask & before).long()}
    return relevance_map(vlm, replace(encoded, batch=batch, labels=None))
