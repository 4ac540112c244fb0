"""Train gates inside of a frozen vision tower: by distillation, and to a share of the operations.

Each step runs the frozen tower with the gates (:class:`prunezoo.host.stages.vision_relaxed.RelaxedTower`) and the
frozen language model on what it puts out, each token weighing as its gate says. The model should answer as it does with
all tokens, and what is left should cost the target:
kl_weight KL(full ‖ gated) + cost_weight pressure (cost / whole cost - target)^2.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.host import Encoded, encode, full_forward, gated_forward
from prunezoo.host.families import find_family
from prunezoo.host.stages.vision_relaxed import RelaxedTower
from trainers.data.modules import GROUPS

from .frozen import Dtype, FrozenModule
from .losses import answer_slots, distillation_kl


class GatedTowerModule(FrozenModule):
    """Frozen model, a pruner that relaxes, two losses.

    Args:
        vlm: Folder or Hub id of a `transformers` image-text-to-text model whose tower is a plain ViT; pictures of one
            size. It stays frozen and out of the checkpoints.
        pruner: Of the vision stage, with a `relax`.
        vlm_dtype: Type that the frozen model is held in: auto (as stored), float32, bfloat16 or float16.
        target: Share in (0, 1) of the operations of tower and language model, on pictures alone, that is to be left.
        cost_weight: Weight of the squared distance to it.
        kl_weight: Weight of KL(full model ‖ gated) at the answer slots.
        lr: Peak learning rate.
        warm_up: Share of the steps in which it rises from 0; from there it falls to 0 by a cosine.
        weight_decay: Of the matrices; vectors have none.
        measure: Shares of the tokens that validation keeps.
    """

    pruner: Any
    family: Any
    tower: Any

    def __init__(
        self,
        vlm: str,
        pruner: Pruner,
        vlm_dtype: Dtype,
        target: float,
        cost_weight: float,
        kl_weight: float,
        lr: float,
        warm_up: float,
        weight_decay: float,
        measure: tuple[float, ...],
    ) -> None:
        if not 0.0 < target < 1.0:
            raise PruneZooError(f"target={target} must lie in (0, 1)")
        super().__init__(vlm, pruner, vlm_dtype, lr, warm_up, weight_decay, measure)
        self.target, self.cost_weight, self.kl_weight = target, cost_weight, kl_weight
        family = find_family(self.vlm)
        self.__dict__["family"], self.__dict__["tower"] = family, family.tower()  # not to be saved with the pruner
        self.tower.check_can_shrink(pruner.name)  # by gates nothing is pruned by whole cells

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """One step."""
        batch.pop(GROUPS, None)
        with torch.no_grad():
            encoded = encode(self.vlm, batch)
            full = full_forward(self.vlm, encoded)
            teacher = answer_slots(full.logits, full.labels)[0]
        every = self.tokens_of_a_picture(encoded)
        with RelaxedTower(self.tower, self.pruner, self.pruner.name, encoded.inputs) as relaxed:
            made = self.family.run_encoder("image", {**encoded.batch, **encoded.pixels}).pooler_output
        assert relaxed.gates is not None
        features = made if isinstance(made, Tensor) else torch.stack(list(made))
        inputs = replace(encoded.inputs, features=features)
        student = gated_forward(self.vlm, replace(encoded, inputs=inputs), relaxed.gates.to(features.dtype))
        logits, tokens, _ = answer_slots(student.logits, student.labels)
        left = self.left(relaxed)
        cost = cost_share(self.vlm.config, left[0].new_tensor(float(every)), left)
        terms = {
            "kl": self.kl_weight * self.evenly(distillation_kl(logits, teacher), len(tokens)),
            "cost": self.cost_weight * self.pressure() * (cost - self.target).square(),
        }
        loss = torch.stack(list(terms.values())).sum()
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()}, batch_size=len(features))
        self.log("train/operations", cost.detach(), prog_bar=True, batch_size=len(features))
        return loss

    def tokens_of_a_picture(self, encoded: Encoded) -> int:
        """N of a batch's pictures, which must be the same for all."""
        if len(sizes := set(encoded.inputs.counts)) != 1:
            raise PruneZooError(
                f"training {self.pruner.name} takes pictures of one size, these have {sorted(sizes)} tokens"
            )
        return sizes.pop()

    def left(self, relaxed: RelaxedTower) -> Sequence[Tensor]:
        """Tokens that are left behind each block, scalars with gradient."""
        return [counts.mean() for counts in relaxed.left]

    def pressure(self) -> float:
        """How much the cost weighs at this step, in [0, 1]."""
        raise NotImplementedError


def cost_share(config: Any, every: Tensor, left: Sequence[Tensor]) -> Tensor:
    """Operations of tower and language model, as a share of those on all tokens; with gradient.

    Args:
        config: Of the model.
        every: Tokens of a picture.
        left: Those left inside of each block of the tower, between its halves; the language model reads the last.
    """
    vision, text = config.vision_config, config.get_text_config()
    total = whole = every.new_zeros(())
    for found, behind in zip((every, *left), left, strict=False):
        total = total + attention_cost(vision, found) + mlp_cost(vision, behind)
        whole = whole + attention_cost(vision, every) + mlp_cost(vision, every)
    for cost in (attention_cost, mlp_cost):
        total = total + text.num_hidden_layers * cost(text, left[-1])
        whole = whole + text.num_hidden_layers * cost(text, every)
    return total / whole


def attention_cost(config: Any, tokens: Tensor) -> Tensor:
    """Multiplications of a block's or a layer's attention."""
    width, heads = config.hidden_size, config.num_attention_heads
    inner = heads * (getattr(config, "head_dim", None) or width // heads)
    groups = getattr(config, "num_key_value_heads", None) or heads
    return tokens * 2 * width * inner * (1 + groups / heads) + 2 * tokens.square() * inner


def mlp_cost(config: Any, tokens: Tensor) -> Tensor:
    """Multiplications of its MLP, which has a gate in language models."""
    maps = 3 if hasattr(config, "num_key_value_heads") else 2
    return tokens * maps * config.hidden_size * config.intermediate_size
