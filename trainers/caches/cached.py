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
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from prunezoo.host import encode, full_forward
from trainers.data.conversation import IGNORED, ConversationCollator
from trainers.data.modules import (
    TEACHER,
    GroupedCollator,
    HubDataModule,
    LlavaJsonDataModule,
    SuiteDataModule,
    WebShardsDataModule,
)
from trainers.data.shards import ShardedCache
from trainers.data.suite import Item
from trainers.training.distill import DistillModule
from trainers.training.frozen import FrozenModule
from trainers.training.losses import answer_slots, slot_states

from .vlm_cache import CachedDataModule, Worker, dtype_of


@dataclass(frozen=True)
class LogitsWorker(Worker):
    """Notes the frozen model's answers.

    Attributes:
        top: K.
        hidden_layers: hidden states that are kept, 0 for the embeddings, i for those behind decoder layer i.
    """

    top: int
    hidden_layers: tuple[int, ...]

    label = "teacher's answers"

    def bytes_per_item(self, vlm: Any) -> int:
        """See Worker. The answers of the first few are not asked, but counted."""
        items = [self.items[number] for number in range(min(16, len(self.items)))]
        slots = int((self.collator()(items)["labels"] != IGNORED).sum()) / len(items)
        config = vlm.config.get_text_config()
        top = min(self.top, config.vocab_size)
        return 16 + round(slots * (6 * top + 4 + 2 * len(self.hidden_layers) * config.hidden_size))

    @torch.no_grad()
    def read(self, vlm: Any, collate: ConversationCollator, numbers: range) -> dict[str, Tensor]:
        """The answers to some items.

        Returns:
            item (M,) long, the number of each; slots (M,) long, S of each; and item after item top (S, K) int32, the
            tokens; log_prob (S, K) float16; tail (S,) float32, the log of all other tokens' mass; hidden (S, H, D)
            bfloat16.
        """
        encoded = encode(vlm, collate([self.items[number] for number in numbers]))
        full = full_forward(vlm, encoded, output_hidden_states=bool(self.hidden_layers))
        logits, _, sample = answer_slots(full.logits, full.labels)
        return {
            "item": torch.tensor(numbers),
            "slots": torch.bincount(sample, minlength=len(numbers)),
            **keep_top(logits, self.top),
            "hidden": slot_states(full, self.hidden_layers).to(torch.bfloat16),
        }


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


class TaughtDataModule(CachedDataModule):
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

    content = "teacher's answers 2"

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
        super().__init__(vlm, teacher_cache, shard_items, processes, **source)
        if top < 1:
            raise PruneZooError(f"top must be at least 1, got {top}")
        if min(hidden_layers, default=0) < 0:
            raise PruneZooError(f"hidden_layers must be at least 0, got {list(hidden_layers)}")
        self.top, self.hidden_layers = top, tuple(hidden_layers)

    def facts(self, module: FrozenModule) -> dict[str, Any]:
        """See CachedDataModule."""
        return {"top": self.top, "hidden_layers": list(self.hidden_layers)}

    def worker(self, module: FrozenModule) -> LogitsWorker:
        """See CachedDataModule.

        Raises:
            PruneZooError: The training would not read the answers.
        """
        if type(module).training_step is not DistillModule.training_step:
            raise PruneZooError(f"{type(module).__name__} trains from no cached answers; only DistillModule does")
        items = self.items("train")
        return LogitsWorker(
            self.vlm, dtype_of(module.vlm), items, self.batch_size, self.max_length, self.top, self.hidden_layers
        )

    def setup(self, stage: str | None = None) -> None:
        """Open the items, and beside them the answers."""
        fresh = self.train_set is None
        super().setup(stage)
        if fresh:
            assert self.train_set is not None
            cache = self.cache(self.module)
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
