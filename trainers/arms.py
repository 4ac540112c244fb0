"""What every arm of a budget policy earns: each item read once under each budget by the frozen model, kept on disk.

Letters: B items of a batch, M items in all, A arms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import AutoProcessor

from modules.core.contract import Pruner
from modules.core.errors import PruneZooError
from modules.host import encode, encode_needs, run_pruned

from .data.conversation import ConversationCollator
from .data.modules import GroupedCollator, ItemDataModule, LlavaJsonDataModule, SuiteDataModule
from .data.shards import Advance, Compute, ShardedCache, fill
from .data.suite import Item
from .evaluation.loading import default_device
from .frozen import judge, load_frozen
from .losses import answer_slots
from .teacher import dtype_of, fingerprint, sample_of, worker_device

Reward = Literal["probability", "log_likelihood", "right"]
"""Of the reference answer: its probability, mean log-probability a token in nats, whether it is the first choice."""
EARNED = "earned"
"""Key of the batch under which rewards travel."""


@dataclass(frozen=True)
class ArmWorker:
    """Opens the frozen model in some process, to read items there under every arm.

    Attributes:
        vlm: folder or Hub id.
        dtype: that the model is held in, as `float32`.
        pruner: whose budgets the arms are.
        arms: shares of the tokens.
        items: the questions.
        batch_size: items of a forward pass.
        max_length: longest sequence in tokens; see ConversationCollator.
    """

    vlm: str
    dtype: str
    pruner: Pruner
    arms: tuple[float, ...]
    items: Sequence[Item]
    batch_size: int
    max_length: int | None

    def __call__(self, number: int) -> Compute:
        """Load it; several processes spread over the GPUs that there are."""
        return self.on(load_frozen(self.vlm, self.dtype).to(worker_device(number)))

    def on(self, vlm: Any) -> Compute:
        """The same with a model that is loaded."""
        collate = ConversationCollator(AutoProcessor.from_pretrained(self.vlm), max_length=self.max_length)
        pruner = self.pruner.to(vlm.device).eval()
        return lambda numbers, advance: self.compute(vlm, pruner, collate, numbers, advance)

    @torch.no_grad()
    def compute(
        self, vlm: Any, pruner: Pruner, collate: ConversationCollator, numbers: range, advance: Advance
    ) -> dict[str, Tensor]:
        """Read some items.

        Returns:
            item (M,) long, the number of each, and each :data:`Reward` (M, A) float32.
        """
        earned: list[dict[str, Tensor]] = []
        for first in range(numbers.start, numbers.stop, self.batch_size):
            items = [self.items[n] for n in range(first, min(first + self.batch_size, numbers.stop))]
            batch = {k: v.to(vlm.device) if isinstance(v, Tensor) else v for k, v in collate(items).items()}
            encoded = encode(vlm, batch, encode_needs(pruner))
            columns = [earn(run_pruned(vlm, encoded, pruner, arm).host, len(items)) for arm in self.arms]
            earned.append({name: torch.stack([column[name] for column in columns], 1) for name in get_args(Reward)})
            advance(len(items))
        rewards = {name: torch.cat([part[name] for part in earned]).cpu() for name in get_args(Reward)}
        return {"item": torch.arange(numbers.start, numbers.stop), **rewards}


def earn(host: Any, items: int) -> dict[str, Tensor]:
    """Each :data:`Reward` (B,) of what the model said, from its logits and labels."""
    logits, tokens, sample = answer_slots(host.logits, host.labels)
    log_p = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    total = log_p.new_zeros(items).index_add_(0, sample, log_p)
    return {
        "probability": total.exp(),
        "log_likelihood": total / torch.bincount(sample, minlength=items).clamp_min(1),
        "right": judge(logits, logits, tokens, sample, items)[:, 0],
    }


@dataclass(frozen=True)
class EarnedItem(Item):
    """An item with what each arm earns on it, (A,)."""

    earned: Tensor | None = None


class EarnedItems(Sequence[EarnedItem]):
    """Items, each with its row of rewards (M, A)."""

    def __init__(self, items: Sequence[Item], earned: Tensor) -> None:
        self.items, self.earned = items, earned

    def __len__(self) -> int:
        return len(self.earned)

    def __getitem__(self, index: int) -> EarnedItem:  # type: ignore[override]  # no slices
        return EarnedItem(**vars(self.items[index]), earned=self.earned[index])


class EarnedCollator(GroupedCollator):
    """A GroupedCollator that also hands on what the arms earn, (B, A)."""

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Processor output, labels, groups, rewards."""
        earned = [item.earned for item in items if isinstance(item, EarnedItem) and item.earned is not None]
        return {**super().__call__(items), EARNED: torch.stack(earned)}


class ArmDataModule(ItemDataModule):
    """Trains on items with what each arm earns on them; to be mixed into a data module of items.

    Args:
        vlm: See ItemDataModule.
        arms: Folder of the rewards; what is missing there is computed before training.
        reward: Which of them is trained on.
        shard_items: Items of one file there.
        processes: Processes that compute what is missing.
        source: See the data module of items; all its `train_items` are read under every arm.
    """

    def __init__(
        self,
        vlm: str,
        arms: str,
        reward: Reward = "probability",
        shard_items: int = 256,
        processes: int = 1,
        **source: Any,
    ) -> None:
        super().__init__(vlm, **source)
        if processes < 1:
            raise PruneZooError(f"processes must be at least 1, got {processes}")
        self.arms, self.reward, self.shard_items, self.processes = arms, reward, shard_items, processes

    def cache(self) -> ShardedCache:
        """The rewards of these items under this policy's arms.

        Raises:
            PruneZooError: The folder holds others; the message names what differs.
        """
        vlm, policy, items = self.frozen, self.policy, self.items("train")
        facts = {
            "content": "rewards of arms 1",  # the number is to be raised when they are computed differently
            "vlm": fingerprint(vlm),
            "dtype": dtype_of(vlm),
            "pruner": [policy.config.inner, policy.config.inner_config, fingerprint(policy.inner)],
            "arms": list(policy.config.arms),
            **self.source,
            "split": "train",
            "sample": sample_of(items),
            "max_length": self.max_length,
        }
        return ShardedCache(
            self.arms, facts, len(items), self.shard_items, "`python -m trainers.fit` computes it again"
        )

    def prepare_data(self) -> None:
        """Compute the rewards that are missing, in the first process of a machine."""
        vlm, policy, cache = self.frozen, self.policy, self.cache()
        worker = ArmWorker(
            self.vlm, dtype_of(vlm), policy.inner, policy.config.arms, self.items("train"), self.batch_size,
            self.max_length,
        )  # fmt: skip
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("items"), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(TextColumn("rewards of arms"), *columns) as progress:
            task = progress.add_task("", total=cache.items)
            opener = (lambda _: worker.on(vlm.to(default_device()))) if self.processes == 1 else worker
            fill(cache, opener, self.processes, lambda items: progress.advance(task, items))

    def setup(self, stage: str | None = None) -> None:
        """Open the items, and read their rewards."""
        if self.train_set is None:
            super().setup(stage)
            self.train_collate = EarnedCollator(self.collate.processor, max_length=self.max_length)
            assert self.train_set is not None
            earned = torch.cat([shard[self.reward] for shard in self.cache().read()])
            self.train_set = EarnedItems(self.train_set, earned)

    @property
    def frozen(self) -> Any:
        """The frozen model of the training that this is for."""
        assert self.trainer is not None
        return self.trainer.lightning_module.vlm

    @property
    def policy(self) -> Any:
        """Its budget policy."""
        assert self.trainer is not None
        return self.trainer.lightning_module.pruner


class SuiteArms(ArmDataModule, SuiteDataModule):
    """Rewards on a suite's training split."""


class LlavaJsonArms(ArmDataModule, LlavaJsonDataModule):
    """Rewards on a LLaVA-format file's training pictures."""
