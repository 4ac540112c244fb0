"""What is shared out among the processes of a training, and how it comes together again, by whichever strategy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import Strategy
from torch import nn

from .fsdp2 import FSDP2
from .zero import Zero


def share_out(strategy: Strategy, vlm: Any) -> Any:
    """Bring the frozen model to where it computes: whole to this process' device, or this process' share of it.

    Args:
        strategy: Of the training.
        vlm: A `transformers` model, frozen, on the CPU.

    Returns:
        What must live as long as the model does.
    """
    if isinstance(strategy, FSDP2) or (isinstance(strategy, Zero) and strategy.zero_stage_3):
        return strategy.share_out(vlm)
    vlm.to(strategy.root_device)
    return None


def shard_trained(strategy: Strategy, module: nn.Module) -> None:
    """Share out what is trained, where the strategy leaves that to the module."""
    if isinstance(strategy, FSDP2):
        strategy.share_trained(module)


@contextmanager
def exportable(strategy: Strategy, trained: nn.Module) -> Iterator[Any]:
    """What is trained, its weights whole in this process; every process must enter.

    Args:
        strategy: Of the training.
        trained: The pruner or tokenizer.
    """
    if isinstance(strategy, FSDP2):
        yield strategy.gathered(trained)
    elif isinstance(strategy, Zero):
        with strategy.gathered(trained):
            yield trained
    else:
        yield trained
