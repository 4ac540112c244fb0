"""PyTorch's FSDP2 for a pruner beside a frozen model."""

import copy
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from prunezoo.core.errors import PruneZooError

DIRECT = ("score", "reduce", "loss_terms", "ask_head")
"""Methods of a pruner, besides `forward`, that trainings call."""


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism over all processes: pruner and frozen model, by `fully_shard`."""

    twin: nn.Module
    """A whole copy of what is trained, which is written out in its place."""

    def __init__(self) -> None:
        super().__init__(data_parallel_size="auto", tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """All processes form one group for data."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        """As Lightning does."""
        if not is_overridden("configure_model", trainer.lightning_module, L.LightningModule):
            raise PruneZooError(f"{type(trainer.lightning_module).__name__} does not go with FSDP2: take ddp or zero3")
        super().setup(trainer)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands the optimizer's states over, as they come out of the file."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights, on the CPU; every process must call it."""
        assert self.lightning_module is not None
        return whole(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Whole states; every process must call it."""
        return whole(Strategy.optimizer_state(self, optimizer))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """One file, by the first process."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Of one file, in every process."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put whole weights into this process' shares."""
        assert self.lightning_module is not None
        there = self.lightning_module.state_dict()
        state = {name: like(there.get(name), value) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Put whole states into this process' shares."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            state = {
                number: {key: like(weights[number], value) for key, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def share_out(self, vlm: nn.Module) -> None:
        """`fully_shard` on every module that has parameters of its own: signals call single matrices of a layer."""
        mesh = self.device_mesh["data_parallel"]
        vlm.to(self.root_device)
        for part in reversed(list(vlm.modules())):  # what lies within first
            if part._parameters and any(p is not None for p in part._parameters.values()):
                fully_shard(part, mesh=mesh)

    def share_trained(self, module: nn.Module) -> None:
        """`fully_shard` on what is trained, in one piece."""
        self.twin = copy.deepcopy(module)
        module.to(self.root_device)
        fully_shard(module, mesh=self.device_mesh["data_parallel"])
        for name in DIRECT:
            if hasattr(module, name):
                register_fsdp_forward_method(module, name)

    def gathered(self, trained: nn.Module) -> nn.Module:
        """The twin, with the whole weights of what is trained; every process must call it."""
        self.twin.load_state_dict(whole(trained.state_dict()))
        return self.twin


def whole(tree: Any) -> Any:
    """The same with every sharded tensor put together, on the CPU."""
    return apply_to_collection(tree, DTensor, lambda shares: shares.full_tensor().cpu())


def like(shares: Any, value: Any) -> Any:
    """This process' share of a whole tensor, where ``shares`` is of the same shape and shared out; else ``value``."""
    if not isinstance(shares, DTensor) or shares.shape != value.shape:
        return value
    return distribute_tensor(value.to(shares.device), shares.device_mesh, shares.placements)
