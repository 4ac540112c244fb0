"""Where pruning meets a vision-language model of `transformers`: encode once, run full, pruned or gated, attach."""

from .attach import Attached, Attachment, attach
from .clip_text import ClipText
from .encode import encode
from .encoded import Encoded
from .run import PrunedRun, run_gated, run_pruned
from .signals.language import encode_needs
from .signals.roles import chat_markers
from .stages.prompt import HostOutput, full_forward, gated_forward, pruned_forward
from .stats import AttachStats, StageStats

__all__ = [
    "AttachStats",
    "Attached",
    "Attachment",
    "ClipText",
    "Encoded",
    "HostOutput",
    "PrunedRun",
    "StageStats",
    "attach",
    "chat_markers",
    "encode",
    "encode_needs",
    "full_forward",
    "gated_forward",
    "pruned_forward",
    "run_gated",
    "run_pruned",
]
