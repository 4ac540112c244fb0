"""From encoded images to what is kept of each: tensors alone, nothing of vLLM.

Letters: R images, n tokens of one (newlines among them), N patches, K kept patches, k tokens left, D width, T words.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..core.budgets import upload
from ..core.contract import PruneInputs, Pruner
from ..core.signals import stack_images
from ..host.families import Visual


@dataclass(frozen=True)
class Kept:
    """What is left of an image."""

    features: Tensor  # (k, D)
    slots: Tensor  # (k,) long: which of its n tokens each is, or stands for; ascending


def prune_images(
    pruner: Pruner, visuals: Sequence[Visual], counts: Sequence[int], text: Sequence[Tensor] | None
) -> list[Kept]:
    """Bring images to so many tokens.

    Args:
        pruner: On the images' device.
        visuals: The R images.
        counts: (R) tokens to keep of each.
        text: (R) embedded words ``(T, D)`` of the prompt that each belongs to, where the pruner reads them.
    """
    inputs = lay_out(visuals, text)
    output = pruner(inputs, torch.tensor(counts))
    features = output.kept_features(inputs).to(inputs.features.dtype)
    return [Kept(own[:n], index[:n]) for own, index, n in zip(features, output.index, counts, strict=True)]


def lay_out(visuals: Sequence[Visual], text: Sequence[Tensor] | None) -> PruneInputs:
    """Images of one size or several as a pruner takes them."""
    device, known = visuals[0].features.device, tuple(len(visual.cells) for visual in visuals)
    valid = torch.arange(max(known)) < torch.tensor(known)[:, None]
    cells = pad_sequence([visual.cells for visual in visuals], batch_first=True, padding_value=-1)
    words = text_valid = None
    if text is not None:
        words = pad_sequence(list(text), batch_first=True)
        text_valid = torch.arange(words.shape[1]) < torch.tensor([len(own) for own in text])[:, None]
        text_valid = text_valid.to(device)
    signals = {name: stack_images([visual.signals[name] for visual in visuals]) for name in visuals[0].signals}
    return PruneInputs(
        pad_sequence([visual.features for visual in visuals], batch_first=True),
        valid.to(device),
        cells.to(device),
        words,
        text_valid,
        signals,
        sample=upload(range(len(known)), device),
        known=known,
        host_cells=cells.numpy(),
    )
