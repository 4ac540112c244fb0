"""Train tail-drop latents beside a frozen vision-language model, after One-D-Piece's rule (arXiv 2501.10064).

Each step draws some lengths; the frozen model reads the prefix of that length in place of the image and should answer
as it does with all tokens: the loss is the mean over lengths of KL(full model ‖ prefix), and the error of rebuilding
the visual tokens from the prefix.

Letters: S answer slots of the batch, V vocabulary, N image tokens.
"""

import math
from typing import Any

import torch
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from prunezoo.host import encode, full_forward
from prunezoo.host.run import run_pruned
from prunezoo.learned.ppm import PPM
from prunezoo.learned.tail_drop import TailDrop
from trainers.data.modules import GROUPS

from .frozen import Dtype, FrozenModule
from .losses import answer_slots, distillation_kl


class TailDropModule(FrozenModule):
    """Frozen model and latents, and one loss over prefixes.

    Args:
        vlm: Folder or Hub id of a `transformers` image-text-to-text model. It stays frozen and out of the checkpoints.
        pruner: The latents to train.
        vlm_dtype: Type that the frozen model is held in: auto (as stored), float32, bfloat16 or float16.
        reader: Folder or Hub id of a trained PPM of the same sizes, which the latents read with; it stays as it is, for
            no gradient tells how to order tokens. None: a new one, which learns from what the latents lean towards.
        lengths_a_step: Prefixes that each step reads.
        longest: Longest prefix that is drawn, as a share in (0, 1] of the image's tokens. Lengths are drawn even on a
            log scale, from one token.
        drop: Whether they are drawn at all; False: always the longest, to see what the rule is good for.
        lr: Peak learning rate.
        warm_up: Share of the steps in which it rises from 0; from there it falls to 0 by a cosine.
        weight_decay: Of the matrices; vectors have none.
        measure: Shares of the tokens that validation keeps.
    """

    pruner: TailDrop

    def __init__(
        self,
        vlm: str,
        pruner: TailDrop,
        vlm_dtype: Dtype = "auto",
        reader: str | None = None,
        lengths_a_step: int = 1,
        longest: float = 1.0,
        drop: bool = True,
        lr: float = 1e-3,
        warm_up: float = 0.05,
        weight_decay: float = 0.01,
        measure: tuple[float, ...] = (1 / 3, 1 / 9, 1 / 18, 1 / 36),
    ) -> None:
        if lengths_a_step < 1 or not 0.0 < longest <= 1.0:
            raise PruneZooError(f"lengths_a_step={lengths_a_step} must be at least 1, longest={longest} in (0, 1]")
        super().__init__(vlm, pruner, vlm_dtype, lr, warm_up, weight_decay, measure)
        self.lengths_a_step, self.longest, self.drop = lengths_a_step, longest, drop
        if reader is not None:
            adopt_reader(pruner, reader)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Answer with all tokens, then with several prefixes."""
        batch.pop(GROUPS, None)
        with torch.no_grad():
            encoded = encode(self.vlm, batch, self.pruner.needs)
            full = full_forward(self.vlm, encoded)
            teacher = answer_slots(full.logits, full.labels)[0]  # (S, V)
        most = math.log(max(self.longest * encoded.inputs.valid.shape[1], 1.0))
        terms: list[Tensor] = []
        shares = torch.rand(self.lengths_a_step).tolist() if self.drop else [1.0]
        for share in shares:
            run = run_pruned(self.vlm, encoded, self.pruner, round(math.exp(share * most)))
            kl = distillation_kl(answer_slots(run.host.logits, run.host.labels)[0], teacher)
            own = self.pruner.loss_terms(run.output)
            terms += [kl, *own.values()]
            logged = {f"train/{name}": term.detach() for name, term in {"kl": kl, **own}.items()}
            self.log_dict(logged, batch_size=len(teacher))
        loss = torch.stack(terms).sum() / len(shares)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(teacher))
        return loss


def adopt_reader(pruner: TailDrop, source: str) -> None:
    """Give the reader the weights of a trained PPM, and keep them from training.

    Raises:
        PruneZooError: It is of other sizes.
    """
    ppm = PPM.from_pretrained(source)
    if ppm.config != pruner.reader.config:
        raise PruneZooError(f"reader='{source}' has {ppm.config}, the latents ask for {pruner.reader.config}")
    pruner.reader.load_state_dict(ppm.state_dict())
    pruner.reader.requires_grad_(False)
