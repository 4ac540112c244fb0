"""What the frozen model says of many items and is dear to ask, computed once and kept on disk.

A `Worker` asks it, in one process or in many; a `CachedDataModule` names the folder, computes what is missing there
before training, and refuses what was computed by another model or of other items. Three kinds are kept for training:
answers (`cached.py`), relevance maps (`maps.py`) and what each budget earns (`arms.py`).

Letter: M items.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.host.parts.loading import load_processor
from trainers.cli.lock import held
from trainers.cli.terminal import Terminal, progress_bar
from trainers.data.conversation import ConversationCollator
from trainers.data.modules import ItemDataModule
from trainers.data.selection.chosen import Chosen
from trainers.data.shards import Advance, Compute, ShardedCache, fill
from trainers.data.suite import Item
from trainers.evaluation.loading import default_device
from trainers.training.frozen import FrozenModule, load_frozen

from .provenance import BYTES, DIGESTS, Seen, check_items, keep_stamps


@dataclass(frozen=True)
class Worker:
    """Opens the frozen model in some process, to ask it there; picklable.

    Attributes:
        vlm: folder or Hub id.
        dtype: that the model is held in, as `float32`.
        items: the questions.
        batch_size: items of a forward pass.
        max_length: longest sequence in tokens; see ConversationCollator.
    """

    vlm: str
    dtype: str
    items: Sequence[Item]
    batch_size: int
    max_length: int | None

    label: ClassVar[str]
    """What is computed, in words."""

    def __call__(self, number: int) -> Compute:
        """Load the model in the process of that number; several spread over the GPUs that there are."""
        return self.on(load_frozen(self.vlm, self.dtype).to(worker_device(number)))

    def on(self, vlm: Any) -> Compute:
        """The same with a model that is loaded."""
        collate = self.collator()
        return lambda numbers, advance: self.compute(vlm, collate, numbers, advance)

    def collator(self) -> ConversationCollator:
        """From items to what the model reads."""
        return ConversationCollator(load_processor(self.vlm), max_length=self.max_length)

    def compute(self, vlm: Any, collate: ConversationCollator, numbers: range, advance: Advance) -> dict[str, Tensor]:
        """Ask the model about some items, a batch at a time; see `read`. With the answers go digests of the items."""
        seen, parts = Seen(self.items), list[dict[str, Tensor]]()
        worker = replace(self, items=seen)
        for first in range(numbers.start, numbers.stop, self.batch_size):
            batch = range(first, min(first + self.batch_size, numbers.stop))
            parts.append({name: value.cpu() for name, value in worker.read(vlm, collate, batch).items()})
            advance(len(batch))
        return {**{name: torch.cat([part[name] for part in parts]) for name in parts[0]}, DIGESTS: seen.of(numbers)}

    @abstractmethod
    def read(self, vlm: Any, collate: ConversationCollator, numbers: range) -> dict[str, Tensor]:
        """Ask the model about the items of one batch.

        Returns:
            What is kept, item after item; among it item (M,) long, the numbers of those of which something is kept.
        """

    @abstractmethod
    def bytes_per_item(self, vlm: Any) -> int:
        """What an item takes on the disk, judged by the first few."""


@dataclass(frozen=True)
class PrunedWorker(Worker):
    """A Worker under whose pruner the model reads.

    Attributes:
        pruner: in memory, since it may be in training.
    """

    pruner: Pruner

    def on(self, vlm: Any) -> Compute:
        """See Worker."""
        self.pruner.to(vlm.device).eval()
        return super().on(vlm)


class CachedDataModule(ItemDataModule):
    """Trains on what the frozen model says of the items, out of a folder; to be mixed into a data module of items.

    Args:
        vlm: See ItemDataModule.
        folder: Of the cache; what is missing there is computed before training.
        shard_items: Items of one file of the cache.
        processes: Processes that compute what is missing.
        source: See the data module of items; its `train_items` are asked.
    """

    content: ClassVar[str]
    """What is kept, with a number that is to be raised when it is computed differently."""

    def __init__(self, vlm: str, folder: str, shard_items: int, processes: int, **source: Any) -> None:
        super().__init__(vlm, **source)
        for name, value in {"shard_items": shard_items, "processes": processes}.items():
            if value < 1:
                raise PruneZooError(f"{name} must be at least 1, got {value}")
        self.folder, self.shard_items, self.processes = folder, shard_items, processes

    @abstractmethod
    def facts(self, module: FrozenModule) -> dict[str, Any]:
        """What the answers depend on beside the model and the items, as JSON values."""

    @abstractmethod
    def worker(self, module: FrozenModule) -> Worker:
        """What computes them."""

    def cache(self, module: FrozenModule) -> ShardedCache:
        """The cache of what this training's model says of these items.

        Raises:
            PruneZooError: The folder holds something else; the message names what differs.
        """
        items = self.items("train")
        facts = {
            "content": self.content,
            "vlm": fingerprint(module.vlm),
            "dtype": dtype_of(module.vlm),
            **self.source,
            **({} if self.only is None else {"only": Chosen.read(self.only).digest}),
            "split": "train",
            "max_length": self.max_length,
            **self.facts(module),
        }
        remedy = "`python -m trainers.teacher` with the same recipe computes it again, and nothing else"
        return ShardedCache(self.folder, facts, len(items), self.shard_items, remedy)

    def make_cache(self, module: FrozenModule, wait: bool = False) -> None:
        """Compute what is missing.

        Args:
            module: Whose model is asked.
            wait: Where another run does so, for that to end, instead of refusing.
        """
        fill_with_progress(self.cache(module), self.worker(module), module.vlm, self.processes, wait)

    def prepare_data(self) -> None:
        """Compute what is missing, in the first process of a machine; others may have the same folder."""
        self.make_cache(self.module, wait=True)

    @property
    def module(self) -> FrozenModule:
        """The training that this is for."""
        assert self.trainer is not None
        module = self.trainer.lightning_module
        assert isinstance(module, FrozenModule)
        return module


def worker_device(number: int) -> str:
    """Of the process of that number: the GPUs in turns, if there are any."""
    device = default_device()
    return f"cuda:{number % torch.cuda.device_count()}" if device == "cuda" else device


def fingerprint(model: nn.Module) -> str:
    """A hash of all of a model's weights, so that another model's answers are not taken for its."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def dtype_of(vlm: Any) -> str:
    """The name of the type that a model is held in, as `float32`."""
    return str(vlm.dtype).removeprefix("torch.")


def fill_with_progress(cache: ShardedCache, worker: Worker, vlm: Any, processes: int, wait: bool = False) -> None:
    """Compute what is missing in a cache, and say how large it will be and how it goes.

    Args:
        cache: Which to fill.
        worker: What to fill it by.
        vlm: The worker's model, loaded already; used where one process is enough.
        processes: How many.
        wait: Where another run fills it, for that to end, instead of refusing.

    Raises:
        PruneZooError: It was made of other items, it would not fit on the disk, or another run fills it.
    """
    with (
        held("cache", cache.folder, folder=True, wait=wait),
        progress_bar(Terminal(), "items") as progress,
    ):
        cache.read_manifest()  # another run may have filled it meanwhile
        known = progress.add_task("compared with the cache", total=cache.items, visible=bool(cache.shards))
        stamps = check_items(cache, worker.items, lambda items: progress.advance(known, items))
        missing = set(cache.missing())
        needed = cache.require_space(BYTES + worker.bytes_per_item(vlm))
        if needed:
            progress.console.print(f"{cache.folder}: {needed / 1e6:.1f} MB will be written")
        task = progress.add_task(worker.label, total=cache.items)
        opener = (lambda _: worker.on(vlm.to(default_device()))) if processes == 1 else worker
        fill(cache, opener, processes, lambda items: progress.advance(task, items))
        keep_stamps(cache, worker.items, stamps, missing)
    if needed:
        progress.console.print(f"{cache.folder}: {worker.label} of {cache.rows} out of {cache.items} items")
