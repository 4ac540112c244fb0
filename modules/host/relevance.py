"""How much each image token mattered to an answer: gradient-weighted attention, rolled out over the decoder's layers.

Generic attention explainability (Chefer et al., ICCV 2021, arXiv 2103.15679) for a causal decoder, which is what the
explainability-map CNN learns from (arXiv 2506.01097). It is dear: one forward pass with eager attention, and one
backward pass for each answer token, through frozen weights.

Letters: B rows of the batch, L tokens, H heads, Q answer tokens of the whole batch, R images, N image tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .encoded import IGNORED, Encoded
from .prompt import full_forward


def relevance_map(vlm: PreTrainedModel, encoded: Encoded, max_tokens: int | None = None) -> Tensor:
    """The relevance of the image tokens for the answer, mean over the answer's tokens.

    The CNN's paper takes the gradient of "the token's score", Chefer et al. that of a logit. Here it is the token's
    log-odds against all others: much of a logit's gradient moves all logits alike, which changes no answer. Chosen on
    the embedded model, where the map of the log-odds, used as a pruner, keeps many more answers right.

    Args:
        vlm: The model that made ``encoded``.
        encoded: From :func:`encode`. With labels their tokens are the answer, the end token included; without, the
            model's own best next token is, so that the map can be made before there is an answer.
        max_tokens: Only the first so many tokens of an answer, since each costs a backward pass; None: all.

    Returns:
        ``(R, N)`` float32, at least 0; 0 on padding and where a row has no answer.
    """
    if not len(encoded.sample):
        return torch.zeros_like(encoded.inputs.valid, dtype=torch.float32)
    rows, length = encoded.mask.shape
    # Nothing is trained: the graph begins at the image tokens. Tensors made in inference mode can be in no graph.
    with eager_attention(vlm), torch.inference_mode(False), torch.enable_grad():
        row, column, step = _places(encoded, max_tokens)
        features, valid = encoded.inputs.features.detach().clone().requires_grad_(), encoded.inputs.valid.clone()
        watched = replace(encoded, inputs=replace(encoded.inputs, features=features, valid=valid))
        first = int(column.min()) if len(column) else length - 1
        out = full_forward(vlm, watched, output_attentions=True, logits_to_keep=length - first)
        assert out.attentions is not None  # asked for
        logits = out.logits[row, column - first].float()  # (Q, V)
        token = logits.argmax(-1) if encoded.labels is None else encoded.labels[row, column + 1]
        others = logits.scatter(1, token[:, None], -torch.inf).logsumexp(-1)
        odds = logits.gather(1, token[:, None])[:, 0] - others
        total = torch.zeros(rows, length, device=row.device)
        # Rows do not know of each other, so the first tokens of all answers take one backward pass, then the second ...
        steps = int(step.max()) + 1 if len(step) else 0
        for number in range(steps):
            now = step == number
            gradients = torch.autograd.grad(odds[now].sum(), out.attentions, retain_graph=number + 1 < steps)
            start = torch.zeros_like(total)
            start[row[now], column[now]] = 1.0
            total += roll_out(start, out.attentions, gradients)
    mean = total / step.new_zeros(rows).index_add_(0, row, torch.ones_like(row)).clamp_min(1)[:, None]
    return mean[encoded.sample].gather(1, encoded.slots) * encoded.inputs.valid


@torch.no_grad()
def roll_out(start: Tensor, attentions: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """One row of the rollout R of Chefer et al.: R = I, then R + C R for each layer, C = mean over heads of (A * dA)+.

    A row of R = (I + C_last) ... (I + C_first) needs no product of matrices: the row is handed through the layers from
    the last to the first.

    Args:
        start: ``(B, L)``, 1 at the place whose row is wanted.
        attentions: Of each layer, from the first: ``(B, H, L, L)`` weights.
        gradients: Theirs, likewise.

    Returns:
        ``(B, L)`` float32.
    """
    row = start.float()
    for weights, gradient in zip(reversed(attentions), reversed(gradients), strict=True):
        change = (weights * gradient).clamp_min(0).mean(1, dtype=torch.float32)
        row = row + (row[:, None] @ change)[:, 0]
    return row


@contextmanager
def eager_attention(vlm: PreTrainedModel) -> Iterator[None]:
    """Let the language model use eager attention, which alone gives its weights away, while the block runs."""
    before = vlm.config.get_text_config()._attn_implementation
    vlm.set_attn_implementation({"text_config": "eager"})
    try:
        yield
    finally:
        vlm.set_attn_implementation({"text_config": before})


def _places(encoded: Encoded, max_tokens: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Where the answers' tokens are predicted: rows, columns, and the number of the token in its answer, (Q,) each."""
    if encoded.labels is None:  # the last real column of each row
        real = encoded.mask
        row = torch.arange(len(real), device=real.device)
        column = (real * torch.arange(real.shape[1], device=real.device)).argmax(1)
        return row, column, torch.zeros_like(row)
    asked = encoded.labels[:, 1:] != IGNORED
    number = asked.cumsum(1) - 1
    if max_tokens is not None:
        asked = asked & (number < max_tokens)
    row, column = asked.nonzero(as_tuple=True)
    return row, column, number[row, column]
