"""From encoded images to what is kept of each: tensors alone, nothing of vLLM.

A pruner chooses from patches; newlines, which end a row of them in some families, all stay.
Letters: R images, n tokens of one (newlines among them), N patches, K kept patches, k tokens left, D width, T words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..core.budgets import upload
from ..core.contract import PruneInputs, Pruner
from ..core.signals import follow_tokens, stack_images
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
        counts: (R) tokens to keep of each, its newlines among them.
        text: (R) embedded words ``(T, D)`` of the prompt that each belongs to, where the pruner reads them.
    """
    patches = [_where(visual.cells[:, 2] >= 0) for visual in visuals]
    lines = [_where(visual.cells[:, 2] < 0) for visual in visuals]
    inputs = lay_out([_parted(*pair) for pair in zip(visuals, patches, lines, strict=True)], text)
    keep = [count - len(own) for count, own in zip(counts, lines, strict=True)]
    output = pruner(inputs, torch.tensor(keep))
    features = output.kept_features(inputs).to(inputs.features.dtype)
    kept = [Kept(own[:n], index[:n]) for own, index, n in zip(features, output.index, keep, strict=True)]
    return [_joined(*each) for each in zip(kept, visuals, patches, lines, strict=True)]


def _where(mask: Tensor) -> Tensor:
    """The set places of a mask ``(n,)`` of the host."""
    return torch.from_numpy(mask.numpy().nonzero()[0])


def _parted(visual: Visual, patches: Tensor, lines: Tensor) -> Visual:
    """An image without its newlines."""
    if not len(lines):
        return visual
    own = patches.to(visual.features.device)
    signals = {name: follow_tokens(name, v[None], own[None])[0] for name, v in visual.signals.items()}
    return replace(visual, features=visual.features[own], cells=visual.cells[patches], signals=signals)


def _joined(kept: Kept, visual: Visual, patches: Tensor, lines: Tensor) -> Kept:
    """What is kept of patches, with the newlines between it."""
    if not len(lines):
        return kept
    device = kept.slots.device
    slots = torch.cat([patches.to(device)[kept.slots], lines.to(device)])
    order = slots.argsort()
    return Kept(torch.cat([kept.features, visual.features[lines.to(device)]])[order], slots[order])


def lay_out(visuals: Sequence[Visual], text: Sequence[Tensor] | None) -> PruneInputs:
    """Images of one size or several, without newlines, as a pruner takes them."""
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
