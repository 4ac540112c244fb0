"""Train DiffRate's rates beside a frozen vision-language model: by distillation, and to a share of the operations.

Each step runs the frozen tower with gates (:class:`prunezoo.host.stages.vision_relaxed.RelaxedTower`) and the frozen
language model on what it puts out, each token weighing as its gate says. The model should answer as it does with all
tokens, and the counts should cost the target: KL(full ‖ gated) + weight * (cost / whole cost - target)^2. DiffRate
(arXiv 2305.17997) has labels in the place of the first term, and GFLOPs of the tower alone in the second.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from prunezoo.host import Encoded, encode, full_forward, gated_forward
from prunezoo.host.families import find_family
from prunezoo.host.stages.vision_relaxed import RelaxedTower
from prunezoo.learned.diffrate import DiffRate
from trainers.data.modules import GROUPS

from .frozen import Dtype, FrozenModule
from .losses import answer_slots, distillation_kl


class RatesModule(FrozenModule):
    """Frozen model, rates, two losses.

    Args:
        vlm: Folder or Hub id of a `transformers` image-text-to-text model with a CLIP tower, of one picture size. It
            stays frozen and out of the checkpoints.
        pruner: The rates.
        vlm_dtype: Type that the frozen model is held in: auto (as stored), float32, bfloat16 or float16.
        target: Share in (0, 1) of the operations of tower and language model, on pictures alone, that is to be left.
        cost_weight: Weight of the squared distance to it.
        free: Share in [0, 1) of the steps, at the beginning, in which that weight is 0.
        lr: Peak learning rate.
        warm_up: Share of the steps in which it rises from 0; from there it falls to 0 by a cosine.
        measure: Shares of the tokens that validation keeps.
    """

    pruner: DiffRate
    family: Any
    tower: Any

    def __init__(
        self,
        vlm: str,
        pruner: DiffRate,
        vlm_dtype: Dtype = "auto",
        target: float = 0.6,
        cost_weight: float = 20.0,
        free: float = 0.0,
        lr: float = 0.01,
        warm_up: float = 0.0,
        measure: tuple[float, ...] = (1 / 3, 1 / 9),
    ) -> None:
        if not 0.0 < target < 1.0:
            raise PruneZooError(f"target={target} must lie in (0, 1)")
        if not 0.0 <= free < 1.0:
            raise PruneZooError(f"free={free} must lie in [0, 1)")
        super().__init__(vlm, pruner, vlm_dtype, lr, warm_up, 0.0, measure)
        self.target, self.cost_weight, self.free = target, cost_weight, free
        family = find_family(self.vlm)
        self.__dict__["family"], self.__dict__["tower"] = family, family.tower()
        if self.tower.depth != pruner.config.blocks:
            raise PruneZooError(f"pruner.config.blocks={pruner.config.blocks}: the tower runs {self.tower.depth}")

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """One step."""
        batch.pop(GROUPS, None)
        with torch.no_grad():
            encoded = encode(self.vlm, batch)
            full = full_forward(self.vlm, encoded)
            teacher = answer_slots(full.logits, full.labels)[0]
        if set(encoded.inputs.counts) != {self.pruner.config.tokens}:
            raise PruneZooError(
                f"pruner.config.tokens={self.pruner.config.tokens}: pictures have {sorted(set(encoded.inputs.counts))}"
            )
        features, gates = self.read_gated(encoded)
        inputs = replace(encoded.inputs, features=features)
        student = gated_forward(self.vlm, replace(encoded, inputs=inputs), gates)
        logits, tokens, _ = answer_slots(student.logits, student.labels)
        cost = self.cost()
        settled = self.global_step >= self.free * self.total_steps
        terms = {
            "kl": self.evenly(distillation_kl(logits, teacher), len(tokens)),
            "cost": self.cost_weight * settled * (cost - self.target).square(),
        }
        loss = torch.stack(list(terms.values())).sum()
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()}, batch_size=len(gates))
        self.log("train/operations", cost.detach(), prog_bar=True, batch_size=len(gates))
        return loss

    def read_gated(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Tokens of the language model, ``(R, N, D)``, and their gates, ``(R, N)``."""
        with RelaxedTower(self.tower, self.pruner, self.pruner.name, encoded.inputs) as relaxed:
            made = self.family.run_encoder("image", {**encoded.batch, **encoded.pixels}).pooler_output
        assert relaxed.gates is not None
        features = made if isinstance(made, Tensor) else torch.stack(list(made))
        return features, relaxed.gates.to(features.dtype)

    def cost(self) -> Tensor:
        """Operations of tower and language model on what is left, as a share of those on all tokens; with gradient."""
        dropping, merging = self.pruner.numbers()
        found = every = dropping.new_tensor(float(self.pruner.config.tokens))
        left = []
        for dropped, merged in zip(dropping, merging, strict=True):
            found = torch.minimum(torch.minimum(found.detach(), dropped), merged)
            left.append(found)
        return cost_share(self.vlm.config, every, left)


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
