"""Uniform grid of cells in front of the vision tower: each is seen at full size, and what lies between is not seen.

As `uniform`. A smaller picture at the same number of tokens (`max_pixels` of a processor) sees all of it, less sharply,
and is the rival to hold every method of this stage against.
"""

from ..core.registry import register_pruner
from .uniform import UniformPruner


@register_pruner("uniform_input")
class UniformInput(UniformPruner):
    """Evenly spread cells, before the tower."""

    stage = "input"
