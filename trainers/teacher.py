"""What the frozen model itself says about which image tokens matter: the guides that a pruner warms up on.

Letters: B images (one a sample), N image tokens, S answer slots of the whole batch, V vocabulary.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from modules.core.errors import PruneZooError
from modules.core.plan import mask_to_index
from modules.host import Encoded, full_forward, gated_forward
from modules.host.families import find_family
from modules.host.signals import prompt_attention

from .data.conversation import IGNORED
from .losses import answer_slots


def relevance(vlm: Any, encoded: Encoded, answer: Literal["reference", "top"] = "reference") -> tuple[Tensor, Tensor]:
    """How much the answer's log-likelihood moves when an image token's attention keys are dimmed.

    |d log p(answer) / d log gate| at gates of 1, through all layers at once: first-order token removal, as in Molchanov
    et al. (arXiv 1611.06440) and, for attention masks of heads, Michel et al. (arXiv 1905.10650). One forward and one
    backward pass of the frozen model; no label is needed with ``top``.

    Args:
        vlm: The frozen model.
        encoded: A batch with labels, images encoded.
        answer: The reference answer, or what the model itself thinks best at each answer slot.

    Returns:
        relevance (B, N) float32, at least 0, 0 on padding; the full model's logits (S, V) at the answer slots.
    """
    valid = encoded.inputs.valid
    with torch.enable_grad():
        gates = torch.ones(valid.shape, device=valid.device, requires_grad=True)
        out = gated_forward(vlm, encoded, gates)
        logits, tokens, _ = answer_slots(out.logits, out.labels)
        if answer == "top":
            tokens = logits.argmax(-1)
        likelihood = logits.log_softmax(-1).gather(-1, tokens[:, None]).sum()
        (gradient,) = torch.autograd.grad(likelihood, gates)  # d/d gate and d/d log gate are one at a gate of 1
    return gradient.abs() * valid, logits.detach()


def attention_guide(vlm: Any, encoded: Encoded, layer: int) -> tuple[Tensor, Tensor]:
    """The attention that image tokens receive from the prompt in a guide layer (CoViPAL, arXiv 2508.17243).

    The paper sums over heads and over the last rows of the attention map, without saying clearly which; here it is the
    mean over heads and over the words after the image. No label enters.

    Args:
        vlm: The frozen model.
        encoded: A batch with labels, images encoded.
        layer: Which decoder layer, from 0.

    Returns:
        attention (B, N) float32; the full model's logits (S, V) at the answer slots.
    """
    out = full_forward(vlm, encoded, output_hidden_states=True)
    assert out.hidden_states is not None and encoded.labels is not None
    if not 0 <= layer < len(out.hidden_states) - 1:
        raise PruneZooError(f"guide_layer={layer}: the decoder has layers 0 to {len(out.hidden_states) - 2}")
    words = encoded.mask & (encoded.labels == IGNORED)
    rows = encoded.sample[:, None].expand_as(encoded.slots)
    words[rows[encoded.inputs.valid], encoded.slots[encoded.inputs.valid]] = False
    positions = torch.arange(words.shape[1], device=words.device).expand_as(words)
    attention = prompt_attention(
        find_family(vlm),
        out.hidden_states[layer],
        encoded.mask,
        positions,
        mask_to_index(words),
        encoded.sample,
        encoded.slots,
        layer,
    )
    return attention * encoded.inputs.valid, answer_slots(out.logits, out.labels)[0]
