"""DeepSpeed's ZeRO for a pruner beside a frozen model, on GPUs and on CPU processes."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import Tensor, nn

from prunezoo.core.errors import PruneZooError


class Zero(DeepSpeedStrategy):
    """DeepSpeed's ZeRO: on GPUs as Lightning has it, and on CPU processes too, which Lightning refuses.

    Stage 1 shares out the states of the optimizer, 2 gradients too, 3 parameters too, with those of the frozen model.

    Two things differ from Lightning's. Mixed precision is autocast over float32 weights, as under all other strategies,
    instead of weights in half precision; a pruner is small. And checkpoints are consolidated into one file.

    Args:
        stage: Of ZeRO, 1 to 3.
        offload: Keep what is shared out in the memory of the host while it is not needed: states of the optimizer,
            and in stage 3 parameters.
        options: Of DeepSpeedStrategy.
    """

    def __init__(self, stage: Literal[1, 2, 3] = 2, offload: bool = False, **options: Any) -> None:
        require_deepspeed()
        super().__init__(stage=stage, offload_optimizer=offload, offload_parameters=offload and stage == 3, **options)
        assert isinstance(self.config, dict)
        self.config["zero_force_ds_cpu_optimizer"] = False  # its own is compiled at first use; a pruner's is small

    @property
    def on_cpu(self) -> bool:
        """Whether processes train on CPUs."""
        return isinstance(self.accelerator, CPUAccelerator)

    @property
    def root_device(self) -> torch.device:
        """The device of this process; with a number, since DeepSpeed asks for it."""
        return torch.device("cpu", 0) if self.on_cpu else super().root_device

    @property
    def precision_plugin(self) -> Precision:
        """Lightning's, as autocast."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if isinstance(plugin, DeepSpeedPrecision) and not isinstance(plugin, AutocastZero):
            plugin = AutocastZero(plugin.precision)
        self._precision_plugin = plugin

    def setup_environment(self) -> None:
        """As Lightning does, without its guard against CPUs."""
        if not self.on_cpu:
            super().setup_environment()
            return
        from deepspeed.accelerator import get_accelerator

        if get_accelerator().device_name() != "cpu":
            raise PruneZooError(
                "DeepSpeed on CPU processes beside a GPU: set the environment variable DS_ACCELERATOR=cpu"
            )
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """As Lightning does; between CPU processes by gloo."""
        if not self.on_cpu:
            super().setup_distributed()
            return
        import deepspeed

        # gloo instead of DeepSpeed's shared memory, which is compiled at first use and needs a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> Any:
        self._trained = [] if optimizer is None else [list(group["params"]) for group in optimizer.param_groups]
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands the optimizer's states over, as they come out of the file."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights, on the CPU; every process must call it."""
        assert self.lightning_module is not None
        with self.gathered(self.lightning_module):
            state = self.lightning_module.state_dict()
            return {name: value.detach().clone().cpu() for name, value in state.items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Whole states, as the plain optimizer's `state_dict` would have them; every process must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_states()
        inner = self._inner_optimizer
        steps = [state["step"] for state in inner.state.values() if "step" in state]
        state: dict[int, dict[str, Any]] = {}
        groups, number = [], 0
        for group, weights in zip(inner.param_groups, self._trained, strict=True):
            for weight in weights:
                if steps:
                    moments = {key: safe_get_full_optimizer_state(weight, key) for key in ("exp_avg", "exp_avg_sq")}
                    state[number] = {"step": steps[0].clone(), **{key: value.cpu() for key, value in moments.items()}}
                number += 1
            others = {key: value for key, value in group.items() if key != "params"}
            groups.append({**others, "params": list(range(number - len(weights), number))})
        return {"state": state, "param_groups": groups}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """One file, by the first process."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Of one file, in every process."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put whole weights into this process' shares."""
        from deepspeed.utils import safe_set_full_fp32_param

        assert self.lightning_module is not None
        with self.gathered(self.lightning_module, changed=True):
            self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)
        for name, weight in self.lightning_module.named_parameters():
            if any(weight is trained for group in self._trained for trained in group):
                self._set(weight, checkpoint["state_dict"][name], None, safe_set_full_fp32_param)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Put whole states into this process' shares."""
        from deepspeed.utils import safe_set_full_optimizer_state

        (saved,) = checkpoint["optimizer_states"]
        if not saved["state"]:
            return
        zero, inner = self.deepspeed_engine.optimizer, self._inner_optimizer
        step = saved["state"][0]["step"]
        shares = zero.fp32_partitioned_groups_flat if self.zero_stage_3 else zero.single_partition_of_fp32_groups
        for share in shares:
            moments = {key: torch.zeros_like(share) for key in ("exp_avg", "exp_avg_sq")}
            inner.state[share] = {"step": step.clone(), **moments}
        self._link_states()
        number = 0
        for group, group_saved, weights in zip(inner.param_groups, saved["param_groups"], self._trained, strict=True):
            group.update({key: value for key, value in group_saved.items() if key != "params"})
            for weight in weights:
                for key in ("exp_avg", "exp_avg_sq"):
                    self._set(weight, saved["state"][number][key], key, safe_set_full_optimizer_state)
                number += 1

    def gathered(self, module: nn.Module, changed: bool = False) -> AbstractContextManager[Any]:
        """Within, the parameters of a module are whole in this process; every process must enter.

        Args:
            module: What is trained.
            changed: They are changed within, in every process alike.
        """
        import deepspeed

        weights = [weight for weight in module.parameters() if hasattr(weight, "ds_id")]
        return deepspeed.zero.GatheredParameters(weights, modifier_rank=0 if changed else None)

    def share_out(self, vlm: Any) -> Any:
        """In stage 3: make this process' share of a frozen model of it. See `spread.share_out`."""
        import deepspeed

        assert isinstance(self.config, dict)
        zero = {key: self.config["zero_optimization"].get(key) for key in ("stage", "offload_param")}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {key: value for key, value in zero.items() if value is not None},
        }
        for buffer in vlm.buffers():
            buffer.data = buffer.data.to(self.root_device)
        return deepspeed.initialize(model=vlm, config=config, dist_init_required=False)[0]

    def _link_states(self) -> None:
        """Tell weights where their states lie; stages 1 and 2 do so once, too early for all groups but the first."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if not self.zero_stage_3:
            zero, inner = self.deepspeed_engine.optimizer, self._inner_optimizer
            for weights, share in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(weights, share, inner.state)

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return self.deepspeed_engine.optimizer.optimizer

    def _set(self, weight: Any, value: Tensor, key: str | None, setter: Any) -> None:
        """Put a whole float32 value into this process' share of it."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        value = value.to(weight.device, torch.float32)
        if not self.zero_stage_3:
            setter(weight, value, *([key] if key else []))
            return
        share = weight.ds_tensor.ds_numel  # the last one is filled up, so the setter for whole values would not do
        padded = value.new_zeros(share * self.world_size)
        padded[: value.numel()] = value.flatten()
        mine = padded[share * self.global_rank : share * (self.global_rank + 1)]
        if key:
            safe_set_local_optimizer_state(weight, mine, key)
        else:
            safe_set_local_fp32_param(weight, mine)


class AutocastZero(DeepSpeedPrecision):
    """Float32 weights, as far as DeepSpeed knows; mixed precision by autocast."""

    def __init__(self, precision: Any) -> None:
        if precision not in ("32-true", "bf16-mixed"):
            raise PruneZooError(f"trainer.precision={precision} does not go with ZeRO: take 32-true or bf16-mixed")
        super().__init__("32-true")
        self.mixed = precision == "bf16-mixed"

    def convert_input(self, data: Any) -> Any:
        """Left as it is: the frozen model's own type is its own matter."""
        return data

    def forward_context(self) -> AbstractContextManager[Any]:
        """Around every step."""
        if not self.mixed:
            return nullcontext()
        return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16)


def require_deepspeed() -> None:
    """Raise a PruneZooError where DeepSpeed is missing."""
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise PruneZooError("this strategy needs DeepSpeed: pip install 'prunezoo[deepspeed]'") from None
