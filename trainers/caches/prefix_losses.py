"""What the frozen model loses on each item when it reads a prefix of tail-drop latents, at every length, kept on disk.

Letters: I items, S lengths, E hidden width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunezoo.host import encode, full_forward
from prunezoo.host.run import run_pruned
from prunezoo.learned.tail_drop import TailDrop
from trainers.data.conversation import ConversationCollator
from trainers.data.shards import ShardedCache
from trainers.training.frozen import judge, load_frozen
from trainers.training.losses import answer_slots
from trainers.training.stop_rule import with_stops

from .vlm_cache import PrunedWorker, dtype_of, fill_with_progress, fingerprint


@dataclass(frozen=True)
class LossWorker(PrunedWorker):
    """Computes losses; its pruner is latents with a rule for the lengths, whose weights do not matter."""

    pruner: TailDrop

    label = "losses of prefixes"

    def bytes_per_item(self, vlm: Any) -> int:
        """See Worker."""
        stops, width = len(self.pruner.config.stops), self.pruner.config.hidden
        return 8 + 4 * stops + 1 + stops + stops * width * self.pruner.queries.element_size()

    @torch.no_grad()
    def read(self, vlm: Any, collate: ConversationCollator, numbers: range) -> dict[str, Tensor]:
        """Read each item with all tokens and with every prefix.

        Returns:
            item (I,) long; loss (I, S) float32; right (I, 1 + S) bool, whether the answer is the reference's, with all
            tokens first; known (I, S, E), see TailDrop.known.
        """
        encoded = encode(vlm, collate([self.items[number] for number in numbers]), self.pruner.needs)
        full = full_forward(vlm, encoded)
        teacher, tokens, sample = answer_slots(full.logits, full.labels)
        judged = [judge(teacher, teacher, tokens, sample, len(numbers))]
        for stop in self.pruner.config.stops:
            host = run_pruned(vlm, encoded, self.pruner, stop).host
            judged.append(judge(answer_slots(host.logits, host.labels)[0], teacher, tokens, sample, len(numbers)))
        table = torch.stack(judged, dim=1)  # (B, 1 + S, 3)
        return {
            "item": torch.tensor(numbers),
            "loss": table[:, 1:, 2].clamp_min(0),
            "right": table[..., 0] > 0,
            "known": self.pruner.known(encoded.inputs.to(self.pruner.queries.dtype)),
        }


def losses_of(worker: LossWorker, folder: Path, processes: int = 1, shard_items: int = 256) -> dict[str, Tensor]:
    """What LossWorker computes of all its items, from the disk as far as it lies there.

    Raises:
        PruneZooError: In the folder lies something of another model, other latents or other items.
    """
    vlm = load_frozen(worker.vlm, worker.dtype)
    facts = {
        "content": "losses of prefixes 2",
        "vlm": fingerprint(vlm),
        "vlm_dtype": dtype_of(vlm),
        "pruner": fingerprint(with_stops(worker.pruner, ())),
        "stops": worker.pruner.config.stops,
        "max_length": worker.max_length,
    }
    cache = ShardedCache(folder, facts, len(worker.items), shard_items, "run the same command again")
    fill_with_progress(cache, worker, vlm, processes)
    shards = list(cache.read())
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
