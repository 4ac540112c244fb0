"""Writes down how a pruner or tokenizer was trained, beside its weights, so that its card needs nobody's memory."""

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch

from prunezoo.core.files import read_object
from trainers.cli.errors import whole_file

from .callbacks import trained

RUN_FILE = "run.json"


def read_run(path: Path) -> dict[str, Any]:
    """What :class:`RunRecord` wrote.

    Raises:
        PruneZooError: It cannot be read, or is none.
    """
    remedy = "name the folder of what was trained"
    return read_object(path, "command", "data", "steps", "recipe", what="the record of a training", remedy=remedy)


class RunRecord(L.Callback):
    """Writes `run.json` into the folder of what is trained after each validation and at the end.

    Args:
        folder: Its folder.
        command: The command line.
        recipe: The whole configuration, as YAML text.
        vlm: The frozen model, as it was named; several by their suites; None where there is none.
        data: What it was trained on, in a few words.
        seed: Of the run.
    """

    def __init__(
        self, folder: str, command: str, recipe: str, vlm: str | dict[str, str] | None, data: str, seed: int
    ) -> None:
        self.folder = Path(folder)
        self.facts = {"command": command, "vlm": vlm, "data": data, "seed": seed}
        self.recipe = recipe
        self.seconds = 0.0
        self._begun = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._begun = time.monotonic() - self.seconds

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the clock, so that a checkpoint knows it."""
        self.seconds = time.monotonic() - self._begun

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.write(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write."""
        self.write(trainer, pl_module)

    def write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the record, from the first process only."""
        if not trainer.is_global_zero:
            return
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in trained(pl_module).parameters())  # ZeRO-3 empties p
        gpu = torch.cuda.get_device_name() if pl_module.device.type == "cuda" else None
        record = {
            **self.facts,
            "steps": trainer.global_step,
            "seconds": round(self.seconds, 1),
            "device": gpu or f"CPU ({torch.get_num_threads()} of its threads)",
            "processes": trainer.world_size,
            "parameters": parameters,
            "versions": {name: version(name) for name in ("torch", "lightning", "transformers")},
            "recipe": self.recipe,
        }
        with whole_file(self.folder / RUN_FILE) as scratch:
            scratch.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        """Seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.seconds = state_dict["seconds"]
