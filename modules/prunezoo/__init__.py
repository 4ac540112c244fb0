"""prunezoo: small learned visual-token pruners for frozen vision-language models."""

from .core.compiled import compile_pruner
from .core.config import PrunerConfig
from .core.contract import PruneInputs, PruneOutput, Pruner
from .core.errors import PruneZooError
from .core.hub import version
from .core.registry import AutoPruner, build_pruner, list_pruners, load_pruner, register_pruner
from .doctor import Diagnosis, Finding, doctor
from .host import ClipText, attach, encode, full_forward, gated_forward, pruned_forward
from .tokenizers.base import Text, load_tokenizer
from .tokenizers.captions import embed_captions
from .tokenizers.instella import Instella
from .tokenizers.one_d_piece import OneDPiece
from .tokenizers.textok import TexTok
from .tokenizers.tokenflow import TokenFlow

__version__ = version()

__all__ = [
    "AutoPruner",
    "ClipText",
    "Diagnosis",
    "Finding",
    "Instella",
    "OneDPiece",
    "PruneInputs",
    "PruneOutput",
    "PruneZooError",
    "Pruner",
    "PrunerConfig",
    "TexTok",
    "Text",
    "TokenFlow",
    "__version__",
    "attach",
    "build_pruner",
    "compile_pruner",
    "doctor",
    "embed_captions",
    "encode",
    "full_forward",
    "gated_forward",
    "list_pruners",
    "load_pruner",
    "load_tokenizer",
    "pruned_forward",
    "register_pruner",
]
