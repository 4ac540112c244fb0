"""What a pruner's own work is beside the prefill that it makes shorter, in floating-point operations.

Counted by torch as they happen, on tokens made up here: the operations of a pruner hang on sizes alone.
"""

import math
from typing import Any

import torch

from prunezoo.core.contract import PruneInputs, Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.prefill import KEPT, Prefill
from trainers.benchmarking.flops import counted_flops

from .models import load_config


def made_up(prefill: Prefill, width: int) -> PruneInputs:
    """One picture, a square as far as it goes, and its prompt, in tokens of a width."""
    n, t = prefill.tokens, prefill.words
    side, place = math.ceil(math.sqrt(n)), torch.arange(n)
    cells = torch.stack([torch.zeros_like(place), place // side, place % side], dim=-1)[None]
    valid, real = torch.ones(1, n, dtype=torch.bool), torch.ones(1, t, dtype=torch.bool)
    random = torch.Generator().manual_seed(0)
    features, words = (torch.randn(1, count, width, generator=random) for count in (n, t))
    return PruneInputs(features, valid, cells, words, real, known=(n,), host_cells=cells.numpy())


@torch.no_grad()
def prefill_share(pruner: Pruner, config: Any) -> float | None:
    """Operations of a pruner that keeps 1/9 of a picture, over those of the language model on all its tokens.

    Args:
        pruner: Ready to be used, for a model of this configuration.
        config: Of the vision-language model.

    Returns:
        The share; None where it cannot be counted so: the pruner is not of the prompt stage, or reads signals of the
        model, whose work is the model's own; or the decoder is of a kind that is not counted.
    """
    prefill = Prefill.of(config)
    if prefill is None or pruner.stage != "prompt" or pruner.needs:
        return None
    inputs = made_up(prefill, config.get_text_config().hidden_size)
    return counted_flops(lambda: pruner(inputs, 1 / KEPT))[1] / prefill.flops


def share_on(pruner: Pruner, vlm: str) -> float | None:
    """The same by a model's folder or Hub id; None too where its configuration is not on this machine.

    The Hub is not asked: a card must not wait for a network that may not be there.
    """
    try:
        config, _ = load_config(vlm, download=False)
    except PruneZooError:
        return None
    return prefill_share(pruner, config)
