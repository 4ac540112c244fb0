"""Second phase: the language model, with the vision tower frozen; many questions about a picture in one sequence.

Questions see the picture and themselves, not one another. Part of the batches leave out image tokens (background
first), and part of the questions are blind to some tokens that they are not about: a model that has only ever seen
whole pictures answers worse once tokens are gone, however well they were chosen, and could not tell pruners apart.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from trainers.data.scenes import GROUPS
from trainers.data.scenes_dense import as_pixels

from .build import WORD_IDS

_OPENING = ("<s>", "<user>")  # what comes before the picture


class LanguageModule(L.LightningModule):
    """Trains ``vlm.model.language_model`` (with its tied head); tower and projector stay as they are.

    Args:
        vlm: the model; trained in place.
        steps: optimiser steps, for the schedule.
        lr: peak learning rate: held for a share of the steps, then down to 3 %.
    """

    groups: ClassVar[tuple[str, ...]] = GROUPS
    held = 0.55  # share of the steps before the learning rate goes down
    keep: Mapping[int, float] = {48: 0.3, 72: 0.3, 96: 0.2, 144: 0.2}  # image tokens of a batch, and how often
    most_hidden = 0.97  # share of the other tokens that a blind question may not see

    def __init__(self, vlm: LlavaForConditionalGeneration, steps: int, lr: float = 1.5e-3) -> None:
        super().__init__()
        self.steps, self.lr, self.tokens = steps, lr, vlm.config.image_seq_length
        self.language = vlm.model.language_model
        self.vlm: Any
        self.__dict__["vlm"] = vlm  # frozen parts stay out of this module's state
        vlm.requires_grad_(False)
        self.language.requires_grad_(True)
        vlm.model.vision_tower.eval()

    def on_fit_start(self) -> None:
        """Move what Lightning does not know of."""
        self.vlm.to(self.device)

    @torch.no_grad()
    def look(self, batch: dict[str, Tensor], keep: int) -> tuple[Tensor, Tensor]:
        """Image tokens (B, keep, D) and their slots (B, keep), ascending: things before background, else at random."""
        shown = self.vlm.model.vision_tower(as_pixels(batch["image"]), output_hidden_states=True)
        tokens = self.vlm.model.multi_modal_projector(shown.hidden_states[-2][:, 1:]).float()
        first = batch["keep_first"] + torch.rand_like(batch["keep_first"])
        slots = first.topk(keep, dim=1).indices.sort(dim=1).values
        return tokens.gather(1, slots[..., None].expand(-1, -1, tokens.shape[-1])), slots

    def read(self, batch: dict[str, Tensor], keep: int, blind: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (M, V) and targets (M,) at the answers' tokens, and where those are (B, T - 1)."""
        tokens, slots = self.look(batch, keep)
        ids, segment, (rows, length) = batch["ids"], batch["segment"], batch["ids"].shape
        words = self.language.get_input_embeddings()
        opening = torch.tensor([WORD_IDS[word] for word in _OPENING], device=ids.device).expand(rows, -1)
        start = opening.shape[1] + keep
        with torch.no_grad():
            seen = torch.ones(rows, batch["about"].shape[1], self.tokens, dtype=torch.bool, device=ids.device)
            if blind:
                every = seen.float()
                rate = self.most_hidden * torch.rand_like(every[..., :1]) * (torch.rand_like(every[..., :1]) < 0.5)
                seen = (torch.rand_like(every) > rate) | batch["about"]
            seen = seen.gather(2, slots[:, None].expand(-1, seen.shape[1], -1))
            seen = seen.gather(1, segment.clamp_min(0)[..., None].expand(-1, -1, keep))  # (B, T, keep)
            total = start + length
            allowed = torch.ones(total, total, dtype=torch.bool, device=ids.device).tril().repeat(rows, 1, 1)
            allowed[:, start:, opening.shape[1] : start] = seen
            allowed[:, start:, start:] &= segment[:, :, None] == segment[:, None, :]
            mask = torch.zeros(rows, 1, total, total, device=ids.device).masked_fill_(~allowed[:, None], -1e9)
            before = torch.arange(opening.shape[1], device=ids.device).expand(rows, -1)
            behind = opening.shape[1] + self.tokens
            place = torch.cat([before, slots + opening.shape[1], batch["place"] + behind], dim=1)
        embeds = torch.cat([words(opening), tokens, words(ids)], dim=1)
        if torch.is_autocast_enabled(self.device.type):
            mask = mask.to(torch.get_autocast_dtype(self.device.type))
        hidden = self.language(
            inputs_embeds=embeds, attention_mask=mask, position_ids=place, use_cache=False
        ).last_hidden_state
        asked = batch["targets"][:, 1:] >= 0
        return hidden[:, start:-1][asked].float() @ words.weight.T, batch["targets"][:, 1:][asked], asked

    def draw_keep(self) -> int:
        """How many image tokens this batch has."""
        return list(self.keep)[int(torch.multinomial(torch.tensor(list(self.keep.values())), 1))]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One step on a number of image tokens drawn for the batch."""
        logits, targets, _ = self.read(batch, self.draw_keep(), blind=True)
        loss = F.cross_entropy(logits, targets)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Share of dialogues with every answer right, by group, all image tokens kept."""
        self.log_answers(batch, *self.read(batch, self.tokens, blind=False))

    def log_answers(self, batch: dict[str, Tensor], logits: Tensor, targets: Tensor, asked: Tensor) -> None:
        """Log the share of dialogues of each group with every answer right; arguments as `read` gives them."""
        right = torch.ones_like(asked)
        right[asked] = logits.argmax(-1) == targets
        segment, group = batch["segment"][:, 1:], batch["group"][:, 1:]
        correct: dict[int, list[bool]] = {}
        for row in range(len(segment)):
            for number in segment[row].unique().tolist():
                if number >= 0:
                    own = segment[row] == number
                    correct.setdefault(int(group[row][own][0]), []).append(bool(right[row][own].all()))
        for index, name in enumerate(self.groups):
            hits = correct.get(index, [])
            if hits:
                self.log(f"val/{name}", sum(hits) / len(hits), prog_bar=True, batch_size=len(hits), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW without decay on norms; warm-up, plateau, linear descent."""
        trained = [p for p in self.parameters() if p.requires_grad]
        weights, norms = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() < 2]
        groups = [{"params": weights, "weight_decay": 0.03}, {"params": norms, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.98))

        def scale(step: int) -> float:
            left = (self.steps - step) / max((1 - self.held) * self.steps, 1)
            return min((step + 1) / 200, 1.0) * (0.03 + 0.97 * min(1.0, max(left, 0.0)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
