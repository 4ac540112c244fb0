"""What every arm of a budget policy earns: each item read once under each budget by the frozen model, kept on disk.

Letters: B items of a batch, M items in all, A arms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from prunezoo.host import encode, encode_needs, run_pruned
from prunezoo.learned.budget import BudgetPolicy
from trainers.data.conversation import ConversationCollator
from trainers.data.modules import EARNED, GroupedCollator, LlavaJsonDataModule, SuiteDataModule
from trainers.data.suite import Item
from trainers.training.frozen import FrozenModule, judge
from trainers.training.losses import answer_slots

from .vlm_cache import CachedDataModule, PrunedWorker, dtype_of, fingerprint

Reward = Literal["probability", "log_likelihood", "right"]
"""Of the reference answer: its probability, mean log-probability a token in nats, whether it is the first choice."""


@dataclass(frozen=True)
class ArmWorker(PrunedWorker):
    """Reads items under every arm.

    Attributes:
        arms: shares of the tokens.
    """

    arms: tuple[float, ...]

    label = "rewards of arms"

    def bytes_per_item(self, vlm: Any) -> int:
        """See Worker."""
        return 8 + 4 * len(get_args(Reward)) * len(self.arms)

    @torch.no_grad()
    def read(self, vlm: Any, collate: ConversationCollator, numbers: range) -> dict[str, Tensor]:
        """What some items earn.

        Returns:
            item (M,) long, the number of each, and each :data:`Reward` (M, A) float32.
        """
        encoded = encode(vlm, collate([self.items[number] for number in numbers]), encode_needs(self.pruner))
        columns = [earn(run_pruned(vlm, encoded, self.pruner, arm).host, len(numbers)) for arm in self.arms]
        rewards = {name: torch.stack([column[name] for column in columns], 1) for name in get_args(Reward)}
        return {"item": torch.tensor(numbers), **rewards}


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


class ArmDataModule(CachedDataModule):
    """Trains on items with what each arm earns on them; to be mixed into a data module of items.

    Args:
        vlm: See ItemDataModule.
        arms: Folder of the rewards; what is missing there is computed before training.
        reward: Which of them is trained on.
        shard_items: Items of one file there.
        processes: Processes that compute what is missing.
        source: See the data module of items; all its `train_items` are read under every arm.
    """

    content = "rewards of arms 2"

    def __init__(
        self,
        vlm: str,
        arms: str,
        reward: Reward = "probability",
        shard_items: int = 256,
        processes: int = 1,
        **source: Any,
    ) -> None:
        super().__init__(vlm, arms, shard_items, processes, **source)
        self.reward = reward

    def facts(self, module: FrozenModule) -> dict[str, Any]:
        """See CachedDataModule."""
        policy = policy_of(module)
        pruner = [policy.config.inner, policy.config.inner_config, fingerprint(policy.inner)]
        return {"pruner": pruner, "arms": list(policy.config.arms)}

    def worker(self, module: FrozenModule) -> ArmWorker:
        """See CachedDataModule."""
        policy, items = policy_of(module), self.items("train")
        dtype = dtype_of(module.vlm)
        return ArmWorker(self.vlm, dtype, items, self.batch_size, self.max_length, policy.inner, policy.config.arms)

    def setup(self, stage: str | None = None) -> None:
        """Open the items, and read their rewards."""
        if self.train_set is None:
            super().setup(stage)
            self.train_collate = EarnedCollator(self.collate.processor, max_length=self.max_length)
            assert self.train_set is not None
            earned = torch.cat([shard[self.reward] for shard in self.cache(self.module).read()])
            self.train_set = EarnedItems(self.train_set, earned)


def policy_of(module: FrozenModule) -> BudgetPolicy:
    """The budget policy in training.

    Raises:
        PruneZooError: Something else is trained.
    """
    if not isinstance(module.pruner, BudgetPolicy):
        raise PruneZooError(f"pruner '{module.pruner.name}' has no arms; only 'budget' trains from what they earn")
    return module.pruner


class SuiteArms(ArmDataModule, SuiteDataModule):
    """Rewards on a suite's training split."""


class LlavaJsonArms(ArmDataModule, LlavaJsonDataModule):
    """Rewards on a LLaVA-format file's training pictures."""
