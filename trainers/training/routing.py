"""Train the gates of token routing (arXiv 2308.03409) beside a frozen vision-language model, under a budget of compute.

Each step runs the frozen tower with the gates (:class:`prunezoo.host.stages.vision_relaxed.RelaxedTower`), and the
frozen language model on what it puts out, each token weighing as its gates say. The model should answer as it does with
all tokens, at the target's cost: kl_weight KL(full ‖ gated) + cost_weight warm-up (cost / whole cost - target)^2.
What a patch receives of attention, which gates read, counts the looks of patches that have stopped; in use those are
not there.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from prunezoo.host import encode, full_forward, gated_forward
from prunezoo.host.families import find_family
from prunezoo.host.stages.vision_relaxed import RelaxedTower
from prunezoo.learned.token_routing import TokenRouting
from trainers.data.modules import GROUPS

from .frozen import Dtype, FrozenModule
from .losses import answer_slots, distillation_kl
from .rates import cost_share


class RoutingModule(FrozenModule):
    """Frozen model, gates, two losses.

    Args:
        vlm: Folder or Hub id of a `transformers` image-text-to-text model whose tower is a plain ViT; pictures of one
            size. It stays frozen and out of the checkpoints.
        pruner: The gates.
        vlm_dtype: Type that the frozen model is held in: auto (as stored), float32, bfloat16 or float16.
        target: Share in (0, 1) of the operations of tower and language model, on pictures alone, that is to be left.
        cost_weight: Weight of the squared distance to it; the ancestor's 0.8.
        settling: Share in [0, 1] of the steps in which that weight rises from 0.
        kl_weight: Weight of KL(full model ‖ gated) at the answer slots.
        lr: Peak learning rate.
        warm_up: Share of the steps in which it rises from 0; from there it falls to 0 by a cosine.
        weight_decay: Of the matrices; vectors have none.
        measure: Shares of the tokens that validation keeps.
    """

    pruner: TokenRouting

    def __init__(
        self,
        vlm: str,
        pruner: TokenRouting,
        vlm_dtype: Dtype = "auto",
        target: float = 0.5,
        cost_weight: float = 0.8,
        settling: float = 0.2,
        kl_weight: float = 1.0,
        lr: float = 1e-3,
        warm_up: float = 0.05,
        weight_decay: float = 0.01,
        measure: tuple[float, ...] = (1 / 2, 1 / 9),
    ) -> None:
        if not 0.0 < target < 1.0:
            raise PruneZooError(f"target={target} must lie in (0, 1)")
        if not 0.0 <= settling <= 1.0:
            raise PruneZooError(f"settling={settling} must lie in [0, 1]")
        super().__init__(vlm, pruner, vlm_dtype, lr, warm_up, weight_decay, measure)
        self.target, self.cost_weight, self.settling, self.kl_weight = target, cost_weight, settling, kl_weight
        find_family(self.vlm).tower().check_can_shrink(pruner.name)  # by gates nothing is pruned by whole cells

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """One step."""
        batch.pop(GROUPS, None)
        with torch.no_grad():
            encoded = encode(self.vlm, batch)
            full = full_forward(self.vlm, encoded)
            teacher = answer_slots(full.logits, full.labels)[0]
        if len(sizes := set(encoded.inputs.counts)) != 1:
            raise PruneZooError(f"training token_routing takes pictures of one size, these have {sorted(sizes)} tokens")
        family = find_family(self.vlm)
        with RelaxedTower(family.tower(), self.pruner, self.pruner.name, encoded.inputs) as relaxed:
            made = family.run_encoder("image", {**encoded.batch, **encoded.pixels}).pooler_output
        assert relaxed.gates is not None
        features = made if isinstance(made, Tensor) else torch.stack(list(made))
        inputs = replace(encoded.inputs, features=features)
        student = gated_forward(self.vlm, replace(encoded, inputs=inputs), relaxed.gates.to(features.dtype))
        logits, tokens, _ = answer_slots(student.logits, student.labels)
        left = [counts.mean() for counts in relaxed.left]
        cost = cost_share(self.vlm.config, left[0].new_tensor(float(sizes.pop())), left)
        risen = min((self.global_step + 1) / max(self.settling * self.total_steps, 1), 1.0)
        terms = {
            "kl": self.kl_weight * self.evenly(distillation_kl(logits, teacher), len(tokens)),
            "cost": self.cost_weight * risen * (cost - self.target).square(),
        }
        loss = torch.stack(list(terms.values())).sum()
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()}, batch_size=len(features))
        self.log("train/operations", cost.detach(), prog_bar=True, batch_size=len(features))
        return loss
