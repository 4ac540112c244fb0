"""What is known of the words of a prompt beside an image. Letters: R images, N image tokens, T words, D width."""

import torch
from torch import Tensor


def words_behind(columns: Tensor, real: Tensor, slots: Tensor) -> Tensor:
    """``(R, T)`` bool: which words stand behind an image.

    Args:
        columns: ``(R, T)`` where the words are.
        real: ``(R, T)`` bool, False for filler.
        slots: ``(R, N)`` where the image tokens are, 0 for padding.
    """
    return real & (columns > slots.amax(1, keepdim=True))


def match_words(tokens: Tensor, valid: Tensor, words: Tensor, behind: Tensor) -> Tensor:
    """``(R, T)`` float32: what a token's softmax over words of the dot product gives each, mean over the tokens.

    Args:
        tokens: ``(R, N, D)`` embeddings of the image tokens.
        valid: ``(R, N)`` bool.
        words: ``(R, T, D)`` embeddings of the words.
        behind: ``(R, T)`` bool, the words that the softmax is over; the others have 0.
    """
    alike = tokens.float() @ words.float().transpose(1, 2)  # (R, N, T)
    likely = alike.masked_fill(~behind[:, None], torch.finfo(alike.dtype).min).softmax(-1)
    counted = likely * (behind[:, None] & valid[..., None])
    return counted.sum(1) / valid.sum(1, keepdim=True).clamp_min(1)
