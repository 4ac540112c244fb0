"""FasterVLM: keep the tokens that the vision tower's CLS token attends to.

[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster,
Zhang et al., 2024, https://arxiv.org/abs/2412.01818, code https://github.com/Theia-4869/FasterVLM.

The attention is that of the block whose output the projector reads, mean over heads. Neither the question nor the
likeness of tokens plays a part. Later versions of the paper are of its successor, here `vispruner`.

| | authors' code | paper | ours |
|---|---|---|---|
| towers without CLS | – | – | `attention="received"`: what a token receives, mean over heads and rows |
| T of a picture in tiles | T for each | – | T for the picture; with `select=tile` each has its part |
| newlines between rows of LLaVA-NeXT | all dropped | – | one stays as long as a patch of its row does |
| order | raster | – | raster |
| positions | renumbered | – | kept |
"""

from dataclasses import dataclass

from torch import Tensor

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, Pruner
from ..core.registry import register_pruner
from ..core.signals import TOWER_ATTENTION


@dataclass(frozen=True)
class FasterVLMConfig(PrunerConfig):
    """Settings of FasterVLM."""

    attention: str = "cls"  # "cls", or "received" for vision towers without CLS

    def __post_init__(self) -> None:
        """Check the range."""
        self.check_choices("fastervlm", attention=TOWER_ATTENTION)


@register_pruner("fastervlm")
class FasterVLM(Pruner):
    """Top tokens by CLS attention."""

    criteria = ("attention",)
    config_class = FasterVLMConfig
    config: FasterVLMConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Attention of the block whose output is projected."""
        return (TOWER_ATTENTION[self.config.attention],)

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: the attention weight from CLS to each patch, or what each patch receives."""
        return inputs.signal(self.needs[0])
