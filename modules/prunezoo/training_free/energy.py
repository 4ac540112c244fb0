"""Energy: keep the cells of a picture that vary most, before the vision tower. Ours, a baseline of the input stage.

The score of a cell is the variance of its pixels, in each channel and each frame by itself, so that a plain cell has
none whatever its colour. It knows nothing of the cell's neighbours: of a striped wall it keeps everything.
"""

from torch import Tensor

from ..core.contract import PruneInputs, Pruner
from ..core.registry import register_pruner


@register_pruner("energy")
class Energy(Pruner):
    """Top cells by the variance of their pixels; `keep="auto"` drops those that are plain."""

    stage = "input"
    criteria = ("magnitude",)
    threshold = 0.0

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` float32: variance over the pixels of a channel, mean over channels and frames."""
        frames, channels, high, wide = inputs.pixels or (1, 1, 1, inputs.features.shape[-1])
        return inputs.features.float().unflatten(-1, (frames * channels, high * wide)).var(-1, correction=0).mean(-1)
