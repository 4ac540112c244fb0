"""Where a pruner acts, and how many tokens it leaves there.

Letters: B images, N image tokens that a stage finds of an image (padded).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from .config import Configured
from .errors import PruneZooError
from .schedule import PLACES, Schedule

Stage = Literal["input", "vision", "prompt", "layer"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""In the order in which they act: in front of the vision tower, in it, behind it, in the language model."""


class Staging(Configured):
    """The part of a pruner that places it on a model. All of its stages run in one pass.

    What one stage finds out of the tokens, the next one can have: ``PruneOutput.carry``, tensors by name of all the
    tokens that a stage found, follow those that are left into ``PruneInputs.carry``. Nothing of a pass belongs on the
    instance, which may serve several threads and batches at once.
    """

    stage: ClassVar[Stage] = "prompt"
    after_block: ClassVar[bool] = False  # vision stage: on the output of a block, not between attention and MLP
    merges: ClassVar[bool] = False  # vision stage: makes tokens of several, and cannot do without; see `drop_only`
    exact: ClassVar[bool] = True  # see the base class of pruners
    comes_back: ClassVar[Literal["", "raw", "last"]] = ""  # likewise
    _given: Schedule | None = None

    def stages(self, depth: int) -> tuple[int, ...]:
        """Where a pruner of the layer or vision stage acts; nothing in the input and prompt stage.

        Args:
            depth: Number of decoder layers (layer stage) or of vision blocks that run (vision stage).

        Returns:
            Layers in front of which, or blocks inside which, it prunes: ascending, from 0, below ``depth``.

        Raises:
            PruneZooError: The config names a layer that the model has not.
        """
        return ()

    def schedule(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """Tokens left by each of the :meth:`stages`, where there are several.

        By default the last leaves ``keep``, and each leaves the same share of what it finds.

        Args:
            keep: ``(B,)`` long, tokens that the last stage leaves of each image; on the host, as the next.
            available: ``(B,)`` long, tokens that the first one finds.
            depth: As in :meth:`stages`.
        """
        count = len(self.stages(depth))
        share = keep.double() / available.clamp_min(1)
        steps = [(available * share ** ((i + 1) / count)).round().long() for i in range(count)]
        return [torch.maximum(step, keep) for step in steps[:-1]] + [keep]

    def pace(self, inputs: Any, keep: Tensor, to_go: int) -> Tensor:
        """Tokens that one of several stages leaves, where that depends on what it finds. By default as scheduled.

        Args:
            inputs: The PruneInputs of this stage.
            keep: ``(B,)`` long, on the host: what :meth:`schedule` says.
            to_go: How many stages come behind this one.

        Returns:
            ``(B,)`` long, at least 1; on the device if need be, which the host then waits for.
        """
        return keep

    def recover(self, gone: Tensor, left: Tensor, valid: Tensor) -> Tensor | None:
        """Vision stage with `restore`: what the tower puts out for every patch, where the method makes that itself.

        By default nothing is made: a patch has the state of the token that it went into, or the one that it left with.

        Args:
            gone: ``(B, N, C)`` the patches' states when the first of them left.
            left: ``(B, K, C)`` the tokens behind the last block.
            valid: ``(B, K)`` bool, False for filler.

        Returns:
            ``(B, N, C)``, or None; of images that lost nothing it is not asked for.
        """
        return None

    @property
    def given_schedule(self) -> Schedule | None:
        """A schedule that an instance was given, by ``?schedule=FILE`` or here; saved with it.

        It takes the place of :meth:`schedule` and :meth:`pace`.

        Raises:
            PruneZooError: On setting: it is of another stage, or the method does not keep to counts.
        """
        return self._given

    @given_schedule.setter
    def given_schedule(self, given: Schedule) -> None:
        if self.stage not in PLACES or self.comes_back or not self.exact:
            raise PruneZooError(
                f"pruner '{self.name}' takes no schedule: it is for methods of the vision or layer stage that leave "
                "exactly so many tokens at each of several blocks or layers"
            )
        if given.stage != self.stage:
            raise PruneZooError(
                f"a schedule of the {given.stage} stage is not for '{self.name}', of the {self.stage} stage"
            )
        self._given = given

    def steps(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """As :meth:`schedule`, or as the :attr:`given_schedule` has it."""
        if self._given is None:
            return self.schedule(keep, available, depth)
        return self._given.at(self.stages(depth), keep, available, depth)

    def step(self, inputs: Any, keep: Tensor, to_go: int) -> Tensor:
        """As :meth:`pace`; a :attr:`given_schedule` is kept to."""
        return self.pace(inputs, keep, to_go) if self._given is None else keep

    def settings(self) -> dict[str, Any]:
        """See the base class: the schedule, if one was given."""
        own = super().settings()
        return own if self._given is None else {**own, "schedule": self._given.to_dict()}

    def apply_settings(self, settings: Mapping[str, Any], where: str = "") -> None:
        """See the base class."""
        others = dict(settings)
        if "schedule" in others:
            self.given_schedule = Schedule.from_dict(others.pop("schedule"), where)
        super().apply_settings(others, where)
