"""Train heads that stand in a frozen vision tower, on what the tower itself says further on.

The bare tower runs once a step. What a pruner would find behind each of its blocks is read of it, and the pruner's own
`lesson` says how far its head is from what the blocks behind made of it: DToP's from the last states, A-CLIP's from the
attention of all blocks. No answer is asked for, so a step is as cheap as a look at the pictures.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunezoo.core.contract import PruneInputs
from prunezoo.core.errors import PruneZooError
from prunezoo.host import Encoded, encode
from prunezoo.host.families import find_family
from prunezoo.learned.a_clip import ACLIP
from prunezoo.learned.dtop import DToP
from trainers.data.modules import GROUPS

from .frozen import Dtype, FrozenModule


class HeadsModule(FrozenModule):
    """Frozen model, heads, and their lessons.

    Args:
        vlm: Folder or Hub id of a `transformers` image-text-to-text model. It stays frozen and out of the checkpoints.
        pruner: Of the vision stage, behind blocks, with a `lesson`.
        vlm_dtype: Type that the frozen model is held in: auto (as stored), float32, bfloat16 or float16.
        lr: Peak learning rate.
        warm_up: Share of the steps in which it rises from 0; from there it falls to 0 by a cosine.
        weight_decay: Of the matrices; vectors have none.
        measure: Shares of the tokens that validation keeps.
    """

    pruner: DToP | ACLIP
    depth: int

    def __init__(
        self,
        vlm: str,
        pruner: DToP | ACLIP,
        vlm_dtype: Dtype = "auto",
        lr: float = 1e-3,
        warm_up: float = 0.05,
        weight_decay: float = 0.01,
        measure: tuple[float, ...] = (1 / 3, 1 / 9),
    ) -> None:
        super().__init__(vlm, pruner, vlm_dtype, lr, warm_up, weight_decay, measure)
        tower = find_family(self.vlm).tower()
        tower.check_can_shrink(pruner.name)
        self.depth = tower.depth
        blocks = pruner.stages(self.depth)
        if blocks[-1] >= self.depth:
            raise PruneZooError(f"pruner '{pruner.name}' acts behind blocks {list(blocks)}, and {self.depth} run")

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """One step."""
        batch.pop(GROUPS, None)
        blocks = self.pruner.stages(self.depth)
        kinds = (*self.pruner.needs, "vision_states")
        wanted = (*(f"{kind}@{block}" for kind in kinds for block in blocks), *self.pruner.learns_from(self.depth))
        with torch.no_grad():
            encoded = encode(self.vlm, batch, tuple(dict.fromkeys(wanted)))
        losses = [self.pruner.lesson(self.found_behind(encoded, block)) for block in blocks]
        loss = torch.stack(losses).mean()
        named = {f"train/block_{block}": one.detach() for block, one in zip(blocks, losses, strict=True)}
        self.log_dict(named, batch_size=len(encoded.sample))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(encoded.sample))
        return loss

    def found_behind(self, encoded: Encoded, block: int) -> PruneInputs:
        """What the pruner would find behind a block of the bare tower, with what its lesson is of."""
        given = encoded.inputs.signals
        own = {kind: given[f"{kind}@{block}"] for kind in self.pruner.needs}
        lesson = {name: given[name] for name in self.pruner.learns_from(self.depth)}
        states = given[f"vision_states@{block}"]
        signals = {**own, **lesson}
        return replace(encoded.inputs, features=states, signals=signals, layer=block, depth=self.depth)
