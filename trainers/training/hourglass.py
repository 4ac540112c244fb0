"""Train an hourglass: few tokens of a clip, from which the answer and the hidden states of all tokens are made.

As in HoT (arXiv 2311.12028) the deeper layers run on few tokens and a recovery head restores the states of all; HoT is
trained by the error of what is restored, and so is this, against the states that the whole clip has in the frozen
model. As the frozen model should also answer as it does with all tokens, the loss is the sum of KL(full model ‖ few
tokens) and that error.

Letters: B clips (one a sample), N image tokens, K of them kept, D width of the language model, S answer slots of the
batch, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from prunezoo.core.plan import gather_rows
from prunezoo.host import Encoded, encode, full_forward
from prunezoo.host.stages.prompt import HostOutput, shorten_prompt
from prunezoo.learned.hourglass import Hourglass
from trainers.data.modules import GROUPS, TEACHER

from .distill import draw_budgets
from .frozen import Dtype, FrozenModule
from .losses import answer_slots, distillation_kl, unexplained


class HourglassModule(FrozenModule):
    """Frozen model, hourglass, and two losses. The images of a prompt are the frames of one clip.

    Args:
        vlm: Folder or Hub id of a `transformers` image-text-to-text model. It stays frozen and out of the checkpoints.
        pruner: The hourglass to train.
        vlm_dtype: Type that the frozen model is held in: auto (as stored), float32, bfloat16 or float16.
        behind: Decoder layer behind which states are restored, from 1; null: the last but one, whose states are the
            deepest that words still attend to.
        kl_weight: Weight of KL(full model ‖ few tokens) at the answer slots.
        hidden_weight: Weight of the error of the restored states.
        keep: Shares of the tokens, least and most; each clip's budget is drawn between them, even on a log scale.
        lr: Peak learning rate.
        warm_up: Share of the steps in which it rises from 0; from there it falls to 0 by a cosine.
        weight_decay: Of the matrices; vectors have none.
        measure: Shares of the tokens that validation keeps, by hard selection.
    """

    pruner: Hourglass
    clips = True

    def __init__(
        self,
        vlm: str,
        pruner: Hourglass,
        vlm_dtype: Dtype = "auto",
        behind: int | None = None,
        kl_weight: float = 1.0,
        hidden_weight: float = 1.0,
        keep: tuple[float, float] = (0.03, 0.2),
        lr: float = 1e-3,
        warm_up: float = 0.05,
        weight_decay: float = 0.01,
        measure: tuple[float, ...] = (1 / 8, 1 / 16, 1 / 32),
    ) -> None:
        if not 0.0 < keep[0] <= keep[1] <= 1.0:
            raise PruneZooError(f"keep must be two shares, 0 < least <= most <= 1, got {list(keep)}")
        super().__init__(vlm, pruner, vlm_dtype, lr, warm_up, weight_decay, measure)
        depth = self.vlm.config.get_text_config().num_hidden_layers
        if behind is not None and not 1 <= behind <= depth:
            raise PruneZooError(f"behind={behind}: the decoder has layers 1 to {depth}")
        self.behind = max(depth - 1, 1) if behind is None else behind
        self.kl_weight, self.hidden_weight, self.keep = kl_weight, hidden_weight, keep

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Read the whole clip, then few tokens of it."""
        for beside in (GROUPS, TEACHER):
            batch.pop(beside, None)
        with torch.no_grad():
            encoded = encode(self.vlm, batch, self.pruner.needs, clips=True)
            full = full_forward(self.vlm, encoded, output_hidden_states=True)
        teacher, inputs = answer_slots(full.logits, full.labels)[0], encoded.inputs
        output = self.pruner(inputs, draw_budgets(inputs.valid.sum(1), *self.keep))
        shorter, _ = shorten_prompt(self.vlm, encoded, output)
        student = full_forward(self.vlm, shorter, output_hidden_states=True)
        logits = answer_slots(student.logits, student.labels)[0]
        restored = self.pruner.recovered(inputs, output, self.states(student, shorter))
        error = unexplained(restored, self.states(full, encoded), inputs.valid)
        kl = self.evenly(distillation_kl(logits, teacher), len(teacher))
        loss = self.kl_weight * kl + self.hidden_weight * error
        self.log_dict({"train/kl": kl.detach(), "train/hidden": error.detach()}, batch_size=len(inputs.valid))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(inputs.valid))
        return loss

    def states(self, said: HostOutput, encoded: Encoded) -> Tensor:
        """``(B, N, D)``: hidden states of the image tokens that a prompt has; arbitrary on padding."""
        assert said.hidden_states is not None  # they were asked for
        return gather_rows(said.hidden_states[self.behind][encoded.sample], encoded.slots)
