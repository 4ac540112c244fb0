"""The layer stage, on the cache: what each layer has of a prompt that was cut, and the masks that fit it.

Letters: B samples, C copies of a sample (beams), L columns of the prompt, S columns left of it, Q columns of a forward,
M columns of a layer's cache, D width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.errors import PruneZooError
from ..parts.decoder import Decoder
from .layer_plan import LayerPlan

Keywords = dict[str, Any]
"""What the decoder hands a layer besides the hidden states."""


@dataclass(frozen=True)
class Segment:
    """What the layers behind a cut, up to the next one, have of the prompt."""

    first: int  # the first of these layers
    columns: Tensor  # (B * C, S) long: the original column of each
    valid: Tensor  # (B * C, S) bool: False for filler and padding
    full: bool  # all are valid
    moved: Tensor  # (B * C, S) long: how many tokens in front of each are gone

    def extend(self, length: int, behind: Tensor) -> tuple[Tensor, Tensor]:
        """Columns, and which of them may be seen, with ``behind (B * C, ...)`` after the prompt's ``length``."""
        later = torch.arange(length, length + behind.shape[1], device=behind.device).expand(len(self.columns), -1)
        return torch.cat([self.columns, later], 1), torch.cat([self.valid, behind], 1)


@dataclass(frozen=True)
class Past:
    """How a cache was cut."""

    length: int  # L
    segments: tuple[Segment, ...]

    def at(self, layer: int) -> Segment | None:
        """The segment of a layer; None in front of all cuts."""
        return next((s for s in reversed(self.segments) if s.first <= layer), None)


class Step:
    """A forward on a cache that was cut."""

    def __init__(self, plan: LayerPlan, past: Past, cache: Any, mask: Any) -> None:
        self.plan, self.decoder, self.past, self.cache, self.mask = plan, plan.decoder, past, cache, mask
        self.before = cache.get_seq_length()  # as if nothing had been cut: the first layer has everything
        if self.before < past.length:
            raise PruneZooError("this cache was cropped into its pruned prompt: pass the whole conversation again")
        self.memo: dict[Any, Keywords] = {}
        self.steps: int | None = None  # columns of the forward; later layers may be given the last of them only

    def layer(self, layer: int, hidden: Tensor, kwargs: Keywords) -> tuple[Tensor, Keywords]:
        """As :meth:`layer_prompt.Prompt.layer`."""
        segment = self.past.at(layer)
        self.steps = hidden.shape[1] if self.steps is None else self.steps
        if segment is None or self.decoder.recurrent(layer):  # a state has lost nothing that a mask could mend
            return hidden, kwargs
        key = segment.first, self.decoder.layer_type(layer), hidden.shape[1]
        if key not in self.memo:
            self.memo[key] = self.replacements(segment, layer, hidden, kwargs)
        return hidden, {**kwargs, **self.memo[key]}

    def replacements(self, segment: Segment, layer: int, hidden: Tensor, kwargs: Keywords) -> Keywords:
        """The mask that fits the layer's cache; and the positions where they are numbered anew."""
        rows, length, source = len(hidden), self.past.length, self.decoder.source(layer)
        steps = self.steps or hidden.shape[1]
        total = self.before + steps
        expected = segment.columns.shape[1] + self.before - length
        lent = steps if source != layer else 0  # its keys are those of a layer that has read these columns already
        if rows != len(segment.columns) or self.cache.get_seq_length(source) != expected + lent:
            raise PruneZooError("this cache is not as the pruner left it: pass the whole conversation again")
        behind = segment.valid.new_ones(rows, total - length)
        if self.mask is not None:
            if self.mask.dim() != 2 or self.mask.shape[1] < total:
                raise PruneZooError("a pruned cache needs the attention_mask of the whole conversation, (B, columns)")
            behind = self.mask[:, length:total].bool()
        columns, seen = segment.extend(length, behind)
        held = self.held(source, expected, lent)
        queries = columns[:, -hidden.shape[1] :]
        full = segment.full and bool(behind.all())
        changed: Keywords = {
            "attention_mask": cut_mask(
                self.decoder, layer, hidden, queries, columns[:, -held:], seen[:, -held:], full and steps == 1
            )
        }
        if self.plan.positions == "compact":
            positions = kwargs["position_ids"] - segment.moved[:, -1:]
            changed |= {
                "position_ids": positions,
                "position_embeddings": self.decoder.rotary(hidden, positions, layer),
            }
        return changed

    def held(self, source: int, expected: int, lent: int) -> int:
        """M: the columns whose keys a layer sees; where it slides, the last ones only."""
        if not lent:
            return int(self.cache.get_mask_sizes(self.steps, source)[0])
        own = self.cache.layers[source]
        return lent + (min(expected, own.sliding_window - 1) if own.is_sliding else expected)


def cut_mask(
    decoder: Decoder, layer: int, hidden: Tensor, queries: Tensor, keys: Tensor, seen: Tensor, plain: bool
) -> Tensor | None:
    """The causal mask between some columns, in the form that the decoder's attention takes.

    Args:
        decoder: The language model.
        layer: Which of its layers.
        hidden: What enters it; for type and device.
        queries: ``(B * C, Q)`` original columns.
        keys: ``(B * C, M)`` likewise.
        seen: ``(B * C, M)`` bool, False for what nobody may look at.
        plain: All keys may be seen, and either the queries are all of them or there is but one.

    Returns:
        None where the kernel's own causality will do; ``(B * C, M)`` bool for flash attention; else
        ``(B * C, 1, Q, M)`` bool, or float to add for eager attention.
    """
    window = decoder.window(layer)
    slides = window is not None and int(queries.amax() - keys.amin()) >= window
    if decoder.flash:
        if slides:
            raise PruneZooError(
                "flash attention counts its window over the tokens left: use attn_implementation 'sdpa'"
            )
        return None if plain else seen
    if plain and not slides and decoder.kernel == "sdpa":
        return None
    back = queries[:, :, None] - keys[:, None]
    allowed = (back >= 0) & seen[:, None]
    if window is not None:
        allowed &= back < window
    mask = allowed[:, None]
    if decoder.kernel == "sdpa":
        return mask
    return torch.zeros((), dtype=hidden.dtype, device=hidden.device).where(mask, torch.finfo(hidden.dtype).min)
