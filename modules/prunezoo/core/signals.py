"""The names of the signals that pruners may ask for in `Pruner.needs`, and how a name says where it is taken.

A name is ``kind``, perhaps ``@where``, perhaps ``+norope``, perhaps ``+images``: ``cls_attention``,
``received_attention@8`` (vision block 8), ``last_attention@previous`` (the decoder layer before the one in front of
which the pruner stands), ``prompt_attention@2+norope+images``. Shapes are those of images: R images, N image tokens.

========================= ================ ========================================================================
kind                      shape            what it is
========================= ================ ========================================================================
``cls_attention``         (R, N)           what CLS attends to in a vision block, mean over heads
``received_attention``    (R, N)           what a patch receives in a vision block, mean over heads and all rows
``vision_keys``           (R, N, H, d)     keys of a vision block, H heads
``vision_values``         (R, N, H, d)     values likewise
``prompt_attention``      (R, N)           what the prompt's words after the image attend to in a decoder layer, mean
``prompt_head_attention`` (R, N, H)        the same of each of its H heads
``last_attention``        (R, N)           what the prompt's last token attends to in a decoder layer, mean over heads
``self_attention``        (R, N)           what an image token receives in a decoder layer, mean over heads and over the
                                           image's own tokens that may see it
``hidden_states``         (R, N, D)        image tokens as they enter a decoder layer
``relevance``             (R, N)           gradient-weighted attention, rolled out over all decoder layers
========================= ================ ========================================================================

Vision kinds: ``@b`` is a block, from 0, or from the end if negative; without it the block whose output is projected,
and in the vision stage, which knows no other, the one inside which the pruner stands.
Decoder kinds: ``@l`` is a layer, from 0; without it layer 0 in the prompt stage, and in the layer stage the one in
front of which the pruner stands; ``@previous`` (layer stage only) the one before that. ``+norope`` leaves the rotary
embedding out of queries and keys. ``+images`` (what words attend to) takes the softmax over the image's own tokens
alone, so that each head and each word counts as much as any other, however little of it goes to the image.
"""

import re
from dataclasses import dataclass
from functools import cache

from .errors import PruneZooError

VISION_SIGNALS = ("cls_attention", "received_attention", "vision_keys", "vision_values")
ATTENTION_SIGNALS = ("prompt_attention", "prompt_head_attention", "last_attention", "self_attention")
WORD_SIGNALS = ("prompt_attention", "prompt_head_attention", "last_attention")
DECODER_SIGNALS = (*ATTENTION_SIGNALS, "hidden_states")
SIGNALS = (*VISION_SIGNALS, *DECODER_SIGNALS, "relevance")
PREVIOUS = "previous"


@dataclass(frozen=True)
class Signal:
    """A signal's name, taken apart."""

    kind: str
    at: int | str | None = None  # vision block or decoder layer; "previous"; None: the default of the kind
    rotary: bool = True
    images: bool = False  # whether the softmax is over the image's own tokens alone

    @property
    def number(self) -> int | None:
        """The block or layer, where it is given by number."""
        return self.at if isinstance(self.at, int) else None

    @property
    def is_vision(self) -> bool:
        """Whether it comes from the vision tower."""
        return self.kind in VISION_SIGNALS


@cache
def parse_signal(name: str) -> Signal:
    """Take a signal's name apart.

    Raises:
        PruneZooError: Not a signal's name; the message lists the kinds.
    """
    match = re.fullmatch(r"([a-z_]+)(?:@(-?\d+|previous))?(\+norope)?(\+images)?", name)
    if match is None or match[1] not in SIGNALS:
        raise PruneZooError(f"unknown signal '{name}'; known: {', '.join(SIGNALS)}, as 'kind', 'kind@where'")
    kind, where, norope, images = match.groups()
    at = where if where in (None, PREVIOUS) else int(where)
    if norope and kind not in ATTENTION_SIGNALS:
        raise PruneZooError(f"signal '{name}': +norope is for {', '.join(ATTENTION_SIGNALS)}")
    if images and kind not in WORD_SIGNALS:
        raise PruneZooError(f"signal '{name}': +images is for {', '.join(WORD_SIGNALS)}")
    if (kind == "relevance" and at is not None) or (at == PREVIOUS and kind in VISION_SIGNALS):
        raise PruneZooError(f"signal '{name}': '@{where}' means nothing for {kind}")
    if kind in DECODER_SIGNALS and isinstance(at, int) and at < 0:
        raise PruneZooError(f"signal '{name}': decoder layers are counted from 0")
    return Signal(kind, at, not norope, bool(images))
