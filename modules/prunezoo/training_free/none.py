"""No tokens: what the language model answers blind. The floor of every table."""

import torch
from torch import Tensor

from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.plan import mask_to_index
from ..core.registry import register_pruner


@register_pruner("none")
class NonePruner(Pruner):
    """Drops every token, whatever the budget; the image leaves no trace in the prompt."""

    criteria = ("none",)
    exact = False

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Nothing at all: K is 0."""
        index, valid = mask_to_index(torch.zeros_like(inputs.valid))
        return PruneOutput(index=index, valid=valid)
