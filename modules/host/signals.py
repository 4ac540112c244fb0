"""Signals that pruners may ask for, each computed only when asked, and only the rows of attention that it needs.

Nothing switches the model to eager attention: queries and keys are tapped, and the few wanted rows are made from them.
Letters: R images, N image tokens, T prompt tokens, B rows of the batch, L prompt length, P tokens before the patches.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..core.errors import PruneZooError
from ..core.signals import parse_signal
from .decoder import Decoder
from .tower import VisionAttention


def check_signals(needs: tuple[str, ...]) -> None:
    """Raise PruneZooError on a name that is no signal."""
    for name in needs:
        parse_signal(name)


@contextmanager
def tap(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """Record the outputs of ``modules`` while the block runs; the list holds one tensor each, in their order."""
    seen: dict[int, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _module, _args, output, slot=slot: seen.__setitem__(slot, output))
        for slot, module in enumerate(modules)
    ]
    outputs: list[Tensor] = []
    try:
        yield outputs
        outputs.extend(seen[slot] for slot in range(len(modules)))
    finally:
        for handle in handles:
            handle.remove()


def vision_signals(needs: tuple[str, ...], attention: VisionAttention, query: Tensor, key: Tensor) -> dict[str, Tensor]:
    """The vision tower's signals.

    Args:
        needs: Names wanted; others than the vision tower's are ignored.
        attention: Whose queries and keys these are.
        query: ``(R, P + N, heads * d)``.
        key: Likewise.

    Returns:
        By name: ``cls_attention (R, N)``, the softmax row of CLS, mean over heads (the CLS column cut off, not
        renormalised); ``received_attention (R, N)``, the mean over all rows and heads; ``vision_keys (R, N, heads*d)``.
    """
    signals: dict[str, Tensor] = {}
    if "vision_keys" in needs:
        signals["vision_keys"] = key[:, attention.prefix :]
    heads_key = key.unflatten(-1, (attention.heads, -1)).permute(0, 2, 3, 1)  # (R, heads, d, P + N)
    heads_query = query.unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # (R, heads, P + N, d)
    if "cls_attention" in needs:
        if attention.cls is None:
            raise PruneZooError("this vision tower has no CLS token: use a pruner that reads 'received_attention'")
        row = heads_query[:, :, attention.cls : attention.cls + 1] @ heads_key
        weights = (row * attention.scale).softmax(-1, dtype=torch.float32).mean(1)[:, 0]
        signals["cls_attention"] = weights[:, attention.prefix :]
    if "received_attention" in needs:
        # One head at a time: the whole map of a large tower would be gigabytes.
        received = torch.stack(
            [
                ((heads_query[:, h] @ heads_key[:, h]) * attention.scale).softmax(-1, dtype=torch.float32).mean(1)
                for h in range(attention.heads)
            ]
        ).mean(0)
        signals["received_attention"] = received[:, attention.prefix :]
    return signals


def prompt_attention(
    decoder: Decoder,
    hidden: Tensor,
    mask: Tensor,
    positions: Tensor,
    prompt: tuple[Tensor, Tensor],
    sample: Tensor,
    slots: Tensor,
    layer: int = 0,
) -> Tensor:
    """What the prompt's words attend to in one layer of the language model, the first by default.

    Args:
        decoder: The language model.
        hidden: ``(B, L, D)`` what enters that layer; for the first one the embedded prompt, images in place.
        mask: ``(B, L)`` bool, False for padding.
        positions: ``(B, L)`` position ids.
        prompt: Columns of the words ``(B, T)``, and which of them are no filler ``(B, T)`` bool.
        sample: ``(R,)`` row of the batch that each image belongs to.
        slots: ``(R, N)`` column of each image token.
        layer: which decoder layer, from 0.

    Returns:
        ``(R, N)`` float32: the softmax weight, mean over heads and over the words that follow the image (0: none do).
    """
    columns, real = prompt
    weights = decoder.attention_rows(layer, hidden, decoder.rotary(hidden, positions), columns, mask)  # (B, T, L)
    after = real[sample] & (columns[sample] > slots.amax(1, keepdim=True))  # (R, T)
    seen = weights[sample].gather(2, slots[:, None].expand(-1, columns.shape[1], -1))  # (R, T, N)
    return (seen * after[..., None]).sum(1) / after.sum(1, keepdim=True).clamp_min(1)
