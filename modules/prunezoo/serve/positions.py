"""Where kept tokens stand: at the positions that they had among all tokens of their image. Tensors alone.

vLLM lays out the positions of a prompt before its images are encoded, and lets a model that prunes correct them
(`recompute_mrope_positions`); what it needs for that travels behind the features of each token, in digits that a half
type can hold.

The table of a prompt has three rows, as of models whose positions have time, height and width:

| row | words | tokens of an image | read as |
|---|---|---|---|
| 0 | their position | where their image begins | time |
| 1 | their position | where each stands (its height), once the image is encoded | height, or the only position |
| 2 | their position | where the image ends; where there are two axes, later the width of each | width |

Letters: L tokens of the prompt as vLLM has it, k tokens left of an image, A axes in which they differ from where their
image begins (the position; or height and width), D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BASE = 128  # of the digits: whole numbers up to 256 are exact in bfloat16
MOST = BASE * 256  # tokens of one image
ROWS = 3  # of the table of positions that vLLM keeps


def append_offsets(features: Tensor, offsets: Tensor) -> Tensor:
    """``(k, D + 2 A)``: features ``(k, D)``, behind them ``offsets (k, A)`` from the first position of the image."""
    return torch.cat([features, (offsets // BASE).to(features), (offsets % BASE).to(features)], dim=-1)


def split_offsets(features: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """Features ``(k, D)`` and offsets ``(k, A)`` long, out of what :func:`append_offsets` made."""
    rest, high, low = features.split([features.shape[-1] - 2 * axes, axes, axes], dim=-1)
    return rest, high.long() * BASE + low.long()


def lay_positions(length: int, images: Sequence[tuple[int, int, int]]) -> Tensor:
    """The table of a prompt whose images are not encoded yet.

    Args:
        length: L.
        images: First token, tokens left and extent (how much further the text behind it stands) of each, ascending.

    Returns:
        ``(ROWS, L)`` long. Words stand where they would among all tokens; what tokens of images hold is said above: so
        the last row tells how far the prompt goes.
    """
    begin = torch.arange(length)
    end = begin.clone()
    for first, count, extent in images:
        behind = slice(first + count, None)
        begin[behind] += extent - count
        end[behind] += extent - count
        begin[first : first + count] = int(begin[first])
        end[first : first + count] = int(begin[first]) + extent - 1
    return torch.stack([begin, begin, end])


def correct_positions(table: Tensor, placeholder: Tensor, offsets: Tensor, first: int) -> Tensor:
    """The table with the tokens of images where they stand; may be done again.

    Args:
        table: From :func:`lay_positions`.
        placeholder: ``(L,)`` bool: tokens of images.
        offsets: ``(k, A)`` of those from ``first`` on, as many as are being encoded.
        first: Token from which on.
    """
    where = placeholder[first:].nonzero()[: len(offsets), 0] + first
    return move_tokens(table, where, offsets)


def move_tokens(table: Tensor, where: Tensor, offsets: Tensor) -> Tensor:
    """The table with tokens ``where (k,)`` of images at ``offsets (k, A)`` from where each of these begins."""
    table = table.clone()
    table[1 : 1 + offsets.shape[1], where] = table[0, where] + offsets.T.to(table)
    return table


def distance(table: Tensor) -> int:
    """How much further than the number of its tokens a prompt goes: by its last row, and where that holds the width of
    tokens, by the words behind the last image, as Qwen-VL's prompts have them.
    """
    return int(table.max()) + 1 - table.shape[1]
