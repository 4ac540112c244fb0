"""Layer-wise relevance propagation from an answer token back to the image tokens: a guide of one backward pass.

AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers, Achtibat et al., ICML 2024,
https://arxiv.org/abs/2402.05602. Every rule of theirs but one is a gradient times a constant (their section 4), so
autograd does the work, under any attention kernel, and hooks change the gradient where a rule differs from it:

| | rule | gradient |
|---|---|---|
| linear layer | epsilon, with epsilon 0 | as it is |
| norm, activation | identity: relevance passes | what comes out over what went in, a constant |
| gate times value | uniform: half to each | half to each |
| attention weights times values | uniform | half to the values, half to the weights |
| softmax | first order of Taylor | as it is |
| queries times keys | uniform | a quarter to each, with the half above |

Ours: it starts at log-odds instead of a logit, at one answer slot drawn for each sample as in `relevance`; it ends
where the first layer begins; what a token has is the absolute value of its sum over channels. What reaches deeper
layers past the first one's entry (deepstack) is a constant. Written from the paper; no code of others.

Letters: B images (one a sample), N image tokens, S answer slots of the whole batch, V vocabulary, L tokens, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunezoo.core.errors import PruneZooError
from prunezoo.host import Encoded, full_forward
from prunezoo.host.families import find_family
from prunezoo.host.parts.decoder import KINDS

from .guides import slot_odds

SHARES = {"q_proj": 0.25, "k_proj": 0.25, "v_proj": 0.5}
"""Of the gradient of what these give."""


def lrp(vlm: Any, encoded: Encoded) -> tuple[Tensor, Tensor]:
    """How much of an answer token's log-odds each image token accounts for.

    Args:
        vlm: The frozen model.
        encoded: A batch with labels, images encoded.

    Returns:
        relevance (B, N) float32, at least 0, 0 on padding; the full model's logits (S, V) at the answer slots.

    Raises:
        PruneZooError: The model's decoder is of a make whose layers are not known.
    """
    decoder = find_family(vlm).decoder()
    if decoder.config.model_type not in KINDS:
        raise PruneZooError(
            f"guide lrp: no rules are known for decoder '{decoder.config.model_type}'; it is for {', '.join(KINDS)}: "
            "set guide=relevance, which needs none"
        )
    with torch.enable_grad(), explained(decoder.model, decoder.layers), entered(decoder.layers[0]) as entry:
        odds, logits = slot_odds(full_forward(vlm, encoded))
        (gradient,) = torch.autograd.grad(odds.sum(), entry[0])
    found = (entry[0].detach() * gradient).sum(-1, dtype=torch.float32)  # (B, L)
    return found[encoded.sample].gather(1, encoded.slots).abs() * encoded.inputs.valid, logits


@contextmanager
def entered(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Within, what enters a decoder layer is a leaf of the graph, and is put into the list."""
    seen: list[Tensor] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
        seen.append(args[0].detach().requires_grad_())
        return (seen[0], *args[1:]), kwargs

    handle = layer.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def explained(model: nn.Module, layers: Any) -> Iterator[None]:
    """Within, gradients through a decoder are relevance over value; what it computes stays what it was.

    Args:
        model: Whose norms follow the rule.
        layers: Its layers, each with `self_attn` of queries, keys and values, and a gated `mlp`.
    """
    with ExitStack() as stack:

        def hook(module: nn.Module, call: Callable[[nn.Module, Any, Tensor], Tensor]) -> None:
            stack.callback(module.register_forward_hook(call).remove)

        for module in model.modules():
            if type(module).__name__.endswith("Norm"):
                hook(module, passing)
        for layer in layers:
            for name, share in SHARES.items():
                hook(getattr(layer.self_attn, name), partial(sharing, share=share))
            hook(layer.mlp.act_fn, lambda module, given, out: scaled(passing(module, given, out), 0.5))
            hook(layer.mlp.up_proj, partial(sharing, share=0.5))
        yield


def passing(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """What a module gives, of whose every element the gradient is what it makes of it over what it was."""
    x = given[0]
    ratio = torch.where(x == 0, 0.0, out / x).detach()
    return out.detach() + ratio * (x - x.detach())


def sharing(_: nn.Module, __: Any, out: Tensor, share: float) -> Tensor:
    """:func:`scaled` as a hook."""
    return scaled(out, share)


def scaled(out: Tensor, share: float) -> Tensor:
    """The same in value, of which a share of the gradient flows back."""
    return out.detach() + share * (out - out.detach())
