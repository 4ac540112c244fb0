"""All tokens: the bare model, under the contract, so that it stands in every table as one more row."""

from torch import Tensor

from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.plan import mask_to_index
from ..core.registry import register_pruner


@register_pruner("full")
class FullPruner(Pruner):
    """Keeps every token, whatever the budget."""

    exact = False

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Everything that is valid."""
        index, valid = mask_to_index(inputs.valid)
        return PruneOutput(index=index, valid=valid)
