"""Sizes of PPM and its kin that follow from the frozen model: operations of each part, and the width that a share buys.

Operations are counted as in `core/prefill.py`. Letters: N image tokens, T words, E hidden width, H heads.
"""

from collections.abc import Callable, Iterable

from ..core.errors import PruneZooError

SHARE = 0.01
"""Of a prefill, where nothing else is said."""
HIDDEN, BLOCKS = 512, 4
"""Sizes where no model is known: those of configs/ppm_llava.yaml."""
DEEP = 256
"""Hidden width from which on there are `BLOCKS` blocks; half of them below."""


def attention_flops(queries: int, keys: int, hidden: int) -> int:
    """Of `ppm.CrossAttention`, with its learned slot beside the keys."""
    return 4 * (queries + keys) * hidden**2 + 4 * queries * (keys + 1) * hidden


def feed_flops(tokens: int, hidden: int) -> int:
    """Of `ppm.SwiGLU`."""
    return 12 * tokens * hidden**2


def text_flops(words: int, hidden: int) -> int:
    """Of `ppm.TextBlock`."""
    return 10 * words * hidden + attention_flops(words, words, hidden) + feed_flops(words, hidden)


def visual_flops(tokens: int, words: int | None, hidden: int, heads: int) -> int:
    """Of `ppm.VisualBlock`; without words it asks for none."""
    asking = 0 if words is None else attention_flops(tokens, words, hidden)
    mixing = 8 * tokens * hidden**2 + 4 * tokens * hidden**2 // heads + 2 * tokens * hidden
    return asking + mixing + feed_flops(tokens, hidden)


def largest(widths: Iterable[int], flops: Callable[[int], int], most: float, method: str, share: float | None) -> int:
    """The largest hidden width that costs no more than ``most`` operations.

    Args:
        widths: What may be chosen, ascending.
        flops: What each costs, rising.
        most: Operations.
        method: Whose size it is, for the message.
        share: As the config says it; None: it does not, and the smallest may cost more.

    Raises:
        PruneZooError: Not even the smallest is cheap enough for the share that was asked for.
    """
    first, *others = widths
    if share is not None and flops(first) > most:
        raise PruneZooError(
            f"{method}: budget_flops={share:g} buys nothing: the smallest, hidden={first}, takes "
            f"{share * flops(first) / most:.2g} of this model's prefill: allow that, or lower heads or text_blocks"
        )
    for width in others:
        if flops(width) > most:
            break
        first = width
    return first
