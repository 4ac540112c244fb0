"""The words of the question, as far as anybody can tell them."""

from torch import Tensor

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
