"""The rival of methods inside the vision tower: random tokens, at the same blocks and as many as the method leaves.

What is dropped early in a frozen tower is missing in its later blocks, whoever chose it. So at equal tokens `random`,
which drops behind the tower, has it easier than any method inside, and only a random order at the same places says what
the choice itself is worth.
"""

from torch import Tensor

from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.training_free.random import RandomPruner


class RandomOrder(RandomPruner):
    """Random tokens at the places and in the numbers of another pruner; it is no method of the zoo.

    Args:
        like: the other, of the vision stage; what it merges is dropped here.
        seed: as of `random`.

    Raises:
        PruneZooError: it is of another stage.
    """

    name = "random_order"
    stage = "vision"
    like: Pruner

    def __init__(self, like: Pruner, seed: int) -> None:
        if like.stage != "vision":
            raise PruneZooError(
                f"random@{like.name}: this is for methods of the vision stage; in the {like.stage} stage take `random`"
            )
        super().__init__(seed=seed)
        self.__dict__["like"] = like  # not a submodule: its weights are not this one's
        self.after_block, self.restore = like.after_block, like.restore  # type: ignore[misc]  # of an instance

    def stages(self, depth: int) -> tuple[int, ...]:
        """The other's."""
        return self.like.stages(depth)

    def steps(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """The other's."""
        return self.like.steps(keep, available, depth)
