"""What says which items are alike: the frozen model's own features of the picture, and its embeddings of the words.

Picture and words are embedded apart and joined, each of length 1/√2, so that neither outweighs the other (ours; the
papers have one encoder of pictures). The mean of the features of an item's pictures stands for them, as that of its
prompt's words does for these.

Letters: M items, B images, N image tokens, T words, D width of the language model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from prunezoo.host import encode
from trainers.data.conversation import ConversationCollator
from trainers.data.shards import ShardedCache

from .vlm_cache import Worker, dtype_of, fill_with_progress, fingerprint


@dataclass(frozen=True)
class EmbeddingWorker(Worker):
    """Embeds items."""

    label = "embeddings"

    def bytes_per_item(self, vlm: Any) -> int:
        """See Worker."""
        return 16 + 4 * vlm.config.get_text_config().hidden_size

    @torch.no_grad()
    def read(self, vlm: Any, collate: ConversationCollator, numbers: range) -> dict[str, Tensor]:
        """Embed some items.

        Returns:
            item (M,) long, the number of each; embedding (M, 2 D) float16 of length 1; group (M,) long, a hash of the
            name of its question group.
        """
        items = [self.items[number] for number in numbers]
        encoded = encode(vlm, collate(items))
        inputs = encoded.inputs
        pictures = mean_by(mean_of(inputs.features, inputs.valid), encoded.sample, len(items))
        assert inputs.text is not None and inputs.text_valid is not None  # `encode` gives them
        words = mean_by(mean_of(inputs.text, inputs.text_valid), encoded.sample, len(items))
        joined = torch.cat([F.normalize(pictures, dim=-1), F.normalize(words, dim=-1)], dim=-1) / 2**0.5
        groups = torch.tensor([crc32(item.group.encode()) for item in items])
        return {"item": torch.tensor(numbers), "embedding": joined.half(), "group": groups}


def mean_of(rows: Tensor, valid: Tensor) -> Tensor:
    """The mean (B, D) of the valid ones of rows (B, N, D), in float32."""
    total = rows.float().masked_fill(~valid[..., None], 0.0).sum(1)
    return total / valid.sum(1, keepdim=True).clamp_min(1)


def mean_by(rows: Tensor, sample: Tensor, samples: int) -> Tensor:
    """The mean (samples, D) of the rows (B, D) of each sample; ``sample`` (B,) says whose each is."""
    total = rows.new_zeros(samples, rows.shape[-1]).index_add_(0, sample, rows)
    return total / torch.bincount(sample, minlength=samples).clamp_min(1)[:, None]


def read_embeddings(
    folder: str, source: Mapping[str, Any], worker: EmbeddingWorker, vlm: Any, processes: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The embeddings of all items of a worker; what is missing in a folder is computed first.

    Args:
        folder: Of the cache.
        source: What the items are taken from.
        worker: Embeds them.
        vlm: Its model, loaded.
        processes: How many compute.

    Returns:
        (M, 2 D) embeddings, and (M,) question groups.

    Raises:
        PruneZooError: The folder holds something else.
    """
    facts = {
        "content": "embeddings 1",
        "vlm": fingerprint(vlm),
        "dtype": dtype_of(vlm),
        **source,
        "split": "train",
        "max_length": worker.max_length,
    }
    cache = ShardedCache(folder, facts, len(worker.items), 1024, "the same command computes it again")
    fill_with_progress(cache, worker, vlm, processes)
    shards = list(cache.read())
    joined = {name: torch.cat([shard[name] for shard in shards]) for name in ("embedding", "group")}
    return joined["embedding"].double().numpy(), joined["group"].numpy()
