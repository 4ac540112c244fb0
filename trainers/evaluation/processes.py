"""Several processes that share one measurement, by Lightning Fabric: each reads its own batches, the first has all."""

import os
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from prunezoo.core.errors import PruneZooError
from prunezoo.host.parts.loading import default_device

T = TypeVar("T")


class Processes:
    """One process alone; :class:`Several` are several.

    Attributes:
        rank: which of them this is, from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    def share(self, things: Iterable[T]) -> Iterator[T]:
        """This process' part of what all of them list alike."""
        return islice(things, self.rank, None, self.world)

    def sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum over the processes, in each of them."""
        return values

    def first_says(self, value: int) -> int:
        """What the first process says, in each of them."""
        return value

    def end(self) -> None:
        """Part: what comes now is the first process' alone."""


class Several(Processes):
    """The processes of a launched Fabric.

    Args:
        fabric: `lightning.fabric.Fabric`, launched.
    """

    def __init__(self, fabric: Any) -> None:
        self.fabric, self.rank, self.world = fabric, fabric.global_rank, fabric.world_size

    def sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """See Processes. Where all but one hold 0, as here, it is exact."""
        mine = torch.from_numpy(np.ascontiguousarray(values)).to(self.fabric.device)
        return self.fabric.all_reduce(mine, reduce_op="sum").cpu().numpy()

    def first_says(self, value: int) -> int:
        """See Processes."""
        return int(self.fabric.broadcast(value))

    def end(self) -> None:
        """See Processes."""
        torch.distributed.destroy_process_group()


def own_device(devices: int, device: str | None) -> str | None:
    """The device of this process among so many: its own GPU, or the CPU that all share.

    Raises:
        PruneZooError: fewer than one process, a GPU that is named, or more processes than GPUs.
    """
    if devices < 1:
        raise PruneZooError(f"--devices {devices}: at least 1")
    if devices == 1:
        return device
    device = device or default_device()
    if device not in ("cpu", "cuda"):
        raise PruneZooError(f"--devices {devices} --device {device}: say cuda or cpu; each process takes its own")
    if device == "cpu":
        return device
    if devices > torch.cuda.device_count():
        raise PruneZooError(f"--devices {devices}: there are {torch.cuda.device_count()} GPUs")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def launch(devices: int, device: torch.device) -> Processes:
    """Start the other processes, which run this same command up to here, and meet them.

    Args:
        devices: how many there are to be.
        device: the model's.

    Raises:
        PruneZooError: this process is no command that can be started again.
    """
    if devices == 1:
        return Processes()
    if getattr(sys.modules["__main__"], "__spec__", None) is None:
        raise PruneZooError(f"--devices {devices}: run it as a command, python -m trainers.evaluate")
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator=device.type, devices=devices, strategy="ddp")
    fabric.launch()
    return Several(fabric)
