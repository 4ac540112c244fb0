"""DToP: patches that are finished leave the vision tower early, and are put out again behind it.

Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation, Tang et al., ICCV 2023,
https://arxiv.org/abs/2308.01045, code https://github.com/zbwxp/Dynamic-Token-Pruning.

There heads that are trained on labelled pictures say at some depths how sure the class of a patch is. The sure ones
stop and keep what was said of them; but of each class the five surest go on, so that the others see something of it. A
vision-language model has no classes, so in the place of both stands what its own frozen tower says:

| | authors' code | ours |
|---|---|---|
| sure | largest probability of a class | what a small head expects of the cosine of a state to the patch's last state |
| the head learns from | labels; the tower is tuned | the frozen tower's last states, see `trainers.training.heads` |
| the head reads | states | a few numbers on each patch, see `_patch_facts.py`: so it goes with any width |
| classes, for the five that go on | predicted | clusters of the states by density peaks |
| where | blocks 7, 15 of 24, the third head being the last | behind 1/3 and 2/3 of the depth; `blocks` |
| how many stop | all that are sure | as `keep` asks; with `threshold` the sure alone, and never so many |
| what a stopped patch is put out as | what the head said | its state when it stopped |

The language model reads all tokens: combine it with a pruner of a later stage.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..core.clusters import density_peaks
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, Pruner
from ..core.errors import PruneZooError
from ..core.registry import register_pruner
from ..core.signals import TOWER_ATTENTION
from ._patch_facts import FactsHead, facts_needed

MOST_HIDDEN = 4096


@dataclass(frozen=True)
class DToPConfig(PrunerConfig):
    """Settings of DToP."""

    attention: str = "received"  # what the head reads of the attention: "received", or "cls" besides
    hidden: int = 32  # width of the head, from 1
    blocks: tuple[int, ...] | None = None  # behind which blocks patches may stop; None: 1/3 and 2/3 of the depth
    threshold: float = 0.0  # cosine above which a patch is sure, in [0, 1); 0: `keep` alone says how many stop
    classes: int = 10  # clusters, from 1
    spare: int = 5  # of each cluster, how many of the surest go on, at least 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check_choices("dtop", attention=TOWER_ATTENTION)
        if not 0 <= self.threshold < 1:
            raise PruneZooError(f"threshold={self.threshold} of dtop is out of range: it lies in [0, 1)")
        if not 1 <= self.hidden <= MOST_HIDDEN:
            raise PruneZooError(f"hidden={self.hidden} of dtop is out of range: 1 to {MOST_HIDDEN}")
        for name, least in (("classes", 1), ("spare", 0)):
            if getattr(self, name) < least:
                raise PruneZooError(f"{name}={getattr(self, name)} of dtop is out of range: at least {least}")


def spared(sure: Tensor, classes: Tensor, candidates: Tensor, count: int) -> Tensor:
    """The surest few of each class.

    Args:
        sure: ``(B, N)``.
        classes: ``(B, N)`` long.
        candidates: ``(B, N)`` bool, who can be among them.
        count: How many of a class; all where it has fewer.

    Returns:
        ``(B, N)`` bool.
    """
    same = (classes[:, None] == classes[..., None]) & candidates[:, None]
    earlier = torch.ones_like(same[0]).tril(-1)
    before = (sure[:, None] > sure[..., None]) | ((sure[:, None] == sure[..., None]) & earlier)
    return candidates & ((same & before).sum(2) < count)


@register_pruner("dtop")
class DToP(Pruner):
    """A head that says which patches are finished, at a few depths."""

    stage = "vision"
    criteria = ("learned score",)
    after_block = True
    restore = True
    config_class = DToPConfig
    config: DToPConfig

    def __init__(self, config: DToPConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.head = FactsHead(self.config.attention, self.config.hidden)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """What the head reads."""
        return facts_needed(self.config.attention)

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured blocks, or those at the thirds of the depth."""
        return self.config.blocks or tuple(sorted({max(round(depth * third / 3), 1) - 1 for third in (1, 2)}))

    def pace(self, inputs: PruneInputs, keep: Tensor, to_go: int) -> Tensor:
        """With `threshold` as many as are not sure, or are spared, and never fewer than asked for."""
        if not self.config.threshold:
            return keep
        sure = self.sure(inputs)
        confident = inputs.valid & (sure > self.config.threshold)
        stopping = confident & ~spared(sure, self.classes(inputs), confident, self.config.spare)
        return torch.maximum(keep.to(sure.device), (inputs.valid & ~stopping).sum(1))

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: low for what is sure; those that are spared are above all others."""
        sure = self.sure(inputs)
        threshold = self.config.threshold or -torch.inf
        confident = inputs.valid & (sure.detach() > threshold)
        going_on = spared(sure.detach(), self.classes(inputs), confident, self.config.spare)
        return going_on.to(sure.dtype) - sure

    def sure(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` in (0, 1): the expected cosine of a state to the patch's last one."""
        return self.head(inputs).sigmoid()

    def classes(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` long: the cluster of each patch, by its direction."""
        states = functional.normalize(inputs.features.detach().float(), dim=-1)
        counts = inputs.valid.sum(1)
        most = min(self.config.classes, states.shape[1])
        return density_peaks(states, inputs.valid, counts.clamp_max(most), most)[1]

    def learns_from(self, depth: int) -> tuple[str, ...]:
        """Signals that its lesson is of: the tower's last states."""
        return ("vision_states",)

    def lesson(self, inputs: PruneInputs) -> Tensor:
        """The loss of one exit: cross-entropy to the cosine of each state to the last one, negative ones being 0."""
        target = torch.cosine_similarity(inputs.features.float(), inputs.signal("vision_states").float(), dim=-1)
        loss = functional.binary_cross_entropy_with_logits(
            self.head(inputs).float(), target.clamp(0, 1), reduction="none"
        )
        return loss[inputs.valid].mean()
