"""Answers that a model really writes, greedily, to a batch of prompts."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from prunezoo.core.budgets import Keep
from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.host import attach
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import Item, Suite


def moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def prompts_of(vlm: Any, processor: Any, items: Sequence[Item]) -> dict[str, Any]:
    """The items as prompts, padded on the left, where the model is."""
    return moved(ConversationCollator(processor, answers=False)(items), vlm.device)


def write(vlm: Any, processor: Any, prompts: dict[str, Any], new_tokens: int) -> list[str]:
    """Greedy answers to left-padded prompts, without special tokens and white space around them."""
    written = vlm.generate(**prompts, max_new_tokens=new_tokens, do_sample=False)
    texts = processor.batch_decode(written[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


class Judge:
    """Scores what a model writes to the items of a batch, under any pruner.

    Args:
        vlm: the frozen model.
        processor: its processor.
        suite: which scores.
        items: the batch.
    """

    def __init__(self, vlm: Any, processor: Any, suite: Suite, items: Sequence[Item]) -> None:
        self.vlm, self.processor, self.suite, self.items = vlm, processor, suite, items
        self.prompts = prompts_of(vlm, processor, items)

    def __call__(self, pruner: Pruner | None = None, keep: Keep = 1.0, by_frame: bool = False) -> Tensor:
        """Scores (B,) in [0, 1]; without a pruner those of the full model; ``by_frame``: it sees no clips.

        Raises:
            PruneZooError: the suite gives a score outside [0, 1].
        """
        clips = self.suite.clips and not by_frame
        with attach(self.vlm, pruner, keep, clips=clips) if pruner is not None else nullcontext() as run:
            if run is not None:  # who remembers has nothing to remember: each item is the first of a stream
                run.memory.streams = range(len(self.items))
            said = write(self.vlm, self.processor, self.prompts, self.suite.new_tokens)
        scores = [float(self.suite.score(item, text)) for item, text in zip(self.items, said, strict=True)]
        for item, score in zip(self.items, scores, strict=True):
            if not 0 <= score <= 1:
                raise PruneZooError(f"suite {self.suite.name}: scores {item.id} with {score}, it must lie in [0, 1]")
        return torch.tensor(scores, dtype=torch.float64)
