"""Relevance: heads and inner units go that contribute least to the tokens which the pruner keeps.

Pruning by Explaining: A Novel Criterion for Deep Neural Network Pruning, Yeom et al., Pattern Recognition 2021,
https://arxiv.org/abs/1912.08881, https://github.com/seulkiyeom/LRP_pruning (not for commercial use: nothing of it is
here). Relevance is propagated from the output back to every unit by LRP's z+ rule; units are removed by the sum of its
absolute values over a few reference samples, the smallest of all layers first, some 5 % a step, and is worked out anew
after each step.

| | paper | ours |
|---|---|---|
| network | convolutions and ReLU | attention, norms, gated units |
| starts at | the score of the true class | the scores of the tokens that the pruner keeps |
| linear layers | z+ (alpha 1, beta 0) | the same, with signed inputs: products above 0 alone count |
| norms, softmax, gates, attention weights | none | constants, after AttnLRP (arXiv 2402.05602, section 3) |
| unit | a filter | an inner unit, or a head by the mean of its channels |

Reconstructed: all that the right column has beyond the left one. zennit has the rule, but asks for torchvision;
captum's rules are those of whole modules, and here products and softmax lie between them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunezoo.core.contract import PruneInputs
from prunezoo.core.errors import PruneZooError
from prunezoo.learned._blocks import CrossAttention, LinearAttention, Norm, SwiGLU
from prunezoo.learned.ppm import PPM

from .units import choose, crop, layers_of, most_that_goes, total

EPSILON = 1e-9


@dataclass(frozen=True)
class References:
    """Reference samples, and how much goes at a time."""

    batches: int = 4  # of the recipe's training data
    keep: float = 1 / 9  # share of the tokens that relevance starts from
    step: float = 0.05  # share of the parameters that goes at a time

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.batches < 1:
            raise PruneZooError(f"lrp.batches={self.batches}: at least 1")
        for name in ("keep", "step"):
            if not 0 < getattr(self, name) <= 1:
                raise PruneZooError(f"lrp.{name}={getattr(self, name)} must lie in (0, 1]")


class PositiveLinear(torch.autograd.Function):
    """A linear layer whose backward pass hands relevance on by the z+ rule.

    What flows back is relevance over value, so that products with constants, and sums, are left to autograd: there it
    is LRP-0. Inputs of 0 get none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As `F.linear`."""
        y = F.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Relevance over value of the input."""
        x, weight, y = ctx.saved_tensors
        up, down = weight.clamp_min(0), weight.clamp_max(0)
        positive = F.linear(x.clamp_min(0), up) + F.linear(x.clamp_max(0), down)  # products above 0, summed
        share = y * grads[0] / (positive + EPSILON)
        return torch.where(x >= 0, share @ up, share @ down), None, None


@contextmanager
def explained(ppm: PPM) -> Iterator[None]:
    """Within, the backward pass through a PPM is that of relevance; its forward pass is what it was."""
    with ExitStack() as stack:

        def hook(module: nn.Module, call: Callable[..., Tensor]) -> None:
            stack.callback(module.register_forward_hook(call).remove)

        for module in ppm.modules():
            if isinstance(module, nn.Linear):
                hook(module, lambda linear, given, _: PositiveLinear.apply(given[0], linear.weight, linear.bias))
            elif isinstance(module, Norm):
                hook(module, scaled)
        for module in ppm.modules():  # behind those above: hooks of a module run in the order of their registration
            if isinstance(module, SwiGLU):
                hook(module.up, partial(constant_in, parts=(False, True)))
            elif isinstance(module, LinearAttention):
                hook(module.qkv, partial(constant_in, parts=(True, True, False)))
            elif isinstance(module, CrossAttention):
                hook(module.query, partial(constant_in, parts=(True,)))
                hook(module.key, partial(constant_in, parts=(True,)))
        yield


def scaled(norm: Norm, given: tuple[Tensor, ...], _: Tensor) -> Tensor:
    """What a norm gives, with a constant for its divisor."""
    x = given[0].to(norm.weight.dtype)
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt().detach() * norm.weight


def constant_in(_: nn.Module, given: tuple[Tensor, ...], out: Tensor, parts: tuple[bool, ...]) -> Tensor:
    """What a layer gives, of whose equal parts some are constants."""
    pieces = out.chunk(len(parts), dim=-1)
    return torch.cat([piece.detach() if part else piece for piece, part in zip(pieces, parts, strict=True)], dim=-1)


def relevance_of(ppm: PPM, batches: Sequence[PruneInputs], keep: float) -> dict[str, Tensor]:
    """How much each unit contributes to the scores of the tokens that the pruner keeps.

    Args:
        ppm: In eval mode.
        batches: Reference samples.
        keep: Share of the tokens whose scores are the relevance that is propagated.

    Returns:
        For each layer by name (U,), at least 0: the sum over samples and tokens of absolute relevance, the mean over a
        unit's channels.
    """
    layers, seen = layers_of(ppm), dict[str, Tensor]()
    worth = {layer.name: torch.zeros(layer.units, device=ppm.head.weight.device) for layer in layers}

    def watch(name: str, given: Tensor) -> None:
        given.retain_grad()
        seen[name] = given

    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(explained(ppm))
        for layer in layers:
            call = lambda _, given, name=layer.name: watch(name, given[0])  # noqa: E731 - bound here and now
            stack.callback(ppm.get_submodule(layer.behind).register_forward_pre_hook(call).remove)
        for inputs in batches:
            inputs = inputs.to(ppm.head.weight.dtype)
            scores = ppm.score(inputs).masked_fill(~inputs.valid, -torch.inf)
            kept = scores.detach().topk(max(1, round(keep * scores.shape[1])), dim=1)
            real = kept.values.isfinite()
            (scores.gather(1, kept.indices).where(real, 0.0).sum(1) / real.sum(1)).sum().backward()
            for layer in layers:
                given = seen[layer.name]
                assert given.grad is not None  # it is on the way to the scores
                relevance = (given * given.grad).detach().abs().flatten(0, -2).sum(0)
                worth[layer.name] += relevance.unflatten(0, (layer.units, layer.channels)).mean(1)
        ppm.zero_grad(set_to_none=True)
    return worth


def prune_by_relevance(ppm: PPM, sparsity: float, batches: Sequence[PruneInputs], references: References) -> PPM:
    """A smaller pruner, step by step.

    Args:
        ppm: A trained one; not changed.
        sparsity: Share of its parameters that go, in (0, 1).
        batches: Reference samples.
        references: How.

    Raises:
        PruneZooError: Not so many can go.
    """
    if sparsity > (most := most_that_goes(ppm)):
        raise PruneZooError(f"--sparsity {sparsity}: one unit in each layer stays; at most {most:.3f} here")
    whole, gone = total(ppm), 0.0
    while gone < sparsity:
        gone = min(gone + references.step, sparsity)
        worth = relevance_of(ppm, batches, references.keep)
        ppm = crop(ppm, choose(ppm, worth, int((1 - gone) * whole)))
    return ppm
