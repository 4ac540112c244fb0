"""Where a run goes on, whether its data are still the same, and how it ends when something from without ends it."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from prunezoo.core.errors import PruneZooError
from trainers.data.digest import digest_of
from trainers.data.pictures import BrokenImage
from trainers.data.suite import Item

OPENED = 32
"""Items, evenly over a data set, that are opened to know it again."""


def find_checkpoint(named: str | None, folder: Path) -> str | None:
    """The checkpoint to go on from.

    Args:
        named: A path; `last`, for the newest of a folder; or None.
        folder: Of the run's checkpoints.
    """
    if named != "last":
        return named
    if (folder / "last.ckpt").exists():
        return str(folder / "last.ckpt")
    others = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    if not others:
        rank_zero_info(f"--ckpt_path=last: no checkpoint in {folder}, so this run begins anew")
        return None
    rank_zero_info(f"--ckpt_path=last: {folder} has no last.ckpt; goes on from {others[-1].name}")
    return str(others[-1])


def train(trainer: L.Trainer, module: L.LightningModule, checkpoint: str | None, **data: Any) -> None:
    """Train, from a checkpoint or anew.

    Args:
        trainer: With all its callbacks.
        module: What is trained.
        checkpoint: Path, or None.
        data: `datamodule`, or loaders, as `Trainer.fit` takes them.

    Raises:
        PruneZooError: The checkpoint does not fit, a loader process was killed, or the learning rate has no bounds.
        KeyboardInterrupt: Ctrl-C, where it was not to wait for a step's end.
    """
    try:
        trainer.fit(module, ckpt_path=checkpoint, **data)
    except RuntimeError as error:
        if "in loading state_dict" in str(error):
            raise PruneZooError(
                f"--ckpt_path: {checkpoint} is a checkpoint of another recipe, or of other sizes; name the recipe "
                "that it was trained by, or another --out"
            ) from error
        if worker_died(error):
            raise PruneZooError(
                "a process that loads data was killed, often because the machine's memory is full: lower data.workers "
                "or data.batch_size; --ckpt_path=last goes on from the last checkpoint"
            ) from error
        if "without overflow" in str(error):
            raise PruneZooError(
                f"the optimizer's step {trainer.global_step} is larger than its numbers can be: lower model.lr"
            ) from error
        raise
    except SystemExit as stopped:
        if isinstance(stopped.__context__, KeyboardInterrupt):  # Lightning makes an exit with code 1 of it
            raise KeyboardInterrupt from None
        raise


def worker_died(error: BaseException) -> bool:
    """Whether a loader found one of its processes dead."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


class SameData(L.Callback):
    """Says, where a run goes on, that its training data are not those that it was begun with."""

    def __init__(self) -> None:
        self.before: dict[str, Any] | None = None
        self.now: dict[str, Any] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look, in the first process."""
        if not trainer.is_global_zero:
            return
        self.now = describe(trainer.datamodule)  # type: ignore[attr-defined]
        if self.before not in (None, self.now):
            then, now = self.before["items"], self.now["items"]
            rank_zero_info(
                "the training data are not those that this run was begun with "
                f"({then} items then, {f'{now} now' if now != then else 'other ones now'}); it goes on with these"
            )

    def state_dict(self) -> dict[str, Any]:
        """What the data are."""
        return {"data": self.now}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What they were."""
        self.before = state_dict["data"]


def describe(data: Any) -> dict[str, Any]:
    """What the training items of a data module are, as far as it can be told at once.

    Returns:
        Their number, and a digest: of where they are from; of all ids, texts and names of pictures, where a source
        knows them; and of some items, evenly over the set, with their pictures.
    """
    items: Sequence[Item] = getattr(data.train_set, "items", data.train_set)  # of those that carry answers along
    digest = hashlib.sha256(json.dumps(getattr(data, "source", None), sort_keys=True).encode())
    if hasattr(items, "mark"):
        for number in range(len(items)):
            digest.update(items.mark(number).encode("utf-8", "surrogatepass"))
    for place in range(min(OPENED, len(items))):
        try:
            item = items[place * len(items) // min(OPENED, len(items))]
        except BrokenImage as error:  # the batch that meets it says so, with its ids
            digest.update(str(error).encode("utf-8", "surrogatepass"))
            continue
        if isinstance(item, Item):
            digest.update(digest_of(item))
    return {"items": len(items), "digest": digest.hexdigest()}
