"""Lightning callbacks that watch a training, or let something happen to it at a step."""

import os
import signal
import time
from pathlib import Path

import lightning as L
import torch

from trainers.training.callbacks import ExportPruner


class StopAt(L.Callback):
    """Sends this process SIGTERM after so many steps of training."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def local(weight):
    """Elements of a parameter that are in this process."""
    return (weight.to_local() if hasattr(weight, "to_local") else weight).numel()


class Losses(L.Callback):
    """Writes the loss of every step and process, a line each, of its number and the loss in full; and in `share.RANK`
    how many of the frozen model's parameters a process keeps, and how many of them any optimizer has.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer, pl_module):
        weights = list(pl_module.vlm.parameters())
        kept = sum(weight.ds_tensor.numel() if hasattr(weight, "ds_tensor") else local(weight) for weight in weights)
        known = {id(weight) for weight in pl_module.parameters()} | {
            id(weight)
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for weight in group["params"]
        }
        trained = sum(id(weight) in known for weight in weights)
        (self.folder / f"share.{trainer.global_rank}").write_text(f"{kept} {trained}")

    def on_before_backward(self, trainer, pl_module, loss):
        with (self.folder / f"losses.{trainer.global_rank}").open("a") as file:
            file.write(f"{trainer.global_step} {float(loss.detach())!r}\n")


class ExportOther(L.Callback):
    """At the end, takes the weights of another run's checkpoint, and exports them."""

    def __init__(self, checkpoint: str, folder: str) -> None:
        self.checkpoint, self.folder = checkpoint, folder

    def on_fit_end(self, trainer, pl_module):
        trainer.strategy.load_model_state_dict(torch.load(self.checkpoint, weights_only=False))
        ExportPruner(self.folder).export(trainer, pl_module)


class SpoilAt(L.Callback):
    """Makes one step go wrong: its loss is NaN, or a weight of the pruner is."""

    def __init__(self, step: int, weight: bool = False) -> None:
        self.step, self.weight, self.old = step, weight, None

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == self.step and self.weight:
            weight = next(pl_module.pruner.parameters())
            self.old = weight.detach().clone()
            weight.data.fill_(torch.nan)
        elif trainer.global_step == self.step:
            pl_module.rank_weight = torch.nan

    def on_exception(self, trainer, pl_module, exception):
        if self.old is not None:
            next(pl_module.pruner.parameters()).data.copy_(self.old)


class SpoilWeights(L.Callback):
    """Before a step, a weight of the pruner becomes NaN and stays so."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            next(pl_module.pruner.parameters()).data.fill_(torch.nan)


class Dawdle(L.Callback):
    """The fourth step takes a minute, and says so by a file `dawdling` beside the pruner."""

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == 4:
            (Path(trainer.default_root_dir).parent / "dawdling").touch()
            for _ in range(600):
                time.sleep(0.1)
