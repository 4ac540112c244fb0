"""Guides by name: what the frozen model says about which image tokens matter, each by one function.

Letters: B images (one a sample), N image tokens, S answer slots of the whole batch, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from prunezoo.host import Encoded, full_forward
from prunezoo.host.signals.relevance import relevance_map

from .guide_lrp import lrp
from .guide_provenance import provenance
from .guides import Rows, attention_guide, relevance
from .losses import answer_slots

GuideName = Literal["relevance", "attention", "grad_attention", "lrp", "provenance"]
GRAD_ATTENTION: GuideName = "grad_attention"
Guide = Callable[[Any, Encoded], tuple[Tensor, Tensor]]
"""Of a model and a batch with labels: a map (B, N) float32, at least 0, 0 on padding; the full model's logits (S, V) at
the answer slots."""


def grad_attention(vlm: Any, encoded: Encoded, max_tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Gradient-weighted attention, rolled out; see :func:`relevance_map`. One backward pass a token of the answer."""
    with torch.no_grad():
        out = full_forward(vlm, encoded)
    return relevance_map(vlm, encoded, max_tokens), answer_slots(out.logits, out.labels)[0]


def attention(vlm: Any, encoded: Encoded, layers: Sequence[int] | None = None, rows: Rows = "prompt") -> Any:
    """See :func:`attention_guide`; by default of all layers."""
    with torch.no_grad():
        return attention_guide(vlm, encoded, layers, rows)


GUIDES: Mapping[str, Guide] = {
    "relevance": relevance,
    "attention": attention,
    "grad_attention": grad_attention,
    "lrp": lrp,
    "provenance": provenance,
}


def find_guide(name: str, **options: Any) -> Guide:
    """A guide by name.

    Args:
        name: Of GUIDES.
        options: What that guide takes besides.

    Raises:
        PruneZooError: There is none of that name.
    """
    if name not in GUIDES:
        raise PruneZooError(f"guide={name}: there are {', '.join(get_args(GuideName))}")
    return partial(GUIDES[name], **options)


def fixed(guide: Guide, vlm: Any, encoded: Encoded) -> Tensor:
    """The map (B, N) of a guide, that draws the same answer slots whenever it is asked about this batch."""
    with torch.random.fork_rng(devices=[] if vlm.device.type == "cpu" else [vlm.device]):
        torch.manual_seed(0)
        return guide(vlm, encoded)[0]
