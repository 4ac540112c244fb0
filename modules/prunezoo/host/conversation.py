"""Going on with a conversation whose prompt was shortened in front of the language model.

The caller goes on counting the columns of their own prompt, while the cache holds those of the shorter one. What the
cache begins with is noted on the cache itself: so copies of it go on rightly too, and later `attach` blocks.

Letters: B rows, L columns of the caller's prompt, S of the shorter one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import PruneZooError
from .parts.model import KVCache

NOTE = "_prunezoo_prompt"
"""Attribute of a cache: the :class:`ShortPrompt` that it begins with."""


WHOLE = "whole"
"""Noted on a cache whose prompt had images and was not rewritten."""


@dataclass(frozen=True)
class ShortPrompt:
    """What a cache begins with whose prompt was rewritten."""

    ids: Tensor  # (B, S)
    mask: Tensor  # (B, S)
    last: Tensor  # (B, 1), or (axes, B, 1): the position of the prompt's last token
    length: int  # columns of the caller's prompt


def note(cache: KVCache, short: ShortPrompt | str | None) -> None:
    """Note what a cache begins with, a shortened prompt or a :data:`WHOLE` one; None: none with images."""
    if short is not None:
        setattr(cache, NOTE, short)
    else:
        vars(cache).pop(NOTE, None)


def noted(cache: KVCache | None) -> ShortPrompt | None:
    """What a filled cache begins with, if that was shortened."""
    found = getattr(cache, NOTE, None) if cache is not None and cache.get_seq_length() > 0 else None
    return found if isinstance(found, ShortPrompt) else None


def check_unnoted(cache: KVCache, kwargs: Mapping[str, Any], is_visual: Callable[[Tensor], Tensor]) -> None:
    """Refuse a call without pixels on a filled cache that begins with images, but not with a note of them.

    One made again from its tensors has lost its note, and nothing else tells how long its prompt was for the caller.

    Args:
        cache: A filled one, whose prompt was not shortened as far as is known.
        kwargs: The call's.
        is_visual: Which ids stand for images.

    Raises:
        PruneZooError: There are placeholders among its ids, or its mask has columns that the cache has not.
    """
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if getattr(cache, NOTE, None) == WHOLE or ids is None:
        return
    total = int(cache.get_seq_length()) + ids.shape[1]
    longer = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > total
    if longer or bool(is_visual(ids).any()):
        raise PruneZooError(
            "this cache does not say how the images in its conversation were pruned: go on with the very cache that "
            "the model returned inside this block, or pass the whole conversation with its pixels"
        )


def go_on(kwargs: Mapping[str, Any], short: ShortPrompt, generating: bool, whole: bool) -> dict[str, Any]:
    """A call on a cache whose prompt was rewritten: ids, mask and positions as that cache has them.

    Args:
        kwargs: The call's.
        short: What the cache begins with.
        generating: Count positions as `generate` does (over real tokens), not as `forward` does (over columns).
        whole: Its ids are the whole conversation's, not only the new ones.

    Raises:
        PruneZooError: The call and the cache do not fit together.
    """
    ids, mask, length = kwargs.get("input_ids"), kwargs.get("attention_mask"), short.length
    if ids is None:
        raise PruneZooError("a pruned conversation goes on with input_ids, not with inputs_embeds")
    held = length + int(kwargs["past_key_values"].get_seq_length()) - short.ids.shape[1]  # the caller's columns
    if held < length:
        raise PruneZooError("this cache was cropped into its pruned prompt: pass the whole conversation again")
    total = ids.shape[1] if whole else held + ids.shape[1]
    mask = ids.new_ones(len(ids), total) if mask is None else mask
    if len(ids) != len(short.ids) or mask.shape != (len(ids), total) or total <= held:
        raise PruneZooError(
            f"this cache holds {held} columns of a pruned conversation of {len(short.ids)} rows: pass the "
            "attention_mask of the whole conversation, and its ids or the new ones"
        )
    behind = mask[:, length:].to(short.mask)
    steps = behind.cumsum(1) if generating else torch.ones_like(behind).cumsum(1)
    changed = {"attention_mask": torch.cat([short.mask, behind], 1)}
    if kwargs.get("position_ids") is None:
        changed["position_ids"] = short.last + steps[:, held - total :]
    if whole:
        changed["input_ids"] = torch.cat([short.ids, ids[:, length:].to(short.ids)], 1)
    return {**kwargs, **changed}


def restore_prompt(sequences: Tensor, prompt: Tensor, length: int) -> Tensor:
    """Sequences ``(B * copies, S + new)`` with the caller's prompt ``(B, L)`` in place of their first ``length``."""
    copies = len(sequences) // len(prompt)
    return torch.cat([prompt.repeat_interleave(copies, 0), sequences[:, length:]], dim=1)
