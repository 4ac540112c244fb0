"""Explainability maps: a small CNN tells from the first layer's attention which image tokens the answer will rest on.

Task-Related Token Compression in Multimodal Large Language Models from an Explainability Perspective, Lei et al.,
ICLR 2026, https://arxiv.org/abs/2506.01097.

From the paper: a few depthwise-separable 1-D convolutions turn the attention that the prompt pays to the image tokens
in the first layer of the language model into a map of their relevance to the answer, which otherwise takes the whole
model and its gradients; the map chooses the tokens before the language model runs. Fully convolutional, so any number
of tokens goes. One network serves one vision-language model, which stays frozen.

Reconstructed, since what could be read of the paper does not say it: in which form the attention enters, activation,
normalisation and kernel. Attention weights are as small as the tokens are many and differ by orders of magnitude; so
their logarithms enter, with mean 0 and variance 1 over each image. On held-out maps of the embedded model that fitted
better than logarithms alone, roots, multiples of the mean, or the weights themselves, in this order.

Ours: `heads`. One map, the mean over heads, is what the paper's network seems to read, and the default. Heads look for
different things, so a network that reads each head's map as a channel of its own is told more at hardly any price.

Letters: B batch, N image tokens, H heads, C channels.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, Pruner
from ..core.errors import PruneZooError
from ..core.registry import register_pruner


@dataclass(frozen=True)
class ExplainCNNConfig(PrunerConfig):
    """Sizes of an explainability-map CNN; the defaults are the paper's."""

    widths: tuple[int, ...] = (32, 64, 128, 256, 512)  # channels after each convolution
    kernel: int = 3  # tokens that a convolution sees, odd
    heads: int = 0  # attention heads of the first layer, each read as a channel; 0: their mean, as the paper

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise PruneZooError(f"explain_cnn: widths must be one or more numbers from 1, got {list(self.widths)}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise PruneZooError(f"explain_cnn: kernel must be odd and at least 1, got {self.kernel}")
        if self.heads < 0:
            raise PruneZooError(f"explain_cnn: heads must be the model's number of heads or 0, got {self.heads}")


@register_pruner("explain_cnn")
class ExplainCNN(Pruner):
    """Scores the visual tokens by the relevance that their attention from the prompt foretells."""

    stage = "prompt"
    criteria = ("learned score",)
    distribution = True
    config_class = ExplainCNNConfig
    config: ExplainCNNConfig

    def __init__(self, config: ExplainCNNConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        c = self.config
        before = (max(c.heads, 1), *c.widths)
        self.layers = nn.ModuleList(Separable(*channels, c.kernel) for channels in zip(before, c.widths, strict=False))
        self.head = nn.Linear(c.widths[-1], 1)

    @classmethod
    def tiny_config(cls, feature_dim: int, text_dim: int) -> dict[str, Any]:
        """See the base class."""
        return {"widths": (8, 16), "heads": 4}

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The attention, of all heads together or of each."""
        return ("prompt_head_attention",) if self.config.heads else ("prompt_attention",)

    def score(self, inputs: PruneInputs) -> Tensor:
        """Scores (B, N), higher = keep: log-shares of the relevance, up to a constant."""
        (name,) = self.needs
        attention = inputs.signal(name)
        attention = attention if self.config.heads else attention[..., None]
        if attention.shape[-1] != max(self.config.heads, 1):
            raise PruneZooError(
                f"this explain_cnn was built for {self.config.heads} attention heads, the model has "
                f"{attention.shape[-1]}: build it with heads={attention.shape[-1]}"
            )
        x = standardised_log(attention, inputs.valid).to(self.head.weight.dtype)
        for layer in self.layers:
            x = layer(x, inputs.valid)
        return self.head(x).squeeze(-1).float()


class Separable(nn.Module):
    """A convolution over neighbours, channel by channel, then a mix of channels, token by token; GELU, RMS norm."""

    def __init__(self, before: int, after: int, kernel: int) -> None:
        super().__init__()
        self.neighbours = nn.Conv1d(before, before, kernel, padding=kernel // 2, groups=before)
        self.channels = nn.Linear(before, after)
        self.norm = nn.RMSNorm(after)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Tokens (B, N, before) to (B, N, after); padding counts as the zeros beyond the ends."""
        x = self.neighbours((x * valid[..., None]).transpose(1, 2)).transpose(1, 2)
        return self.norm(F.gelu(self.channels(x)))


def standardised_log(attention: Tensor, valid: Tensor) -> Tensor:
    """The logarithm of each token's attention, with mean 0 and variance 1 over the image, however many tokens it has.

    Args:
        attention: (B, N, C), at least 0. What has less than a thousandth of the image's mean counts as having that.
        valid: (B, N) bool.

    Returns:
        (B, N, C) float32; all 0 where every token has the same attention.
    """
    real, count = valid[..., None], valid.sum(1).clamp_min(1)[:, None, None]
    attention = attention.float().masked_fill(~real, 0.0)
    mean = attention.sum(1, keepdim=True) / count
    log = (attention / mean.clamp_min(1e-30)).clamp_min(1e-3).log()
    centred = (log - (log * real).sum(1, keepdim=True) / count) * real
    return centred / (centred.square().sum(1, keepdim=True) / count).sqrt().clamp_min(1e-6)
