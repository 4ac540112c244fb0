"""The weights of a pruner that can be set to zero one by one, and masks that say which are.

What is counted are matrices and kernels (tensors of two axes or more): biases, norms and gates are few, and stay. Zeros
are stored, and multiplied, as any other number: a pruner with zeros is neither smaller nor faster.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from prunezoo.core.errors import PruneZooError

Masks = dict[str, Tensor]
"""Boolean tensors by the name of a weight: where it stays."""
ALL = "all"
"""The part that is the whole pruner."""


def matrices(module: nn.Module, skip: tuple[str, ...] = ()) -> dict[str, nn.Parameter]:
    """The weights that are counted, by name.

    Args:
        module: The pruner.
        skip: Parts that are left out, by the first word of their names.

    Raises:
        PruneZooError: It has none.
    """
    found = {
        name: weight
        for name, weight in module.named_parameters()
        if weight.ndim >= 2 and name.partition(".")[0] not in skip
    }
    if not found:
        raise PruneZooError(f"pruner '{getattr(module, 'name', '')}' has no matrices: nothing of it can be left out")
    return found


def parts_of(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names of the counted weights by part: the first word of their names; and ALL, if there are several parts."""
    parts: dict[str, tuple[str, ...]] = {}
    for name in matrices(module):
        part = name.partition(".")[0]
        parts[part] = (*parts.get(part, ()), name)
    return parts if len(parts) == 1 else {ALL: tuple(matrices(module)), **parts}


def owners(module: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[nn.Module, str]]:
    """Each weight as the module that has it and its name there, as `torch.nn.utils.prune` wants it."""
    for name in names:
        parent, _, last = name.rpartition(".")
        yield module.get_submodule(parent), last


def keep_largest(module: nn.Module, share: float, names: tuple[str, ...], even: bool = False) -> Masks:
    """Where the largest weights are.

    Args:
        module: The pruner; not changed.
        share: Of the weights that go, in [0, 1).
        names: The weights that are looked at.
        even: The same share of each of them, rather than the smallest of all together.
    """
    copy = deepcopy(module)
    pairs = list(owners(copy, names))
    if even:
        for owner, last in pairs:
            prune.l1_unstructured(owner, last, amount=share)
    else:
        prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=share)
    masks = [getattr(owner, f"{last}_mask").bool() for owner, last in pairs]
    return dict(zip(names, masks, strict=True))


@torch.no_grad()
def apply_masks(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set to zero what does not stay."""
    weights = dict(module.named_parameters())
    for name, mask in masks.items():
        weights[name].mul_(mask.to(weights[name].device))


def zeros_of(module: nn.Module) -> tuple[int, int]:
    """How many of the counted weights are zero, and how many there are."""
    weights = matrices(module).values()
    return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)


def check_sparsity(sparsity: float) -> None:
    """Refuse a share out of range.

    Raises:
        PruneZooError: It is not in (0, 1).
    """
    if not 0 < sparsity < 1:
        raise PruneZooError(f"--sparsity {sparsity}: a share of the weights that go, above 0 and below 1")
