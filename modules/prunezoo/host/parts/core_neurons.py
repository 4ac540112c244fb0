"""Core neurons: those of an MLP that a prompt lights most often, and a language model that goes on with them alone.

Inside of :meth:`CoreNeurons.ready` every MLP of the language model notes its core neurons whenever it reads more than
one token; while switched on, it computes no others when it reads a single one. Its three maps are then smaller ones,
made of the rows and columns of its own at the first step behind a prompt; the model's own are back when it has run.

Letters: B rows of the batch, S tokens, F neurons, D width.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...core.errors import PruneZooError
from .decoder import Decoder

MAPS = ("gate_proj", "up_proj", "down_proj")


def strongest(neurons: Tensor, share: float) -> Tensor:
    """The neurons of each token that are among the ``share`` largest of those above 0.

    Args:
        neurons: ``(..., F)``, act(gate) * up.
        share: In (0, 1].

    Returns:
        ``(..., F)`` bool; at least one of a token that lights any.
    """
    falling = neurons.sort(-1, descending=True).values
    count = (neurons > 0).sum(-1, keepdim=True)
    least = falling.gather(-1, ((count * share).ceil().long() - 1).clamp_min(0))
    return (neurons > 0) & (neurons >= least)


def core_of(neurons: Tensor, counted: Tensor, strong: float, share: float) -> Tensor:
    """The neurons that are strong in most tokens.

    Args:
        neurons: ``(B, S, F)``.
        counted: ``(B, S)`` bool, the tokens that count.
        strong: Which are strong in a token, see :func:`strongest`.
        share: Of all neurons, in (0, 1].

    Returns:
        ``(B, K)`` long, ascending, round(share * F) of them and at least one; of equally frequent ones the first.
    """
    often = (strongest(neurons, strong) & counted[..., None]).sum(1)  # (B, F)
    count = max(round(share * often.shape[1]), 1)
    return often.argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values


class Fewer(nn.Module):
    """A linear map with fewer inputs or outputs; its tensors belong to a prompt, not to a model."""

    def __init__(self, whole: nn.Linear, core: Tensor, dim: int) -> None:
        super().__init__()
        self.weight = whole.weight.detach().index_select(dim, core)
        bias = whole.bias
        self.bias = bias if bias is None or dim == 1 else bias.detach().index_select(0, core)

    def forward(self, states: Tensor) -> Tensor:
        """``(..., outputs)``."""
        return functional.linear(states, self.weight, self.bias)


class Slim:
    """One MLP: notes its core neurons, and lends itself smaller maps for a step."""

    def __init__(self, mlp: Any, of: "CoreNeurons") -> None:
        self.mlp, self.of = mlp, of
        self.whole = {name: getattr(mlp, name) for name in MAPS}
        if any(type(part) is not nn.Linear for part in self.whole.values()):
            raise PruneZooError(
                "core neurons are taken of plain linear maps: load the model without adapters, unquantized"
            )
        self.core: Tensor | None = None  # (K) of the last prompt
        self.fewer: dict[str, Fewer] = {}
        self.handles = [
            self.whole["down_proj"].register_forward_pre_hook(self.note),
            mlp.register_forward_pre_hook(self.lend),
            mlp.register_forward_hook(self.take_back, always_call=True),
        ]

    @torch.no_grad()
    def note(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """The core of a prompt."""
        (neurons,) = args
        if neurons.dim() == 3 and neurons.shape[1] > 1:
            self.fewer, self.core = {}, None
            if len(neurons) == 1:
                counted = torch.ones(neurons.shape[:2], dtype=torch.bool, device=neurons.device)
                self.core = core_of(neurons, counted, self.of.strong, self.of.share)[0]

    def lend(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Smaller maps for a single token."""
        (states,) = args
        if not self.of.on or states.dim() != 3 or states.shape[1] != 1:
            return
        if len(states) > 1 or self.core is None:
            raise PruneZooError("core neurons are those of one prompt: generate for one at a time, without beams")
        if not self.fewer:
            dims = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
            self.fewer = {name: Fewer(self.whole[name], self.core, dim) for name, dim in dims.items()}
        self.mlp._modules.update(self.fewer)

    def take_back(self, *_: Any) -> None:
        """The model's own maps."""
        self.mlp._modules.update(self.whole)

    def remove(self) -> None:
        """Leave the MLP as it was."""
        self.take_back()
        for handle in self.handles:
            handle.remove()


class CoreNeurons:
    """The core neurons of a language model's MLPs.

    Args:
        share: Of an MLP's neurons that are core, in (0, 1].
        strong: Share of a token's positive neurons that are strong, in (0, 1].
    """

    def __init__(self, share: float, strong: float) -> None:
        self.share, self.strong, self.on = share, strong, False
        self.slims: list[Slim] = []

    def ready(self, vlm: Any) -> "Ready":
        """Be able to :meth:`switch` on a model, off at first; on leaving the model is what it was."""
        return Ready(self, vlm)

    def switch(self, on: bool) -> None:
        """Turn it on or off for what is read token by token."""
        self.on = on


class Ready:
    """What :meth:`CoreNeurons.ready` enters."""

    def __init__(self, cores: CoreNeurons, vlm: Any) -> None:
        self.cores, self.vlm = cores, vlm

    def __enter__(self) -> Self:
        """Put hooks on every MLP.

        Raises:
            PruneZooError: They are on a model already, or the decoder is of another make.
        """
        if self.cores.slims:
            raise PruneZooError("this pruner's core neurons are of a model already: build another pruner for this one")
        decoder = Decoder(self.vlm)
        decoder.check_known()
        try:
            for layer in decoder.layers:
                self.cores.slims.append(Slim(layer.mlp, self.cores))
        except PruneZooError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Take them off."""
        for slim in self.cores.slims:
            slim.remove()
        self.cores.slims, self.cores.on = [], False
