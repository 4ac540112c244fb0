"""How much each image token mattered to an answer: gradient-weighted attention, rolled out over the decoder's layers.

Generic attention explainability (Chefer et al., ICCV 2021, arXiv 2103.15679) for a causal decoder, which is what the
explainability-map CNN learns from (arXiv 2506.01097). It is dear: it needs attention weights and their gradients whole,
for each token of the answer. So that they fit for thousands of tokens, only one layer's are there at a time: a first
pass keeps what enters each layer, then each is run once more, from the last to the first, with a small graph
of its own.

Letters: B rows of the batch, L tokens, D width, H heads, Q answer tokens of the whole batch, R images, N image tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..encoded import IGNORED, Encoded
from ..families import find_family
from ..parts.model import VLM


def relevance_map(vlm: VLM, encoded: Encoded, max_tokens: int | None = None) -> Tensor:
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
    layers = find_family(vlm).decoder().layers
    # Tensors made in inference mode can be in no graph, so it is left.
    with eager_attention(vlm), torch.inference_mode(False), torch.no_grad():
        row, column, step = _places(encoded, max_tokens)
        first = int(column.min()) if len(column) else length - 1
        with _recorded(layers) as (calls, top):
            inputs = encoded.model_inputs(vlm)
            logits = vlm(**inputs, use_cache=False, logits_to_keep=length - first).logits
            logits = logits[row, column - first].float()  # (Q, V)
            token = logits.argmax(-1) if encoded.labels is None else encoded.labels[row, column + 1]
            others = logits.scatter(1, token[:, None], -torch.inf).logsumexp(-1)
            odds = logits.gather(1, token[:, None])[:, 0] - others
            # Rows know nothing of each other: the first tokens of all answers take one backward pass, then the second.
            steps = [step == number for number in range(int(step.max()) + 1 if len(step) else 0)]
            flows = [torch.autograd.grad(odds[now].sum(), top, retain_graph=True)[0] for now in steps]
        relevance = [torch.zeros(rows, length, device=row.device) for _ in steps]
        for of, now in zip(relevance, steps, strict=True):
            of[row[now], column[now]] = 1.0
        for layer, (args, kwargs) in zip(reversed(layers), reversed(calls), strict=True):
            relevance, flows = _through(layer, args, kwargs, relevance, flows)
    total = torch.stack(relevance).sum(0) if relevance else torch.zeros(rows, length, device=row.device)
    mean = total / step.new_zeros(rows).index_add_(0, row, torch.ones_like(row)).clamp_min(1)[:, None]
    return mean[encoded.sample].gather(1, encoded.slots) * encoded.inputs.valid


def roll_on(relevance: Tensor, weights: Tensor, gradient: Tensor) -> Tensor:
    """Hand a row of the rollout of Chefer et al. through one layer: r + r C, C = mean over heads of (A * dA)+.

    Their R is I at first and R + C R after each layer, so a row of R = (I + C_last) ... (I + C_first) needs no product
    of matrices: it is handed through the layers from the last to the first.

    Args:
        relevance: ``(B, L)``, so far; at first 1 at the place whose row is wanted.
        weights: ``(B, H, L, L)`` of the layer's attention.
        gradient: Theirs.

    Returns:
        ``(B, L)`` float32.
    """
    change = (weights * gradient).clamp_min(0).mean(1, dtype=torch.float32)
    return relevance + (relevance[:, None] @ change)[:, 0]


@contextmanager
def eager_attention(vlm: VLM) -> Iterator[None]:
    """Let the language model use eager attention, which alone gives its weights away, while the block runs."""
    before = vlm.config.get_text_config()._attn_implementation
    vlm.set_attn_implementation({"text_config": "eager"})
    try:
        yield
    finally:
        vlm.set_attn_implementation({"text_config": before})


@contextmanager
def _recorded(layers: Sequence[nn.Module]) -> Iterator[tuple[list[tuple[Any, Any]], list[Tensor]]]:
    """Record the arguments of each layer, in order, and, as a leaf of the graph of all that follows, the last output.

    Gradients are wanted from there on, and no sooner.
    """
    calls: list[tuple[Any, Any]] = []
    top: list[Tensor] = []

    def enter(_layer: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))

    def leave(_layer: nn.Module, _args: Any, output: Any) -> Any:
        is_tuple = isinstance(output, tuple)
        top.append((output[0] if is_tuple else output).detach().requires_grad_())
        torch.set_grad_enabled(True)
        return (top[0], *output[1:]) if is_tuple else top[0]

    before = torch.is_grad_enabled()
    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(leave))
    try:
        yield calls, top
    finally:
        torch.set_grad_enabled(before)
        for handle in handles:
            handle.remove()


@torch.enable_grad()
def _through(
    layer: Any, args: Any, kwargs: Any, relevance: list[Tensor], flows: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Go back through one layer with each token: its row of the rollout, and its gradient ``(B, L, D)``."""
    hidden, seen = args[0].detach().requires_grad_(), []
    handle = layer.self_attn.register_forward_hook(lambda _module, _args, output: seen.append(output[1]))
    try:
        output = layer.forward(hidden, *args[1:], **kwargs)  # not as a call: hooks on layers are for the model's own
    finally:
        handle.remove()
    output, weights = output[0] if isinstance(output, tuple) else output, seen[0]
    for number, flow in enumerate(flows):
        gradient, flows[number] = torch.autograd.grad(output, (weights, hidden), flow, retain_graph=True)
        relevance[number] = roll_on(relevance[number], weights.detach(), gradient)
    return relevance, flows


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
