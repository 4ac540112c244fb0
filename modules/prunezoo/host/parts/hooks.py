"""Hooks taken off by whose they are: so none is left behind where an interrupt lost its handle."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ...core.errors import PruneZooError


def remove_hooks(module: nn.Module, owner: object) -> None:
    """Take off every forward hook and pre-hook of a module that is a method of ``owner``, or a ``partial`` of one."""
    before = (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
    after = (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called)
    tables: tuple[tuple[dict[int, Any], ...], ...] = (before, after)
    for hooks, *marks in tables:
        for number in [number for number, hook in hooks.items() if _owner(hook) is owner]:
            for table in (*marks, hooks):  # the last is what is looked through
                table.pop(number, None)


def _owner(hook: Callable[..., Any]) -> object:
    return getattr(hook.func if isinstance(hook, partial) else hook, "__self__", None)


def copy_error() -> PruneZooError:
    """Said where a model is copied or pickled whose hooks would go with it."""
    return PruneZooError(
        "a model with a pruner attached cannot be copied or pickled: leave the block first, or save its state_dict()"
    )
