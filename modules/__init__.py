"""prunezoo: small learned visual-token pruners for frozen vision-language models."""

from .core.contract import PruneInputs, PruneOutput, Pruner, PrunerConfig
from .core.errors import PruneZooError
from .core.registry import AutoPruner, build_pruner, list_pruners, load_pruner, register_pruner

__all__ = [
    "AutoPruner",
    "PruneInputs",
    "PruneOutput",
    "PruneZooError",
    "Pruner",
    "PrunerConfig",
    "build_pruner",
    "list_pruners",
    "load_pruner",
    "register_pruner",
]
