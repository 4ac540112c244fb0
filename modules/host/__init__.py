"""Where pruning meets a vision-language model of `transformers`: encode once, run full, pruned or gated, attach."""

from .attach import Attachment, AttachStats, attach
from .encoded import Encoded, encode
from .prompt import HostOutput, full_forward, gated_forward, pruned_forward

__all__ = [
    "AttachStats",
    "Attachment",
    "Encoded",
    "HostOutput",
    "attach",
    "encode",
    "full_forward",
    "gated_forward",
    "pruned_forward",
]
