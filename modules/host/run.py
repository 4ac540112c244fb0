"""One forward pass under any pruner, whatever its stage: what measuring and training call."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..core.contract import Keep, PruneOutput, Pruner
from ..core.errors import PruneZooError
from .encoded import Encoded
from .prompt import HostOutput, Positions, pruned_forward
from .vision import choose


@dataclass(frozen=True)
class PrunedRun:
    """What the frozen model said of fewer tokens, and how many it read."""

    host: HostOutput
    tokens: Tensor  # (R,) float: image tokens in the language model, mean over its layers
    output: PruneOutput  # the choice; of the last stage, where there are several


def run_pruned(
    vlm: PreTrainedModel,
    encoded: Encoded,
    pruner: Pruner,
    keep: Keep,
    positions: Positions = "original",
    **options: Any,
) -> PrunedRun:
    """Prune and read on.

    Args:
        vlm: The model that made ``encoded``.
        encoded: From :func:`encode`, with the signals that the pruner needs of the prompt and vision stage.
        pruner: Of any stage.
        keep: As in :meth:`Pruner.forward`; for the layer stage what its last stage leaves.
        positions: As in :func:`attach`.
        options: Passed to the model.
    """
    if pruner.stage == "layer":
        raise PruneZooError(f"pruner '{pruner.name}' is of the layer stage, which does not run")
    with pruner.adapt(vlm):
        output = choose(vlm, encoded, pruner, keep)
        host = pruned_forward(vlm, encoded, output, positions, **options)
    return PrunedRun(host, encoded.tokens_left(output).float(), output)
