"""Captions as a tokenizer reads them: a frozen language model's own input embeddings, looked up and not computed on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .base import Text


@torch.no_grad()
def embed_captions(vlm: Any, words: Any, captions: Sequence[str]) -> Text:
    """The text ``(B, T, D)``, float32, of captions, padded behind to the longest.

    Args:
        vlm: A `transformers` model with ``get_input_embeddings``.
        words: Its tokenizer of words, `AutoTokenizer`'s or a processor's ``tokenizer``.
        captions: B of them; an empty one says nothing.
    """
    table = vlm.get_input_embeddings()
    rows = [torch.tensor(words(one, add_special_tokens=False)["input_ids"], dtype=torch.long) for one in captions]
    valid = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    device = table.weight.device
    return Text(table(pad_sequence(rows, batch_first=True).to(device)).float(), valid.to(device))
