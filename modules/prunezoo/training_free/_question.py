"""The words of the question, as far as anybody can tell them."""

from torch import Tensor
from torch.nn import functional

from ..core.contract import PruneInputs
from ..core.errors import PruneZooError
from ..core.roles import Role


def question(inputs: PruneInputs, pruner: str, remedy: str = "give text") -> tuple[Tensor, Tensor]:
    """Which words are asked, and all words.

    Args:
        inputs: What the pruner is given.
        pruner: Its name.
        remedy: What to do where there is none.

    Returns:
        ``(B, T)`` bool, all words of the prompt where their roles are not known, and ``(B, T, D)``.

    Raises:
        PruneZooError: There is no prompt.
    """
    if inputs.text is None or inputs.text_valid is None:
        raise PruneZooError(f"pruner '{pruner}' reads the prompt and got none: {remedy}")
    asked = inputs.text_valid
    return (asked if inputs.text_roles is None else asked & (inputs.text_roles == Role.QUESTION)), inputs.text


def mean_word(inputs: PruneInputs, pruner: str) -> Tensor:
    """``(B, D)`` float32: the mean of the question's words, each brought to length 1.

    Its product with a token of length 1 is the mean of the token's cosines to the words.

    Args:
        inputs: As in :func:`question`, and so are ``pruner`` and the error.
        pruner: As there.
    """
    asked, text = question(inputs, pruner)
    words = functional.normalize(text.float(), dim=-1).masked_fill(~asked[..., None], 0.0)
    return words.sum(1) / asked.sum(1, keepdim=True).clamp_min(1)
