"""Provenance: whence comes what the words of the prompt hold, by attention rolled out from the first layer on.

The guide of DVT (https://github.com/NaomiEX/DynamicVisualTokenPruning, May 2026; it has no licence, so this is written
from a description and nothing of it is here). Image token n is a column of P, at first 1 in its own row;
each layer makes P = (beta I + (1 - beta) A) P, A its attention, mean over heads. What the words read in a layer is
A P in their rows. Attention that looks at all before it alike, put through the same, says what a token has for its
place alone; a row is divided by that to the power of `alpha`, and by its sum. No gradient is needed, and no answer.

| | authors' code | ours |
|---|---|---|
| layer that is read | 10 of 28 | as far in: 10/28 of the depth |
| words | text rows | those of the prompt behind the image, without the answer |
| models | Qwen2.5-VL | those whose layers give their attention |

Letters: R images, N image tokens, S answer slots of the whole batch, V vocabulary, B rows of the batch, L tokens.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from prunezoo.core.errors import PruneZooError
from prunezoo.host import Encoded, full_forward
from prunezoo.host.families import find_family
from prunezoo.host.signals.relevance import eager_attention
from trainers.data.conversation import IGNORED

from .losses import answer_slots

ALPHA = BETA = 0.5
DEPTH = 10 / 28
LEAST = 1e-4
"""Of what a token has for its place."""


@torch.no_grad()
def provenance(vlm: Any, encoded: Encoded) -> tuple[Tensor, Tensor]:
    """How much of what the prompt's words read comes from each image token, over what its place would give it.

    Args:
        vlm: The frozen model; its language model uses eager attention for this one pass.
        encoded: A batch with labels, images encoded.

    Returns:
        (R, N) float32, at least 0, 0 on padding, the sum of an image's tokens 1 if words stand behind it; the full
        model's logits (S, V) at the answer slots.

    Raises:
        PruneZooError: A layer up to the one that is read has no attention to give.
    """
    layers = find_family(vlm).decoder().layers
    wanted = layers[: round(DEPTH * len(layers)) + 1]
    walk = Walk(encoded, len(wanted))
    with eager_attention(vlm), ExitStack() as stack:
        for number, layer in enumerate(wanted):
            attention = getattr(layer, "self_attn", None)
            if attention is None:
                raise PruneZooError(_no_attention(number))
            stack.callback(attention.register_forward_hook(walk.step).remove)
        out = full_forward(vlm, encoded)
    return walk.label(), answer_slots(out.logits, out.labels)[0]


def _no_attention(layer: int) -> str:
    return f"guide provenance: decoder layer {layer} gives no attention weights; set guide=relevance, which needs none"


class Walk:
    """P, layer by layer, by the model's attention and by even attention.

    Args:
        encoded: The batch.
        layers: How many layers there are to go; the last one is read.
    """

    def __init__(self, encoded: Encoded, layers: int) -> None:
        self.encoded, self.left, self.number = encoded, layers, 0
        valid, mask = encoded.inputs.valid, encoded.mask
        start = torch.zeros(*valid.shape, mask.shape[1], device=valid.device)
        self.start = start.scatter(2, encoded.slots[..., None], valid[..., None].float()).mT  # (R, L, N)
        self.by_model = self.by_place = self.start

    def step(self, _: nn.Module, __: Any, given: Sequence[Tensor | None]) -> None:
        """One layer, of what its attention gave: states, and weights (B, H, L, L)."""
        weights = given[1]
        if weights is None:
            raise PruneZooError(_no_attention(self.number))
        self.number += 1
        attention = weights.mean(1, dtype=torch.float32)[self.encoded.sample]
        even = even_attention(self.encoded.mask)[self.encoded.sample]
        own, place = attention @ self.by_model, even @ self.by_place  # (R, L, N)
        if self.number < self.left:
            own, place = (BETA * old + (1 - BETA) * new for old, new in ((self.by_model, own), (self.by_place, place)))
        self.by_model, self.by_place = own, place

    def label(self) -> Tensor:
        """``(R, N)``: mean over the prompt's words behind the image."""
        encoded = self.encoded
        words = encoded.mask if encoded.labels is None else encoded.mask & (encoded.labels == IGNORED)
        columns = torch.arange(words.shape[1], device=words.device)
        last = encoded.slots.masked_fill(~encoded.inputs.valid, 0).amax(1, keepdim=True)
        counted = words[encoded.sample] & (columns > last)
        for row in encoded.sample.unique():  # of several images in one prompt, none is a word
            own = encoded.sample == row
            counted[own] &= ~self.start[own].any(2).any(0)
        rows = self.by_model / self.by_place.clamp_min(LEAST) ** ALPHA
        rows = rows / rows.sum(2, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        mean = (rows * counted[..., None]).sum(1) / counted.sum(1, keepdim=True).clamp_min(1)
        return mean * encoded.inputs.valid


def even_attention(mask: Tensor) -> Tensor:
    """``(B, L, L)``: attention that looks alike at all real columns ``(B, L)`` up to its own."""
    seen = (mask[:, None] & mask[:, :, None]).tril().float()
    return seen / seen.sum(2, keepdim=True).clamp_min(1)
