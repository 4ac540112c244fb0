"""What a decoder layer makes of single tokens: states, keys, what attention and MLP change, neurons.

Letters: R images, M tokens of an image or of its prompt, D width, F neurons, H heads of keys.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ...core.signals import Signal
from ..parts.decoder import Decoder
from .entry import Entry


def layer_states(
    decoder: Decoder, signal: Signal, layer: int, entry: Entry, sample: Tensor, places: tuple[Tensor, Tensor]
) -> Tensor:
    """A signal of tokens in one layer. The layer's attention is run once more where what follows it is wanted.

    Args:
        decoder: The language model.
        signal: Of STATE_KINDS or WORD_KINDS.
        layer: Which, from 0.
        entry: What enters it.
        sample: ``(R,)`` row of the batch that each image belongs to.
        places: ``(R, M)`` columns of the tokens, and which of them count ``(R, M)`` bool.

    Returns:
        ``(R, M, ...)``; 0 where a token does not count.
    """
    columns, counts = places

    def take(values: Tensor) -> Tensor:
        return values[sample[:, None], columns]

    match signal.kind.removeprefix("word_"):
        case "hidden_states":
            made = take(entry.hidden)
        case "normed_states":
            made = decoder.model.norm(take(entry.hidden))
        case "layer_keys":
            made = take(decoder.keys(layer, entry.hidden, entry.rotary if signal.rotary else None))
        case "attention_change":
            taken, gave, _ = entry.attended(decoder, layer)
            made = change(take(taken), take(gave))
        case other:
            taken, neurons = decoder.neurons(layer, take(entry.attended(decoder, layer)[2]))
            mlp = decoder.layers[layer].mlp
            made = neurons if other == "mlp_activations" else change(taken, mlp.down_proj(neurons))
    return made.masked_fill(~counts.view(*counts.shape, *[1] * (made.dim() - 2)), 0)


def change(before: Tensor, after: Tensor) -> Tensor:
    """``(..., 2)`` float32: norm of ``after (..., D)`` over that of ``before (..., D)``, and their cosine."""
    before, after = before.float(), after.float()
    tiny = torch.finfo(torch.float32).tiny
    ratio = after.norm(dim=-1) / before.norm(dim=-1).clamp_min(tiny)
    return torch.stack([ratio, functional.cosine_similarity(before, after, dim=-1)], -1)
