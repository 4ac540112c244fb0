"""Relevance maps of a training set by the frozen model, kept on disk: the explainability-map CNN learns from them.

    python -m trainers.teacher --config configs/explain_cnn_tiny.yaml

makes them; `trainers.fit` makes what is missing before it trains.

Letters: B maps of a batch, M maps in all, N image tokens of an image (padded).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from prunezoo.core.errors import PruneZooError
from prunezoo.host import Encoded, encode, full_forward
from prunezoo.host.signals.language import check_signals
from trainers.data.conversation import ConversationCollator
from trainers.data.loading import ResumableLoader
from trainers.data.modules import LlavaJsonDataModule, SuiteDataModule
from trainers.data.shards import ShardedCache
from trainers.training.frozen import FrozenModule, judge
from trainers.training.guide_names import GRAD_ATTENTION, GuideName, find_guide, fixed
from trainers.training.losses import answer_slots

from .vlm_cache import CachedDataModule, Worker, dtype_of


@dataclass(frozen=True)
class RelevanceWorker(Worker):
    """Computes relevance maps, only of those items that the model answers rightly.

    Attributes:
        max_tokens: only the first so many tokens of an answer are explained; None: all.
        signal: kept beside each map, for the network that is to learn the map from it.
        guide: whose map it is, see `guide_names.GUIDES`; of those that draw a slot of the answer, always the same one.
    """

    max_tokens: int | None
    signal: str
    guide: GuideName = GRAD_ATTENTION

    label = "relevance maps"

    def bytes_per_item(self, vlm: Any) -> int:
        """See Worker."""
        inputs = self.encode(vlm, self.collator(), range(min(4, len(self.items)))).inputs
        values = 1 + inputs.signal(self.signal)[0, 0].numel()  # of a token, 4 bytes each; and two numbers of the item
        return 16 + 4 * values * round(float(inputs.valid.sum(1).double().mean()))

    def read(self, vlm: Any, collate: ConversationCollator, numbers: range) -> dict[str, Tensor]:
        """The maps of some items.

        Returns:
            item (M,) long, the number of each; tokens (M,) long, N of each; relevance (sum of N,) and signal (sum of N,
            ...), float32, image after image.
        """
        encoded = self.encode(vlm, collate, numbers)
        right = answers_rightly(vlm, encoded).tolist()
        item = list(compress(numbers, right))
        if not item:
            none, nothing = torch.zeros(0, dtype=torch.long), torch.zeros(0)
            return {"item": none, "tokens": none, "relevance": nothing, "signal": nothing}
        if not all(right):  # the passes to come are the dear ones
            encoded = self.encode(vlm, collate, item)
        valid = encoded.inputs.valid
        guide = find_guide(self.guide, **({"max_tokens": self.max_tokens} if self.guide == GRAD_ATTENTION else {}))
        return {
            "item": torch.tensor(item),
            "tokens": valid.sum(1),
            "relevance": fixed(guide, vlm, encoded)[valid],
            "signal": encoded.inputs.signal(self.signal)[valid].float(),
        }

    @torch.no_grad()
    def encode(self, vlm: Any, collate: ConversationCollator, numbers: Sequence[int]) -> Encoded:
        """Some items with their labels, and the signal that the network reads."""
        return encode(vlm, collate([self.items[number] for number in numbers]), (self.signal,))


@torch.no_grad()
def answers_rightly(vlm: Any, encoded: Encoded) -> Tensor:
    """(B,) bool: the model's first choice is the reference's at every place of the answer."""
    full = full_forward(vlm, encoded)
    logits, tokens, sample = answer_slots(full.logits, full.labels)
    return judge(logits, logits, tokens, sample, len(encoded.mask))[:, 0] > 0


class MapSet(Dataset):
    """Pairs out of a cache of maps, held in memory: signal (N, ...) and relevance (N,)."""

    def __init__(self, cache: ShardedCache) -> None:
        shards = list(cache.read())
        self.sizes = torch.cat([shard["tokens"] for shard in shards])
        self.ends = self.sizes.cumsum(0)
        self.signal, self.relevance = (torch.cat([shard[name] for shard in shards]) for name in ("signal", "relevance"))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        here = slice(int(self.ends[index] - self.sizes[index]), int(self.ends[index]))
        return self.signal[here], self.relevance[here]


def pad_maps(pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """To signal (B, N, ...) and relevance (B, N), 0 on padding, and valid (B, N)."""
    signal, relevance = (pad_sequence(list(part), batch_first=True) for part in zip(*pairs, strict=True))
    sizes = torch.tensor([len(pair[1]) for pair in pairs])
    return {"signal": signal, "relevance": relevance, "valid": torch.arange(relevance.shape[1]) < sizes[:, None]}


class MapDataModule(CachedDataModule):
    """Trains on cached maps of the training items, and validates on items; to be mixed into a data module of items.

    Args:
        vlm: See ItemDataModule.
        maps: Folder of the cache; what is missing there is computed before training.
        maps_per_step: Maps a step and process.
        shard_items: Items of one file of the cache.
        processes: Processes that compute what is missing.
        max_tokens: Only the first so many tokens of an answer are explained, each at the price of a backward pass;
            null: all. Of `grad_attention` only.
        signal: What the network reads, kept beside each map.
        guide: Whose maps: `grad_attention` (the paper's), `relevance`, `attention` of all layers, `lrp`, `provenance`.
        source: See the data module of items. Its `train_items` are asked, and give a map each if they are answered
            rightly; its `batch_size` is that of the frozen model's passes.
    """

    content = "relevance maps 2"

    def __init__(
        self,
        vlm: str,
        maps: str,
        maps_per_step: int = 128,
        shard_items: int = 256,
        processes: int = 1,
        max_tokens: int | None = None,
        signal: str = "prompt_attention",
        guide: GuideName = GRAD_ATTENTION,
        **source: Any,
    ) -> None:
        super().__init__(vlm, maps, shard_items, processes, **source)
        for name, value in {"maps_per_step": maps_per_step, "max_tokens": max_tokens}.items():
            if value is not None and value < 1:
                raise PruneZooError(f"{name} must be at least 1, got {value}")
        self.maps_per_step, self.max_tokens, self.signal = maps_per_step, max_tokens, signal
        check_signals((signal,))
        find_guide(guide)
        if max_tokens is not None and guide != GRAD_ATTENTION:
            raise PruneZooError(f"max_tokens={max_tokens} is of guide={GRAD_ATTENTION}, not of {guide}: leave it out")
        self.guide: GuideName = guide
        self.map_set: MapSet | None = None

    def facts(self, module: FrozenModule) -> dict[str, Any]:
        """See CachedDataModule."""
        more = {} if self.guide == GRAD_ATTENTION else {"guide": self.guide}  # caches of before have no other
        return {"max_tokens": self.max_tokens, "signal": self.signal, **more}

    def worker(self, module: FrozenModule) -> RelevanceWorker:
        """See CachedDataModule."""
        passes = (self.vlm, dtype_of(module.vlm), self.items("train"), self.batch_size, self.max_length)
        return RelevanceWorker(*passes, self.max_tokens, self.signal, self.guide)

    def setup(self, stage: str | None = None) -> None:
        """Open the items, and read the maps."""
        super().setup(stage)
        if self.map_set is None:
            self.map_set = MapSet(self.cache(self.module))

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled maps, endless over epochs, resumable in mid-epoch."""
        assert self.map_set is not None and self.trainer is not None
        world_size, rank = self.trainer.world_size, self.trainer.global_rank
        if len(self.map_set) < self.maps_per_step * world_size:
            raise PruneZooError(
                f"{len(self.map_set)} maps do not fill one step of {world_size} x maps_per_step={self.maps_per_step}: "
                "lower it, or raise train_items"
            )
        return ResumableLoader(
            self.map_set, self.maps_per_step, pad_maps, world_size=world_size, rank=rank, seed=self.seed
        )


class SuiteMaps(MapDataModule, SuiteDataModule):
    """Maps of a suite's training split."""


class LlavaJsonMaps(MapDataModule, LlavaJsonDataModule):
    """Maps of a LLaVA-format file's training pictures."""
