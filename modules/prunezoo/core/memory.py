"""What pruners hold of a stream between calls: frames of a video as they come, what a robot's camera sees.

A pruner that ``remembers`` finds in ``inputs.memory`` what its :meth:`Pruner.remember` returned last time for the same
stream and place. The state belongs to whoever runs the calls, never to the pruner: `attach` keeps one
(``run.memory``), `run_pruned` takes one.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from .contract import PruneInputs, PruneOutput, Pruner
from .errors import PruneZooError

Key = tuple[Hashable, int, str]


class Memory:
    """States of streams, each image of a prompt by its place in it.

    Attributes:
        streams: Which stream each sample of the calls to come belongs to, any names; None: one sample a call, always of
            the same stream.
    """

    def __init__(self) -> None:
        self.streams: Sequence[Hashable] | None = None
        self._held: dict[Key, Mapping[str, Tensor]] = {}

    def reset(self, *streams: Hashable) -> None:
        """Forget these streams, or everything."""
        for key in list(self._held):
            if not streams or key[0] in streams:
                del self._held[key]

    def recall(self, pruner: Pruner, inputs: PruneInputs, rows: Sequence[int], samples: int) -> PruneInputs:
        """The same inputs with what is held for each image.

        Args:
            pruner: Who asks; one that does not remember finds nothing.
            inputs: The images of a call.
            rows: (R) the sample that each belongs to.
            samples: How many the call has.

        Raises:
            PruneZooError: It is not clear which stream a sample belongs to, or the pruner is being trained.
        """
        if not pruner.remembers:
            return inputs
        if pruner.training:
            raise PruneZooError(f"pruner '{pruner.name}' remembers in use only: train it without a memory")
        return replace(inputs, memory=tuple(self._held.get(key) for key in self._keys(pruner, rows, samples)))

    def note(self, pruner: Pruner, inputs: PruneInputs, output: PruneOutput, rows: Sequence[int], samples: int) -> None:
        """Hold what the pruner wants to find next time; arguments as in :meth:`recall`, and what it left."""
        if pruner.remembers:
            keys = self._keys(pruner, rows, samples)
            self._held.update(zip(keys, pruner.remember(inputs, output), strict=True))

    def _keys(self, pruner: Pruner, rows: Sequence[int], samples: int) -> list[Key]:
        """Of each image: its stream, its place among the images of its sample, and the pruner."""
        streams = self.streams
        if streams is None:
            if samples > 1:
                raise PruneZooError(
                    f"pruner '{pruner.name}' remembers streams, and this call has {samples} samples: set "
                    "run.memory.streams to a name for each, or pass one sample at a time"
                )
            streams = (None,)
        if len(streams) != samples or len(set(streams)) < samples:
            raise PruneZooError(
                f"memory.streams={list(streams)!r:.80} must name {samples} different streams, one for each sample"
            )
        return [(streams[row], rows[:place].count(row), pruner.name) for place, row in enumerate(rows)]
