"""How a scorer in front of the language model reads image and prompt: both in one narrow space, words as phrases.

Letters: B images, N image tokens, T words, D width of the language model, E hidden width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..core.contract import PruneInputs
from ..core.errors import PruneZooError
from ._blocks import TextBlock, distance_features


class PromptReader(nn.Module):
    """One shared projection, orthogonal at first so that likeness survives it, and blocks over the words, as in PPM."""

    def __init__(self, name: str, width: int, hidden: int, heads: int, text_blocks: int) -> None:
        super().__init__()
        self.name, self.width = name, width
        self.project = nn.Linear(width, hidden, bias=False)
        nn.init.orthogonal_(self.project.weight)
        self.blocks = nn.ModuleList(TextBlock(hidden, heads) for _ in range(text_blocks))

    def forward(self, inputs: PruneInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, E), words (B, T, E), and which words are real (B, T).

        Raises:
            PruneZooError: There is no prompt, or the model is of another width.
        """
        if inputs.text is None or inputs.text_valid is None:
            raise PruneZooError(f"{self.name} reads the prompt and got none: give text")
        if inputs.features.shape[-1] != self.width:
            raise PruneZooError(
                f"this {self.name} was built for tokens of width {self.width}, the model's have "
                f"{inputs.features.shape[-1]}: build it with width={inputs.features.shape[-1]}"
            )
        real = inputs.text_valid
        words = self.enter(inputs.text)
        words = words + 0.1 * distance_features(real, words.shape[-1]).to(words.dtype)
        for block in self.blocks:
            words = block(words, real)
        return self.enter(inputs.features), words, real

    def enter(self, tokens: Tensor) -> Tensor:
        """(B, ·, D) as (B, ·, E), from unit RMS: words are often far smaller than visual tokens."""
        tokens = tokens.to(self.project.weight.dtype)
        return self.project(F.rms_norm(tokens, tokens.shape[-1:]))
