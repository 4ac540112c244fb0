"""prunezoo: small learned visual-token pruners for frozen vision-language models."""

from .core.config import PrunerConfig
from .core.contract import PruneInputs, PruneOutput, Pruner
from .core.errors import PruneZooError
from .core.registry import AutoPruner, build_pruner, list_pruners, load_pruner, register_pruner
from .host import ClipText, attach, encode, full_forward, gated_forward, pruned_forward
from .tokenizers.one_d_piece import OneDPiece

__all__ = [
    "AutoPruner",
    "ClipText",
    "OneDPiece",
    "PruneInputs",
    "PruneOutput",
    "PruneZooError",
    "Pruner",
    "PrunerConfig",
    "attach",
    "build_pruner",
    "encode",
    "full_forward",
    "gated_forward",
    "list_pruners",
    "load_pruner",
    "pruned_forward",
    "register_pruner",
]
