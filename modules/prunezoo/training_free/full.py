"""All tokens: the bare model, under the contract, so that it stands in every table as one more row."""

import torch
from torch import Tensor

from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.plan import mask_to_index
from ..core.registry import register_pruner


@register_pruner("full")
class FullPruner(Pruner):
    """Keeps every token, whatever the budget."""

    criteria = ("none",)
    exact = False

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Everything that is valid."""
        if inputs.host_cells is None:
            return PruneOutput(*mask_to_index(inputs.valid, max(inputs.counts)), known=inputs.counts)
        index = torch.arange(inputs.valid.shape[1], device=inputs.valid.device)  # tokens come first, then padding
        return PruneOutput(index * inputs.valid, inputs.valid, known=inputs.counts)
