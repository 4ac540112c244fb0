"""What the frozen tower of a model sees of pictures, for a tokenizer that learns from it and for probes beside it.

Letters: B pictures, S side in pixels, G cells along a side, D width of the tower.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunezoo.core.errors import PruneZooError


class Sight:
    """The tower's states of the layer that the model reads, without the class token.

    Args:
        model: Of LLaVA's kin, in eval mode; it may be moved to another device afterwards.
        processor: Its processor, which says the mean and spread of pixels.
        source: The name of the model, for the message.

    Raises:
        PruneZooError: The model has no such tower.
    """

    def __init__(self, model: Any, processor: Any, source: str) -> None:
        if not hasattr(model.model, "vision_tower"):
            raise PruneZooError(f"{source}: a '{model.config.model_type}' has no vision_tower; take one of LLaVA's kin")
        self.model = model
        self.statistics = [torch.tensor(getattr(processor.image_processor, f"image_{of}")) for of in ("mean", "std")]

    @property
    def width(self) -> int:
        """D."""
        return self.model.config.vision_config.hidden_size

    @torch.no_grad()
    def patches(self, images: Tensor) -> Tensor:
        """The states ``(B, D, cells, cells)``, float32, at the tower's own cells, of pictures ``(B, 3, S, S)`` in
        [0, 1].
        """
        config = self.model.config
        side = config.vision_config.image_size
        mean, std = (values.to(images)[:, None, None] for values in self.statistics)
        pixels = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        out = self.model.model.vision_tower(((pixels - mean) / std).to(self.model.dtype), output_hidden_states=True)
        states = out.hidden_states[config.vision_feature_layer].float()
        cells = math.isqrt(states.shape[1])
        return states[:, -(cells**2) :].transpose(1, 2).unflatten(2, (cells, cells))  # the class token comes first

    def at(self, images: Tensor, grid: int) -> Tensor:
        """The same at G by G cells, ``(B, G², D)``."""
        return F.interpolate(self.patches(images), (grid, grid), mode="bilinear", antialias=True).flatten(2).mT
