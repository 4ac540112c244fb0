"""A policy that keeps tokens: PPM's scorer, read as a distribution over subsets, and trained by what the model answers.

Growing a Multi-head Twig via Distillation and Reinforcement Learning to Accelerate Large Vision-Language Models,
Shao et al., 2025, https://arxiv.org/abs/2503.14075, code https://github.com/MILVLG/twigvlm (branch twigvlm++).

After the pruning head of TwigVLM++ there (v3, and its code), which is trained by group-relative policy gradient on a
frozen model: subsets are drawn without replacement, each is really pruned and read, and the reward is the
log-likelihood of the reference answer. Here no twig grows on the model: the scorer is PPM's body (see ``ppm.py``),
warm-started from a distilled checkpoint. Reconstructed where the two differ.

The scores are the logits of a Plackett-Luce distribution. In use the policy is certain: it keeps the best scores,
which is the subset whose greedy drawing is likeliest at each pick.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.contract import PruneInputs
from ..core.errors import PruneZooError
from ..core.registry import register_pruner
from .ppm import PPM, PPMConfig


@dataclass(frozen=True)
class KeepPolicyConfig(PPMConfig):
    """Sizes of the scorer, and how daring the policy is while it learns."""

    temperature: float = 1.0  # > 0, scores are divided by it; higher draws more evenly, and changes no choice in use

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise PruneZooError(f"policy: temperature must be above 0, got {self.temperature}")


@register_pruner("policy")
class KeepPolicy(PPM):
    """PPM's scorer as a policy over subsets of tokens."""

    config_class = KeepPolicyConfig
    config: KeepPolicyConfig

    def __init__(self, config: KeepPolicyConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)

    def score(self, inputs: PruneInputs) -> Tensor:
        """Logits (B, N) of the first pick."""
        return super().score(inputs) / self.config.temperature
