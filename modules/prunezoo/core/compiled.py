"""`torch.compile` for what a learned pruner computes, without the checks around it, which speak to the host."""

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from .contract import Pruner
from .errors import PruneZooError

P = TypeVar("P", bound=Pruner)


def compile_pruner(pruner: P, **options: Any) -> P:
    """Compile the networks of a pruner, in place.

    It is compiled as it is first called, which takes a minute or two on a CPU; what it chooses stays the same but for
    rounding. Weights and files stay what they are.

    Args:
        pruner: A learned one.
        options: Of :func:`torch.compile`, as ``mode="max-autotune"``.

    Returns:
        The pruner.

    Raises:
        PruneZooError: It has no network.
    """
    parts = list(networks(pruner))
    if not parts:
        raise PruneZooError(f"pruner '{pruner.name}' has no network that could be compiled: use it as it is")
    for part in parts:
        part.compile(**options)
    return pruner


def networks(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of a module that are called and have parts themselves, as far out as possible.

    A single layer gains nothing. Of a pruner inside of the module they are those of that one.
    """
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict | Pruner):
            yield from networks(child)
        elif any(True for _ in child.children()):
            yield child
