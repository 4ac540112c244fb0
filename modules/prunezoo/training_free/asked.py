"""Asked: keep the tokens that are most like a word of the question, in the language model's own input space.

Ours, and no more than the text half of what others do: HiPrune++ (arXiv 2508.00553) adds the tokens nearest to the mean
text embedding, MMTok (ICLR 2026) covers the question's words, CDPruner (arXiv 2506.10967), as OpenVINO runs it, weighs
by likeness to the words' embeddings. It is the plainest of them, for a reference: how much do embeddings alone say?

Words of the chat template, instructions and earlier answers are left out where the caller says which they are
(``markers`` of `attach`); without, every word of the prompt counts.
"""

from torch import Tensor
from torch.nn import functional

from ..core.contract import PruneInputs, Pruner
from ..core.registry import register_pruner
from ._question import question


@register_pruner("asked")
class Asked(Pruner):
    """Top tokens by the largest cosine to a word of the question; all alike where there is none."""

    criteria = ("prompt",)

    @property
    def reads_prompt(self) -> bool:
        """The words are all that it asks."""
        return True

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` in [-1, 1]."""
        asked, text = question(inputs, self.name)
        tokens, words = (functional.normalize(part.float(), dim=-1) for part in (inputs.features, text))
        likeness = (tokens @ words.transpose(1, 2)).masked_fill(~asked[:, None], -1.0)  # (B, N, T)
        return likeness.amax(2)
