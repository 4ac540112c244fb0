"""Suite several: the questions of scenes-icl, scenes-video and scenes-steps in turn, all pictures seen one by one.

By it `tiny-llava-multi`, which is made for the three, is judged as an instrument.
"""

from .several_icl import ScenesICL
from .several_steps import STEPS, ScenesSteps
from .several_video import ScenesVideo
from .suite import Item, Suite, register_suite


@register_suite("several")
class Several(Suite):
    """Groups of the three suites take turns, so any first N items are balanced over them."""

    groups = (*ScenesICL.groups, *ScenesVideo.groups, *ScenesSteps.groups)
    chance = {**ScenesICL.chance, **ScenesVideo.chance, **ScenesSteps.chance}

    def __init__(self, split: str = "test", limit: int | None = None) -> None:
        super().__init__(split, limit)
        self.parts = [ScenesICL(split), ScenesVideo(split), ScenesSteps(split)]

    def size(self) -> int:
        """As many of each group as the smallest suite has."""
        return len(self.groups) * min(len(part) // len(part.groups) for part in self.parts)

    def item(self, index: int) -> Item:
        """Item ``index``: one of the suite that its group is of."""
        turn, place = divmod(index, len(self.groups))
        for part in self.parts:
            if place < len(part.groups):
                break
            place -= len(part.groups)
        number = len(part.groups) * turn + place
        if isinstance(part, ScenesSteps):  # whose groups take turns by episode; another step of each
            episodes = len(part) // STEPS
            number = number % episodes * STEPS + number // len(part.groups) % STEPS
        return part[number]
