"""What the frozen model says about a training set and is dear to ask, computed once and kept on disk.

    python -m trainers.teacher --config configs/explain_cnn_tiny.yaml [--data.processes=4]

makes the folder that a recipe's data module reads: relevance maps (`data.maps`, here) or answers with hidden states
(`data.teacher_cache`, in `cached.py`). Stopped, it goes on where it was. `trainers.fit` does
the same with what is missing before it trains, so this command is for those who have more processes to give.

Letters: B items of a batch, M maps, N image tokens of an image.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, Protocol

import torch
from lightning.pytorch.cli import instantiate_class
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import AutoProcessor

from modules.host import Encoded, encode, full_forward
from modules.host.relevance import relevance_map

from .data.conversation import ConversationCollator
from .data.shards import Advance, Compute, ShardedCache, fill
from .data.suite import Item
from .errors import command
from .evaluation.loading import default_device
from .fit import FitCLI, build
from .frozen import judge, load_frozen
from .losses import answer_slots

SAMPLED = 16
"""Items that are looked at to know a data set again."""


@dataclass(frozen=True)
class RelevanceWorker:
    """Opens the frozen model in some process, to compute maps there.

    Attributes:
        vlm: folder or Hub id.
        dtype: that the model is held in, as `float32`.
        items: the questions.
        batch_size: items of a forward pass.
        max_length: longest sequence in tokens; see ConversationCollator.
        max_tokens: only the first so many tokens of an answer are explained; None: all.
        signal: kept beside each map, for the network that is to learn the map from it.
    """

    vlm: str
    dtype: str
    items: Sequence[Item]
    batch_size: int
    max_length: int | None
    max_tokens: int | None
    signal: str

    label = "relevance maps"

    def __call__(self, number: int) -> Compute:
        """Load it; several processes spread over the GPUs that there are."""
        return self.on(load_frozen(self.vlm, self.dtype).to(worker_device(number)))

    def on(self, vlm: Any) -> Compute:
        """The same with a model that is loaded."""
        collate = self.collator()
        return lambda numbers, advance: self.compute(vlm, collate, numbers, advance)

    def collator(self) -> ConversationCollator:
        """From items to what the model reads."""
        return ConversationCollator(AutoProcessor.from_pretrained(self.vlm), max_length=self.max_length)

    def bytes_per_item(self, vlm: Any) -> int:
        """What an item takes on the disk, judged by the first few."""
        inputs = self.encode(vlm, self.collator(), [self.items[n] for n in range(min(4, len(self.items)))]).inputs
        values = 1 + inputs.signal(self.signal)[0, 0].numel()  # of a token, 4 bytes each; and two numbers of the item
        return 16 + 4 * values * round(float(inputs.valid.sum(1).double().mean()))

    def compute(self, vlm: Any, collate: ConversationCollator, numbers: range, advance: Advance) -> dict[str, Tensor]:
        """The maps of those items that the model answers rightly.

        Returns:
            item (M,) long, the number of each; tokens (M,) long, N of each; relevance (sum of N,) and signal (sum of N,
            ...), float32, image after image.
        """
        item: list[int] = []
        tokens: list[int] = []
        relevance: list[Tensor] = []
        signal: list[Tensor] = []
        for first in range(numbers.start, numbers.stop, self.batch_size):
            batch = range(first, min(first + self.batch_size, numbers.stop))
            items = [self.items[number] for number in batch]
            encoded = self.encode(vlm, collate, items)
            right = answers_rightly(vlm, encoded).tolist()
            item += compress(batch, right)
            if not all(right):  # the passes to come are the dear ones
                items = list(compress(items, right))
                encoded = self.encode(vlm, collate, items) if items else encoded
            if items:
                valid = encoded.inputs.valid
                tokens += valid.sum(1).tolist()
                relevance.append(relevance_map(vlm, encoded, self.max_tokens)[valid].cpu())
                signal.append(encoded.inputs.signal(self.signal)[valid].float().cpu())
            advance(len(batch))
        nothing = torch.zeros(0)
        return {
            "item": torch.tensor(item, dtype=torch.long),
            "tokens": torch.tensor(tokens, dtype=torch.long),
            "relevance": torch.cat(relevance) if relevance else nothing,
            "signal": torch.cat(signal) if signal else nothing,
        }

    @torch.no_grad()
    def encode(self, vlm: Any, collate: ConversationCollator, items: Sequence[Item]) -> Encoded:
        """Some items with their labels, and the signal that the network reads."""
        return encode(vlm, collate(items), (self.signal,))


@torch.no_grad()
def answers_rightly(vlm: Any, encoded: Encoded) -> Tensor:
    """(B,) bool: the model's first choice is the reference's at every place of the answer."""
    full = full_forward(vlm, encoded)
    logits, tokens, sample = answer_slots(full.logits, full.labels)
    return judge(logits, logits, tokens, sample, len(encoded.mask))[:, 0] > 0


def worker_device(number: int) -> str:
    """Of the process of that number: the GPUs in turns, if there are any."""
    device = default_device()
    return f"cuda:{number % torch.cuda.device_count()}" if device == "cuda" else device


class Worker(Protocol):
    """Computes the shards of some kind of cache; picklable."""

    label: str
    """What they are, in words."""

    def __call__(self, number: int) -> Compute:
        """Load the model in the process of that number."""

    def on(self, vlm: Any) -> Compute:
        """The same with a model that is loaded."""

    def bytes_per_item(self, vlm: Any) -> int:
        """What an item takes on the disk."""


def fingerprint(vlm: Any) -> str:
    """A hash of the model's weights, from a few values of each, so that maps of another model are not taken for its."""
    digest = hashlib.sha256()
    for name, weight in sorted(vlm.state_dict().items()):
        some = weight.flatten()[:: max(1, weight.numel() // 64)].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {some.tolist()}".encode())
    return digest.hexdigest()


def dtype_of(vlm: Any) -> str:
    """The name of the type that a model is held in, as `float32`."""
    return str(vlm.dtype).removeprefix("torch.")


def sample_of(items: Sequence[Item]) -> str:
    """A hash of the first items, so that maps of another data set are not taken for its."""
    digest = hashlib.sha256()
    for number in range(min(SAMPLED, len(items))):
        item = items[number]
        digest.update(repr((item.id, item.turns, item.image.size)).encode() + item.image.tobytes())
    return digest.hexdigest()


def fill_with_progress(cache: ShardedCache, worker: Worker, vlm: Any, processes: int) -> None:
    """Compute what is missing in a cache, and say how large it will be and how it goes.

    Args:
        cache: Which to fill.
        worker: What to fill it by.
        vlm: The worker's model, loaded already; used where one process is enough.
        processes: How many.

    Raises:
        PruneZooError: It would not fit on the disk.
    """
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("items"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn(worker.label), *columns) as progress:
        needed = cache.require_space(worker.bytes_per_item(vlm))
        if needed:
            progress.console.print(f"{cache.folder}: {needed / 1e6:.1f} MB will be written")
        task = progress.add_task("", total=cache.items)
        opener = (lambda _: worker.on(vlm.to(default_device()))) if processes == 1 else worker
        fill(cache, opener, processes, lambda items: progress.advance(task, items))
    if needed:
        progress.console.print(f"{cache.folder}: {worker.label} of {cache.rows} out of {cache.items} items")


class CacheCLI(FitCLI):
    """Makes nothing of a recipe but its data module."""

    def instantiate_classes(self) -> None:
        """Not the rest."""
        self.datamodule = instantiate_class((), self.config.data.as_dict())


@command
def main(args: list[str] | None = None) -> None:
    """Make a recipe's cache."""
    cli = build(args, CacheCLI)
    model = cli.config.model.init_args
    cli.datamodule.make_cache(load_frozen(model.vlm, model.vlm_dtype))


if __name__ == "__main__":
    main()
