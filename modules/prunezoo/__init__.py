"""prunezoo: small learned visual-token pruners for frozen vision-language models."""

from .core.compiled import compile_pruner
from .core.config import PrunerConfig
from .core.contract import PruneInputs, PruneOutput, Pruner
from .core.errors import PruneZooError
from .core.hub import version
from .core.registry import AutoPruner, build_pruner, list_pruners, load_pruner, register_pruner
from .doctor import Diagnosis, Finding, doctor
from .host import ClipText, attach, encode, full_forward, gated_forward, pruned_forward
from .tokenizers.one_d_piece import OneDPiece

__version__ = version()

__all__ = [
    "AutoPruner",
    "ClipText",
    "Diagnosis",
    "Finding",
    "OneDPiece",
    "PruneInputs",
    "PruneOutput",
    "PruneZooError",
    "Pruner",
    "PrunerConfig",
    "__version__",
    "attach",
    "build_pruner",
    "compile_pruner",
    "doctor",
    "encode",
    "full_forward",
    "gated_forward",
    "list_pruners",
    "load_pruner",
    "pruned_forward",
    "register_pruner",
]
