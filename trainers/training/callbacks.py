"""What happens around the training steps: seeds, progress, stopping cleanly, checkpoints, and the exported pruner."""

import json
import math
import os
import pickle
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from trainers.cli.errors import one_line, whole_file
from trainers.cli.moved import moved

from .resume import worker_died
from .strategies.spread import exportable


class SeedSteps(L.Callback):
    """Seeds each step from (seed, step, rank) alone, so that a resumed run draws what the unbroken one would have.

    Lightning's checkpoints hold no state of random generators; this way none is needed.

    Args:
        seed: Of the run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed."""
        step = trainer.fit_loop.total_batch_idx
        torch.manual_seed((self.seed * 1_000_003 + step) * 1_009 + trainer.global_rank)


def trained(module: L.LightningModule) -> Any:
    """What a training module trains and a folder is written of: its pruner, or its tokenizer."""
    return module.tokenizer if hasattr(module, "tokenizer") else module.pruner


class ExportPruner(L.Callback):
    """Writes what is trained as a folder that `from_pretrained` loads.

    Args:
        folder: Where to.
        monitor: The validation figure by which the best state is written, when it is reached; auto: what the training
            module's `best_by` says. None, or where validation never gave one: the state at the end.
        mode: Whether the most or the least of that figure is best.
    """

    def __init__(self, folder: str, monitor: str | None = "auto", mode: Literal["max", "min"] = "max") -> None:
        self.folder, self.monitor, self.mode = Path(folder), monitor, mode
        self.best: float | None = None
        self.by: str | None = None  # the figure that this is of

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export if this is the best so far."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or self.monitor is None:
            return
        monitor, mode = self.monitor, self.mode
        if monitor == "auto":
            monitor, mode = getattr(pl_module, "best_by", ("val/score", "max"))
        if monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise PruneZooError(f"ExportPruner.monitor='{monitor}' was never logged; there are: {known}")
        score = float(trainer.callback_metrics[monitor])
        sign = 1 if mode == "max" else -1
        if math.isfinite(score) and (self.best is None or self.by != monitor or sign * score >= sign * self.best):
            self.best, self.by = score, monitor
            self.export(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export what has not been measured."""
        if self.best is None:
            self.export(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where it lies."""
        rank_zero_info(f"{trained(pl_module).name}: {self.folder}")

    def export(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the folder, from the first process only; where weights are shared out, all must call it."""
        with exportable(trainer.strategy, trained(pl_module)) as whole:
            if trainer.is_global_zero:
                whole.save_pretrained(self.folder)

    def state_dict(self) -> dict[str, Any]:
        """The best figure."""
        return {"best": self.best, "by": self.by}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.best, self.by = state_dict["best"], state_dict.get("by", self.monitor)


class Checkpoints(ModelCheckpoint):
    """Lightning's checkpoints, the newest and a copy called `last`, also where the run is stopped or fails.

    Args:
        dirpath: Folder.
        every_n_train_steps: How often.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int = 500) -> None:
        super().__init__(
            dirpath,
            every_n_train_steps=every_n_train_steps,
            save_last=True,
            save_on_exception=True,
            enable_version_counter=False,  # a run that was killed and goes on writes over what it had
        )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write a checkpoint, unless that would wait for processes that know of no exception, or what it would hold is
        not worth the one before: weights that are no numbers, or a step that was broken off in its middle.
        """
        together = trainer.world_size == 1 or isinstance(exception, (SIGTERMException, StoppedTogether))
        broken_off = isinstance(exception, KeyboardInterrupt) or worker_died(exception)
        if together and not broken_off and numbers(trainer, pl_module):
            super().on_exception(trainer, pl_module, exception)


def numbers(trainer: L.Trainer, module: L.LightningModule) -> bool:
    """Whether all that is trained is finite; every process must ask."""
    mine = all(bool(getattr(p, "_local_tensor", p).isfinite().all()) for p in module.parameters())
    return trainer.strategy.reduce_boolean_decision(mine, all=True)


class GracefulStop(L.Callback):
    """On SIGTERM or SIGINT all processes finish the same batch, write their checkpoint and leave.

    Lightning's own handler talks to the other processes from within the signal, in the middle of whatever collective
    they are in, and hangs; here the processes agree after a batch. A second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self._got = 0
        self._old: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals over, after Lightning has put in its own handlers."""
        self._got = 0
        self._old = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._got and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._got = number

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave, if any process was told to."""
        if trainer.strategy.reduce_boolean_decision(bool(self._got), all=False):
            # a child that ends with an error makes Lightning kill the first process before it has written
            code = 128 + (self._got or signal.SIGTERM) if trainer.is_global_zero else 0
            raise SIGTERMException(code)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}


class StoppedTogether(PruneZooError):
    """An error that all processes raise at the same place, so that they can still write a checkpoint together."""


class StopAtNaN(L.Callback):
    """Stops before a loss that is no finite number reaches the weights, and says which samples a failure came from.

    All processes stop together; the checkpoint that is then written holds the weights of the step before, and goes on
    behind the batch.
    """

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Look at the loss.

        Raises:
            StoppedTogether: It is NaN or infinite in some process.
        """
        if trainer.strategy.reduce_boolean_decision(not bool(loss.isfinite()), all=False):
            raise StoppedTogether(
                f"the loss of step {trainer.global_step} is not finite; the ids of its batch are in "
                f"{self.path(trainer)}. Look at these samples, or lower model.lr; --ckpt_path=last goes on behind them"
            )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write down the samples of this process' batch, whatever went wrong with them.

        An error in making a batch brings its ids along (see TellingLoader); the data module knows those of the batch
        that a step is given, until the next one is asked for.
        """
        ids = getattr(exception, "ids", None) or getattr(trainer.datamodule, "batch_ids", None)  # type: ignore[attr-defined]
        if ids and isinstance(exception, Exception) and not isinstance(exception, SIGTERMException):
            said = {"step": trainer.global_step, "error": str(exception), "ids": ids}
            with suppress(OSError), whole_file(self.path(trainer)) as scratch:  # what went wrong comes first
                scratch.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """What goes wrong from here on is not this batch's fault."""
        if trainer.datamodule is not None:  # type: ignore[attr-defined]
            trainer.datamodule.batch_ids = []  # type: ignore[attr-defined]

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """As above."""
        self.on_train_batch_end(trainer)

    @staticmethod
    def path(trainer: L.Trainer) -> Path:
        """The file of this process."""
        return Path(trainer.default_root_dir) / f"failed_batch_{trainer.global_rank}.json"


class Progress(RichProgressBar):
    """A progress bar over all steps of a run that ends by `max_steps`, instead of over an endless epoch."""

    @property
    def total_train_batches(self) -> int | float:
        """Batches until the run, or the epoch, ends."""
        batches = super().total_train_batches
        steps = self.trainer.max_steps
        if steps > 0 and self.trainer.current_epoch == 0:
            batches = min(batches, steps * self.trainer.accumulate_grad_batches)
        return batches

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training" if self.trainer.max_epochs in (None, -1) else super()._get_train_description(current_epoch)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside the old one and puts it in place only when it is whole.

    Lightning's own way goes through the system's folder for temporary files and copies from there; where the disk fills
    up, the checkpoint that was there before is lost.
    """

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read.

        Raises:
            PruneZooError: It is no checkpoint, or not a whole one.
        """
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except (EOFError, KeyError, RuntimeError, ImportError, AttributeError, pickle.UnpicklingError) as error:
            names = moved(str(error))
            reason = f"it is of before {names}" if names else one_line(error)
            raise PruneZooError(f"{path}: not a checkpoint that can be read ({reason:.200}); name another") from error

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write.

        Raises:
            PruneZooError: It cannot be written; what was there before is untouched.
        """
        path = Path(path)
        scratch = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for debris in path.parent.glob(".*.part"):  # of a run that was killed while it wrote
                debris.unlink()
            with scratch.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except (OSError, RuntimeError) as error:  # torch wraps what the disk says into a RuntimeError
            scratch.unlink(missing_ok=True)
            cause: BaseException = error
            while not isinstance(cause, OSError) and (cause.__cause__ or cause.__context__):
                cause = cause.__cause__ or cause.__context__ or cause
            reason = cause.strerror if isinstance(cause, OSError) else str(cause).splitlines()[0]
            raise PruneZooError(
                f"cannot write checkpoint {path}: {reason}; earlier checkpoints are whole, free some space and resume"
            ) from error
