"""Cosines of a few tokens to all others, as greedy methods ask for them: one or some more in each step."""

from torch import Tensor
from torch.nn import functional

from .plan import gather_rows

SHARE = 16
"""Multiplying all tokens by all costs about as much as one in so many of them by all, one after another."""


class Cosines:
    """Rows of the matrix of cosines ``(B, N, N)``.

    The matrix itself is made where that is faster, and no larger than the tokens are: more rows asked for than one in
    16, and no more tokens than they are wide. Else a row is made when it is asked for.

    Args:
        features: ``(B, N, D)``.
        valid: ``(B, N)`` bool; cosines to all others are 0.
        most: Rows that will be asked for, of each image.
    """

    def __init__(self, features: Tensor, valid: Tensor, most: int) -> None:
        self.unit = functional.normalize(features.float(), dim=-1).masked_fill(~valid[..., None], 0.0)
        _, count, width = features.shape
        self.whole = self.unit @ self.unit.mT if count <= min(width, SHARE * most) else None

    def rows(self, index: Tensor) -> Tensor:
        """``(B, K, N)``, new, of the tokens ``index (B, K)``."""
        return gather_rows(self.unit, index) @ self.unit.mT if self.whole is None else gather_rows(self.whole, index)
