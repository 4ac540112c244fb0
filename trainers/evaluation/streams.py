"""Steps of streams, one after the other: how pruners that remember are measured on a suite that has streams.

A batch holds one step of each of several streams, and the next batch the next step of the same ones; each method,
budget and seed has a memory of its own, in which each stream begins empty. So what a step finds does not depend on what
else is measured. A window that begins inside a stream runs the steps of it that came before once more, uncounted: a
measurement that goes on from a journal finds what one that was never interrupted has found.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import groupby

from prunezoo.core.memory import Memory
from trainers.data.suite import Item, Suite

from .processes import Processes


@dataclass(frozen=True)
class Step:
    """One step each of some streams.

    Attributes:
        places: of the items in the suite.
        items: the items.
        streams: which stream each belongs to.
        begins: whether they are the first of these streams.
    """

    places: list[int]
    items: list[Item]
    streams: list[str]
    begins: bool


class Memories:
    """A memory for each who asks: method, budget and seed.

    Attributes:
        streams: which stream each sample of the batch at hand belongs to.
    """

    def __init__(self) -> None:
        self.streams: list[str] = []
        self._held: dict[Hashable, Memory] = {}

    def turn_to(self, step: Step) -> None:
        """Go on with these streams; forget all others where they begin."""
        if step.begins:
            self._held.clear()
        self.streams = step.streams

    def of(self, who: Hashable) -> Memory:
        """The memory of one who asks."""
        memory = self._held.setdefault(who, Memory())
        memory.streams = self.streams
        return memory


def steps_of(suite: Suite, window: range, batch_size: int, processes: Processes) -> Iterator[Step]:
    """This process' steps of the streams in a window, with those of the first stream that came before it.

    Args:
        suite: whose items are steps of streams that follow one another; an item of no stream is one of its own.
        window: places in the suite.
        batch_size: streams side by side, at most.
        processes: who share the streams; all of them list the streams alike.
    """
    items = {place: suite[place] for place in window}
    first = window.start
    while items[first].stream and first and (before := suite[first - 1]).stream == items[first].stream:
        first -= 1
        items[first] = before
    places = range(first, window.stop)
    streams = [list(same) for _, same in groupby(places, lambda place: items[place].stream or str(place))]
    several = [streams[begin : begin + batch_size] for begin in range(0, len(streams), batch_size)]
    for side_by_side in processes.share(several):
        for number in range(max(map(len, side_by_side))):
            now = [stream[number] for stream in side_by_side if number < len(stream)]
            names = [items[place].stream or str(place) for place in now]
            yield Step(now, [items[place] for place in now], names, begins=number == 0)
