"""The language model for pages: on tokens made from labels, or on what the frozen tower says."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from prunezoo.core.errors import PruneZooError
from trainers.data.pages import GROUPS

from .language import LanguageModule
from .pages_said import PatchWords, shows_something
from .pages_tower import say


@dataclass(frozen=True)
class Stage:
    """A part of the language model's curriculum; each begins a schedule of its own.

    Attributes:
        name: of its folder below `work`.
        steps: optimiser steps.
        shares: how often a question of each group is drawn; groups that are not named are not asked.
        kinds: of page, all alike, so one may stand there twice; none: those that the groups need.
        batch_size: pages of a step, of all processes together.
        lr: peak learning rate.
        held: share of the steps before it goes down, to 3 %.
        weights: of the loss at the answers of a group; 1 where not named.
        keep: image tokens of a batch, and how often; what shows something is kept first.
        drawn: whether the tower looks at pictures; otherwise tokens are made from labels.
        noise: deviation of what is added to made tokens.
        questions: most questions of a page.
        length: tokens of its sequence.
    """

    name: str
    steps: int
    shares: dict[str, float] = field(default_factory=lambda: dict.fromkeys(GROUPS, 1.0))
    kinds: list[str] = field(default_factory=list)
    batch_size: int = 16
    lr: float = 2e-3
    held: float = 1.0
    weights: dict[str, float] = field(default_factory=dict)
    keep: dict[int, float] = field(default_factory=lambda: {48: 0.75, 128: 0.25})
    drawn: bool = False
    noise: float = 0.02
    questions: int = 20
    length: int = 160

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "questions", "length"):
            if getattr(self, key) < 1:
                raise PruneZooError(f"{key}={getattr(self, key)} of stage {self.name}: at least 1")
        for group in (*self.shares, *self.weights):
            if group not in GROUPS:
                raise PruneZooError(f"stage {self.name}: no group is called {group!r}; there are {', '.join(GROUPS)}")


class PagesLanguage(LanguageModule):
    """Trains ``vlm.model.language_model`` but for its word embeddings, which the tower is taught by.

    Args:
        vlm: the model; trained in place.
        stage: what it is asked, and how long.
    """

    groups = GROUPS
    most_hidden = 1.0

    def __init__(self, vlm: LlavaForConditionalGeneration, stage: Stage) -> None:
        super().__init__(vlm, stage.steps, stage.lr)
        self.stage = stage
        self.keep: Mapping[int, float] = stage.keep
        self.held = stage.held
        self.words = PatchWords(vlm)
        self.language.get_input_embeddings().requires_grad_(False)

    @torch.no_grad()
    def look(self, batch: dict[str, Tensor], keep: int) -> tuple[Tensor, Tensor]:
        """Image tokens (B, keep, D) and their slots (B, keep), ascending: what shows something first, then any."""
        if self.stage.drawn:
            tokens = say(self.vlm, batch["image"])
        else:
            tokens = self.words(batch)
            tokens = tokens + self.stage.noise * torch.randn_like(tokens)
        first = torch.rand_like(tokens[..., 0]) + shows_something(batch)
        slots = first.topk(keep, dim=1).indices.sort(dim=1).values
        return tokens.gather(1, slots[..., None].expand(-1, -1, tokens.shape[-1])), slots

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One step on a number of image tokens drawn for the batch."""
        logits, targets, asked = self.read(batch, self.draw_keep(), blind=True)
        share = logits.new_tensor([self.stage.weights.get(group, 1.0) for group in GROUPS])
        share = share[batch["group"][:, 1:][asked]]
        loss = (F.cross_entropy(logits, targets, reduction="none") * share).sum() / share.sum()
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Accuracy as in the base class, and the loss of each group apart: it falls long before the accuracy rises."""
        logits, targets, asked = self.read(batch, self.tokens, blind=False)
        self.log_answers(batch, logits, targets, asked)
        each = F.cross_entropy(logits, targets, reduction="none")
        group = batch["group"][:, 1:][asked]
        for index, name in enumerate(GROUPS):
            if (group == index).any():
                self.log(f"loss/{name}", each[group == index].mean(), batch_size=int((group == index).sum()))
