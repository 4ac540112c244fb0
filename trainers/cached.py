"""What the frozen model answers to a training set, kept on disk: distillation then asks it no more.

    python -m trainers.teacher --config RECIPE

fills the cache of a recipe whose data module is of this file; `trainers.fit` fills what is missing before it trains. Of
each place of an answer it holds the likeliest tokens with their log-probabilities, the mass of all others, and, if
wanted, hidden states.

Letters: M items, S answer slots of some items together, K tokens kept, H hidden states, D width.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoProcessor

from modules.core.errors import PruneZooError
from modules.host import encode, full_forward

from .data.conversation import IGNORED, ConversationCollator
from .data.modules import (
    TEACHER,
    GroupedCollator,
    HubDataModule,
    ItemDataModule,
    LlavaJsonDataModule,
    SuiteDataModule,
    WebShardsDataModule,
)
from .data.shards import Advance, Compute, ShardedCache
from .data.suite import Item
from .distill import DistillModule
from .frozen import load_frozen
from .losses import answer_slots, slot_states
from .teacher import dtype_of, fill_with_progress, fingerprint, sample_of, worker_device


@dataclass(frozen=True)
class LogitsWorker:
    """Opens the frozen model in some process, to note its answers there.

    Attributes:
        vlm: folder or Hub id.
        dtype: that the model is held in, as `float32`.
        items: the questions.
        batch_size: items of a forward pass.
        max_length: longest sequence in tokens; see ConversationCollator.
        top: K.
        hidden_layers: hidden states that are kept, 0 for the embeddings, i for those behind decoder layer i.
    """

    vlm: str
    dtype: str
    items: Sequence[Item]
    batch_size: int
    max_length: int | None
    top: int
    hidden_layers: tuple[int, ...]

    label = "teacher's answers"

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
        """What an item takes on the disk, judged by the first few: their answers are not asked, but counted."""
        items = [self.items[number] for number in range(min(16, len(self.items)))]
        slots = int((self.collator()(items)["labels"] != IGNORED).sum()) / len(items)
        config = vlm.config.get_text_config()
        top = min(self.top, config.vocab_size)
        return 16 + round(slots * (6 * top + 4 + 2 * len(self.hidden_layers) * config.hidden_size))

    @torch.no_grad()
    def compute(self, vlm: Any, collate: ConversationCollator, numbers: range, advance: Advance) -> dict[str, Tensor]:
        """The answers to some items.

        Returns:
            item (M,) long, the number of each; slots (M,) long, S of each; and item after item top (S, K) int32, the
            tokens; log_prob (S, K) float16; tail (S,) float32, the log of all other tokens' mass; hidden (S, H, D)
            bfloat16.
        """
        parts: list[dict[str, Tensor]] = []
        for first in range(numbers.start, numbers.stop, self.batch_size):
            batch = range(first, min(first + self.batch_size, numbers.stop))
            encoded = encode(vlm, collate([self.items[number] for number in batch]))
            full = full_forward(vlm, encoded, output_hidden_states=bool(self.hidden_layers))
            logits, _, sample = answer_slots(full.logits, full.labels)
            part = keep_top(logits, self.top)
            part["hidden"] = slot_states(full, self.hidden_layers).to(torch.bfloat16)
            part["slots"] = torch.bincount(sample, minlength=len(batch))
            parts.append({name: value.cpu() for name, value in part.items()})
            advance(len(batch))
        return {"item": torch.tensor(list(numbers)), **{name: torch.cat([p[name] for p in parts]) for name in parts[0]}}


def keep_top(logits: Tensor, top: int) -> dict[str, Tensor]:
    """The likeliest tokens of logits (S, V), and the mass of the others; see LogitsWorker.compute."""
    log_prob = logits.float().log_softmax(-1)
    best, index = log_prob.topk(min(top, logits.shape[-1]))
    tail = log_prob.scatter(-1, index, -torch.inf).logsumexp(-1)
    return {"top": index.int(), "log_prob": best.half(), "tail": tail}


class TaughtItems(Sequence):
    """Items with what the cache holds of each; files are opened in the process that reads them."""

    def __init__(self, items: Sequence[Item], cache: ShardedCache) -> None:
        self.items, self.cache = items, cache
        self.files: dict[str, Any] = {}
        self.open_files = ExitStack()

    def __len__(self) -> int:
        return len(self.items)

    def lengths(self) -> list[int]:
        """See Talks."""
        return self.items.lengths()  # type: ignore[attr-defined]

    def __getitem__(self, index: Any) -> tuple[Item, dict[str, Tensor]]:
        name = self.cache.names[index // self.cache.shard_items]
        if name not in self.files:
            file = self.open_files.enter_context(safe_open(self.cache.folder / name, "pt"))
            self.files[name] = file, torch.cat([torch.zeros(1, dtype=torch.long), file.get_tensor("slots").cumsum(0)])
        file, ends = self.files[name]
        place = index % self.cache.shard_items
        here = slice(int(ends[place]), int(ends[place + 1]))
        return self.items[index], {key: file.get_slice(key)[here] for key in ("top", "log_prob", "tail", "hidden")}

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {"items": self.items, "cache": self.cache, "files": {}, "open_files": ExitStack()}


class TaughtCollator(GroupedCollator):
    """A GroupedCollator that also hands on the frozen model's answers, slot after slot."""

    def __call__(self, taught: Sequence[Any]) -> dict[str, Any]:
        """Processor output, labels, groups, ids, and the answers.

        Raises:
            PruneZooError: The cache holds another number of slots.
        """
        items, answers = zip(*taught, strict=True)
        batch = super().__call__(items)
        joined = {name: torch.cat([answer[name] for answer in answers]) for name in answers[0]}
        slots = int((batch["labels"][:, 1:] != IGNORED).sum())
        if slots != len(joined["tail"]):
            raise PruneZooError(
                f"the teacher's cache has {len(joined['tail'])} places of answers where these items have {slots}: "
                f"{', '.join(batch['ids'])}; delete the cache and make it anew"
            )
        return {**batch, TEACHER: joined}


class TaughtDataModule(ItemDataModule):
    """Trains on items with the frozen model's cached answers; to be mixed into a data module of items.

    Args:
        vlm: See ItemDataModule.
        teacher_cache: Folder of the cache; what is missing there is computed before training.
        top: Tokens that are kept of each answer slot; the others' mass is kept as one.
        hidden_layers: Hidden states that are kept, 0 for the embeddings, i for those behind decoder layer i.
        shard_items: Items of one file of the cache.
        processes: Processes that compute what is missing.
        source: See the data module of items; its `train_items` are asked.
    """

    def __init__(
        self,
        vlm: str,
        teacher_cache: str,
        top: int = 64,
        hidden_layers: tuple[int, ...] = (),
        shard_items: int = 1024,
        processes: int = 1,
        **source: Any,
    ) -> None:
        super().__init__(vlm, **source)
        for name, value in {"top": top, "shard_items": shard_items, "processes": processes}.items():
            if value < 1:
                raise PruneZooError(f"{name} must be at least 1, got {value}")
        if min(hidden_layers, default=0) < 0:
            raise PruneZooError(f"hidden_layers must be at least 0, got {list(hidden_layers)}")
        self.teacher_cache, self.top, self.hidden_layers = Path(teacher_cache), top, tuple(hidden_layers)
        self.shard_items, self.processes = shard_items, processes

    def cache(self, vlm: Any) -> ShardedCache:
        """The cache of this model's answers to these items.

        Raises:
            PruneZooError: The folder holds others; the message names what differs.
        """
        items = self.items("train")
        facts = {
            "content": "teacher's answers 1",  # the number is to be raised when they are computed differently
            "vlm": fingerprint(vlm),
            "dtype": dtype_of(vlm),
            **self.source,
            "split": "train",
            "sample": sample_of(items),
            "max_length": self.max_length,
            "top": self.top,
            "hidden_layers": list(self.hidden_layers),
        }
        remedy = "`python -m trainers.teacher` with the same recipe computes it again, and nothing else"
        return ShardedCache(self.teacher_cache, facts, len(items), self.shard_items, remedy)

    def make_cache(self, vlm: Any) -> None:
        """Compute the answers that are missing."""
        items = self.items("train")
        worker = LogitsWorker(
            self.vlm, dtype_of(vlm), items, self.batch_size, self.max_length, self.top, self.hidden_layers
        )
        fill_with_progress(self.cache(vlm), worker, vlm, self.processes)

    @property
    def frozen(self) -> Any:
        """The frozen model of the training that this is for.

        Raises:
            PruneZooError: The training would not read the answers.
        """
        assert self.trainer is not None
        module = self.trainer.lightning_module
        if type(module).training_step is not DistillModule.training_step:
            raise PruneZooError(f"{type(module).__name__} trains from no cached answers; only DistillModule does")
        return module.vlm

    def prepare_data(self) -> None:
        """Compute the answers that are missing, in the first process of a machine."""
        self.make_cache(self.frozen)

    def setup(self, stage: str | None = None) -> None:
        """Open the items, and beside them the answers."""
        fresh = self.train_set is None
        super().setup(stage)
        if fresh:
            assert self.train_set is not None
            cache = self.cache(self.frozen)
            self.train_set = TaughtItems(self.train_set, cache)
            self.train_collate = TaughtCollator(self.collate.processor, max_length=self.max_length)


class TaughtSuite(TaughtDataModule, SuiteDataModule):
    """A suite's training split with answers."""


class TaughtLlavaJson(TaughtDataModule, LlavaJsonDataModule):
    """A LLaVA-format file's training items with answers."""


class TaughtHub(TaughtDataModule, HubDataModule):
    """A Hugging Face data set's training items with answers."""


class TaughtWebShards(TaughtDataModule, WebShardsDataModule):
    """WebDataset shards' training items with answers."""
