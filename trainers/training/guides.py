"""What the frozen model itself says about which image tokens matter: the guides that a pruner warms up on.

Letters: B images (one a sample), N image tokens, S answer slots of the whole batch, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from prunezoo.core.plan import mask_to_index
from prunezoo.core.signals import parse_signal
from prunezoo.host import Encoded, HostOutput, full_forward, gated_forward
from prunezoo.host.families import find_family
from prunezoo.host.signals.language import Entry, attention_to_images, enter_layers
from trainers.data.conversation import IGNORED

from .losses import answer_slots

Rows = Literal["prompt", "all"]
FAR = 50.0
"""Below an image's largest attention logit: less is as good as nothing."""


def relevance(vlm: Any, encoded: Encoded, answer: Literal["reference", "top"] = "reference") -> tuple[Tensor, Tensor]:
    """How much an answer token's log-odds move when an image token's attention keys are dimmed.

    |d log-odds / d log gate| at gates of 1, through all layers at once: first-order token removal, as in Molchanov
    et al. (arXiv 1611.06440) and, for attention masks of heads, Michel et al. (arXiv 1905.10650). Log-odds, because
    the gradient of a log-likelihood fades where the model is sure. One answer slot a sample, drawn at random: each
    digit of a number has its own image tokens, and a sum over slots hides those of the slots that the model is surest
    of. A loss that is linear in the guide sees the mean of the slots' maps all the same, at the price of one forward
    and one backward pass.

    Args:
        vlm: The frozen model.
        encoded: A batch with labels, images encoded.
        answer: The reference answer, or what the model itself thinks best at each answer slot (then no label is needed
            but for its length).

    Returns:
        relevance (B, N) float32, at least 0, 0 on padding; the full model's logits (S, V) at the answer slots.
    """
    valid = encoded.inputs.valid
    with torch.enable_grad():
        gates = torch.ones(valid.shape, device=valid.device, requires_grad=True)
        odds, logits = slot_odds(gated_forward(vlm, encoded, gates), answer)
        (gradient,) = torch.autograd.grad(odds.sum(), gates)  # d/d gate and d/d log gate are one at a gate of 1
    return gradient.abs() * valid, logits.detach()


def slot_odds(out: HostOutput, answer: Literal["reference", "top"] = "reference") -> tuple[Tensor, Tensor]:
    """The log-odds of one answer token a sample, drawn at random, and the logits at all answer slots.

    Args:
        out: Of a forward pass on a batch with labels.
        answer: As of `relevance`.

    Returns:
        (number of samples with a slot,) and (S, V); the latter without gradient.
    """
    logits, tokens, sample = answer_slots(out.logits, out.labels)
    if answer == "top":
        tokens = logits.argmax(-1)
    chosen = one_slot_each(sample)
    place = tokens[chosen, None]
    others = logits[chosen].scatter(-1, place, -torch.inf).logsumexp(-1)
    return logits[chosen].gather(-1, place)[:, 0] - others, logits.detach()


def one_slot_each(sample: Tensor) -> Tensor:
    """A random answer slot of every sample: indices into the slots, (number of samples with a slot,).

    Args:
        sample: (S,) the sample of each slot, ascending.
    """
    draw = torch.rand(len(sample), device=sample.device)
    shuffled = (sample + draw).argsort()  # within each sample a random order, samples one after another
    first = torch.ones_like(sample, dtype=torch.bool)
    first[1:] = sample[1:] != sample[:-1]
    return shuffled[first]


def attention_guide(
    vlm: Any, encoded: Encoded, layers: Sequence[int] | None, rows: Rows = "prompt"
) -> tuple[Tensor, Tensor]:
    """The attention that image tokens receive in some layers, mean over heads, layers and the words after the image.

    Of one guide layer it is CoViPAL's guide (arXiv 2508.17243); the paper sums over heads and over the last rows of the
    attention map, without saying clearly which, and no label enters. Of all layers, with the answer's words, it is the
    map that Fast3D (arXiv 2507.09334) teaches.

    Args:
        vlm: The frozen model.
        encoded: A batch with labels, images encoded.
        layers: Which decoder layers, from 0; None: all.
        rows: Whose attention: that of the words of the "prompt", or with those of the answer of "all".

    Returns:
        attention (B, N) float32; the full model's logits (S, V) at the answer slots.
    """
    out = full_forward(vlm, encoded, output_hidden_states=True)
    assert out.hidden_states is not None and encoded.labels is not None
    depth = len(out.hidden_states) - 1
    layers = range(depth) if layers is None else layers
    for layer in layers:
        if not 0 <= layer < depth:
            raise PruneZooError(f"guide_layer={layer}: the decoder has layers 0 to {depth - 1}")
    words = encoded.mask & ((encoded.labels == IGNORED) | (rows == "all"))
    sample = encoded.sample[:, None].expand_as(encoded.slots)
    words[sample[encoded.inputs.valid], encoded.slots[encoded.inputs.valid]] = False
    positions = torch.arange(words.shape[1], device=words.device).expand_as(words)
    decoder, signal = find_family(vlm).decoder(), parse_signal("prompt_attention")
    images = encoded.sample, encoded.slots, encoded.inputs.valid
    attention = torch.zeros_like(encoded.slots, dtype=torch.float32)
    for layer in layers:
        hidden = out.hidden_states[layer]
        entry = Entry(hidden, decoder.rotary(hidden, positions), encoded.mask)
        attention += attention_to_images(decoder, signal, layer, entry, mask_to_index(words), *images)
    return attention * encoded.inputs.valid / len(layers), answer_slots(out.logits, out.labels)[0]


@torch.no_grad()
def last_word_logits(vlm: Any, encoded: Encoded, layers: Sequence[int]) -> Tensor:
    """What the softmax of some layers' attention is taken of, from the prompt's last word to the image tokens.

    Args:
        vlm: The frozen model.
        encoded: A batch with labels, images encoded.
        layers: R decoder layers, from 0. Those behind the last of them do not run.

    Returns:
        (B, R, H, N) float32 of each of the H heads; arbitrary on padding.
    """
    decoder = find_family(vlm).decoder()
    entries = enter_layers(vlm, decoder, encoded, set(layers))
    columns, real = encoded.words
    last = columns.gather(1, (real.sum(1, keepdim=True) - 1).clamp_min(0))
    maps = []
    for layer in layers:
        entry = entries[layer]
        rows = decoder.attention_logits(layer, entry.hidden, entry.rotary, last, entry.mask)[encoded.sample, :, 0]
        own = rows.gather(2, encoded.slots[:, None].expand(-1, rows.shape[1], -1)).float()
        maps.append(own.clamp_min(own.amax(2, keepdim=True) - FAR))  # what a window hides would drown the rest
    return torch.stack(maps, dim=1)
