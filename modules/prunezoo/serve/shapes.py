"""What an image takes of a prompt, told by the model's config and by what its processor says of the image's size.

vLLM must know it before the image is seen. Nothing of vLLM is needed here, and nothing is run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Self

from torch import Tensor

from ..core.errors import PruneZooError
from ..host.families import FAMILIES, Family
from .settings import Settings

PLAIN, SPATIAL = 1, 2
AXES = {"llava": PLAIN, "llava_next": PLAIN, "llava_onevision": PLAIN, "qwen2_vl": SPATIAL, "qwen2_5_vl": SPATIAL}
"""Families that are served, by ``config.model_type``, and in how many numbers a token of an image differs from where
its image begins: its place in the prompt, or height and width (its time is that of the image).
"""
DEEPSTACK = "vLLM's Transformers backend passes no features to the first decoder layers, as its deepstack needs"
WHY_NOT = {"qwen3_vl": DEEPSTACK, "qwen3_vl_moe": DEEPSTACK}
"""Why others that people ask for are not."""
DIVIDED = ("llava",)
"""Families that several processes may share (tensor parallel)."""
ALONE = ("llava_onevision",)
"""Families that read an image otherwise when it is not alone in its prompt: they are served one image a prompt."""


def family_of(config: Any, vlm: Any = None) -> Family:
    """The adapter of a model that is served, or of its config alone.

    Raises:
        PruneZooError: The family is not served; the message says why and which are.
    """
    kind = config.model_type
    if kind not in AXES:
        why = f": {WHY_NOT[kind]}" if kind in WHY_NOT else ""
        raise PruneZooError(f"model_type '{kind}' cannot be served{why}; {', '.join(AXES)} can")
    return FAMILIES[kind](SimpleNamespace(config=config) if vlm is None else vlm)


@dataclass(frozen=True)
class Shape:
    """An image whose tokens are still all there."""

    patches: int  # tokens that a pruner chooses from
    newlines: int  # tokens that end a row of patches: all stay, so that the count does not hang on what is kept
    extent: int  # positions that it takes: the text behind it stands so much further

    @classmethod
    def of(cls, config: Any, cells: Tensor) -> Self:
        """That of an image with tokens from ``cells (n, 3)``, as :meth:`Family.cells` says."""
        newlines = int((cells[:, 2] < 0).sum())
        extent = len(cells) if AXES[config.model_type] == PLAIN else int(cells.max()) + 1
        return cls(len(cells) - newlines, newlines, extent)

    def left(self, settings: Settings, asked: Any = None) -> int:
        """Tokens of it in the shorter prompt; arguments and errors as of :meth:`Settings.count`."""
        return settings.count(self.patches, asked) + self.newlines


def shapes_of(config: Any, fields: Mapping[str, Any]) -> list[Shape]:
    """Those of the images in what the model's processor made of them, in the order of their placeholders."""
    return [Shape.of(config, cells) for cells in family_of(config).cells("image", fields)]


def offsets_of(config: Any, cells: Tensor, slots: Tensor) -> Tensor:
    """``(k, A)``: how far the tokens ``slots (k,)`` of an image stand from where it begins, see `AXES`."""
    return slots[:, None] if AXES[config.model_type] == PLAIN else cells.to(slots.device)[slots, 1:]


def most_newlines(config: Any) -> int:
    """Rows of the largest grid of crops, which a newline each ends; 0 where there are none."""
    points = getattr(config, "image_grid_pinpoints", None)
    return max(height for height, _ in points) // config.vision_config.patch_size + 1 if points else 0
