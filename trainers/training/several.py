"""Train one pruner against several frozen models by distillation, each on a suite of its own, in turn.

Ours. The models are built alike, so that the pruner reads of all of them tokens of the same width; how many tokens an
image has, what they mean and what is asked may differ. Every batch is of one suite, is distilled from that suite's
model as :mod:`.distill` does it, and is one step.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from prunezoo.core.base_model import BaseModel
from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from trainers.data.in_turn import SUITE

from .distill import DistillModule
from .guide_names import GuideName

MEANS = ("val/score", "val/kl")
"""Figures of which the mean over the suites is logged: by one of them the best state is chosen."""


class SuiteModule(DistillModule):
    """One of several frozen models, and the pruner that is trained beside all of them.

    It is no part of Lightning's module: that one hands on its steps, and logs what this one does, with the suite's name
    in front.

    Args:
        suite: Name of the suite that this model is asked.
        whole: The module that all are held by.
        common: See DistillModule.
    """

    whole: Any

    def __init__(self, suite: str, whole: L.LightningModule, **common: Any) -> None:
        super().__init__(**common)
        self.suite = suite
        self.__dict__["whole"] = whole  # no submodule

    def groups_of(self, data: Any) -> tuple[str, ...]:
        """See FrozenModule."""
        return data.parts[self.suite].groups

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """As `scenes/val/kl`."""
        self.whole.log(f"{self.suite}/{name}", value, *args, **{**options, "add_dataloader_idx": False})

    def say(self, text: str) -> None:
        """As `step 8: scenes: …`."""
        super().say(f"{self.suite}: {text}")


class SeveralModule(L.LightningModule):
    """Several frozen models and one pruner; trained on data of :class:`trainers.data.in_turn.SuitesInTurn`.

    Args:
        vlm: Folder or Hub id of the frozen model of each suite, by the suite's name. All must be built alike.
        pruner: The pruner to train; sizes that it leaves open are those for the first model.
        guide: See DistillModule; one for all, or one for each suite by its name.
        common: See DistillModule; the same for every model.

    Raises:
        PruneZooError: No model, models that are not built alike, or guides of other suites.
    """

    def __init__(
        self,
        vlm: dict[str, str],
        pruner: Pruner,
        guide: GuideName | dict[str, GuideName] = "relevance",
        **common: Any,
    ) -> None:
        super().__init__()
        if not vlm:
            raise PruneZooError("model.vlm is empty: name the frozen model of each suite, as {scenes: FOLDER}")
        guides = guide if isinstance(guide, Mapping) else dict.fromkeys(vlm, guide)
        if guides.keys() != vlm.keys():
            raise PruneZooError(
                f"model.guide is for {', '.join(guides) or 'no suite'}, and model.vlm for {', '.join(vlm)}: name a "
                "guide for each of these, or one for all"
            )
        self.parts: dict[str, SuiteModule] = {}
        builds: list[BaseModel] = []
        for suite, name in vlm.items():
            part = SuiteModule(suite=suite, whole=self, vlm=name, pruner=pruner, guide=guides[suite], **common)
            pruner, self.parts[suite] = part.pruner, part
            builds.append(BaseModel.describe(part.vlm))
            check_alike(builds[0], builds[-1])
        self.pruner = pruner
        names = [build.name.rpartition("/")[2] for build in builds]
        self.pruner.base_model = replace(builds[0], name=" and ".join(dict.fromkeys(names)))

    @property
    def first(self) -> SuiteModule:
        """The first model's, for what is the same for all."""
        return next(iter(self.parts.values()))

    def setup(self, stage: str) -> None:
        """See FrozenModule."""
        for part in self.parts.values():
            part.trainer = self.trainer
            part.setup(stage)

    def configure_model(self) -> None:
        """See FrozenModule; the pruner is one, so it is shared out once."""
        self.first.configure_model()

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """One step with the model of the batch's suite."""
        return self.parts[batch.pop(SUITE)].training_step(batch, batch_index)

    def validation_step(self, batch: dict[str, Any], batch_index: int, dataloader_idx: int = 0) -> None:
        """Likewise."""
        self.parts[batch.pop(SUITE)].validation_step(batch, batch_index)

    def on_validation_epoch_end(self) -> None:
        """Log each suite's figures, and the mean over suites of those by which the best state is chosen."""
        reports = [part.report() for part in self.parts.values()]
        means = {name: torch.stack([report[name] for report in reports]).mean() for name in MEANS}
        self.log_dict(means, sync_dist=True)

    @property
    def best_by(self) -> tuple[str, Literal["max", "min"]]:
        """See FrozenModule; where one model answers in free text, no accuracy says enough about all."""
        free = [part for part in self.parts.values() if part.free_text]
        return (free or [self.first])[0].best_by

    def configure_optimizers(self) -> Any:
        """See FrozenModule."""
        return self.first.configure_optimizers()


def check_alike(one: BaseModel, other: BaseModel) -> None:
    """Refuse models that no pruner fits both of.

    Raises:
        PruneZooError: They are not built alike; it names both, and where they differ.
    """
    differences = one.differences(other)
    if differences:
        raise PruneZooError(
            f"model.vlm: {one.name} and {other.name} are not built alike, so no pruner fits both: "
            f"{', '.join(differences)}; train one pruner for each"
        )
