"""Several pruners of different stages as one: a method of its own, with one config, one folder, one budget.

A pruner in front of the language model can look at all tokens and the whole prompt; one between its layers sees what
the model has made of them so far, and may drop what has been read. Ours; CoViPAL (arXiv 2508.17243) and ATP-LLaVA
(arXiv 2412.00447) are each used alone by their papers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..core.budgets import Keep
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.plan import gather_rows
from ..core.prefill import Prefill
from ..core.registry import build_pruner, pruner_class, register_pruner
from ..core.staging import STAGES


@dataclass(frozen=True)
class CombinedConfig(PrunerConfig):
    """What is combined, in the order in which it acts, and how the budget is split."""

    methods: tuple[str, ...] = ()  # registered names, each of a later stage than the one before
    configs: tuple[dict[str, Any], ...] = ()  # config fields of each; what is not given has its default
    shares: tuple[float, ...] = ()  # what each is asked to keep, for every token that the combination is

    def __post_init__(self) -> None:
        if not len(self.methods) == len(self.configs) == len(self.shares):
            raise PruneZooError(
                f"combined: {len(self.methods)} methods need as many configs ({len(self.configs)}) and shares "
                f"({len(self.shares)})"
            )
        if len(set(self.methods)) < max(len(self.methods), 2) or "combined" in self.methods:
            raise PruneZooError(f"combined: methods must be two or more different ones, got {list(self.methods)}")
        if not all(share > 0.0 for share in self.shares):
            raise PruneZooError(f"combined: shares must be above 0, got {list(self.shares)}")
        # The fields in full: so a saved combination stays the same where a default changes.
        pairs = zip(self.methods, self.configs, strict=True)
        full = tuple(pruner_class(name).config_class.from_dict(values, f"combined: {name}: ") for name, values in pairs)
        object.__setattr__(self, "configs", tuple(config.to_dict() for config in full))

    def for_tokens(self, width: int) -> Self:
        """See the base class."""
        return self._of_all(lambda config: config.for_tokens(width))

    def for_tower(self, width: int) -> Self:
        """See the base class."""
        return self._of_all(lambda config: config.for_tower(width))

    def for_prefill(self, prefill: Prefill) -> Self:
        """See the base class."""
        return self._of_all(lambda config: config.for_prefill(prefill))

    def filled(self) -> Self:
        """See the base class."""
        return self._of_all(lambda config: config.filled())

    def _of_all(self, change: Callable[[PrunerConfig], PrunerConfig]) -> Self:
        pairs = zip(self.methods, self.configs, strict=True)
        full = [change(pruner_class(name).config_class.from_dict(values)) for name, values in pairs]
        return replace(self, configs=tuple(config.to_dict() for config in full))


@register_pruner("combined")
class Combined(Pruner):
    """Pruners of several stages, one after another.

    ``keep`` is dealt out by `shares`: a part is asked for its share of it, at most for all tokens. With a share of 1
    the last part decides what ``keep`` means; for `atp`, which counts the mean over all decoder layers, that is the
    mean, whatever the parts before it leave.
    """

    stage = "layer"
    criteria = ("parts",)
    exact = False
    config_class = CombinedConfig
    config: CombinedConfig

    def __init__(self, config: CombinedConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        c = self.config
        self.members = nn.ModuleDict(
            {name: build_pruner(name, **values) for name, values in zip(c.methods, c.configs, strict=True)}
        )
        order = [STAGES.index(member.stage) for member in self._ordered()]
        if order != sorted(set(order)):
            stages = ", ".join(f"{member.name} ({member.stage})" for member in self._ordered())
            raise PruneZooError(
                f"combined: stages must differ and follow one another, {' then '.join(STAGES)}: {stages}"
            )

    @classmethod
    def tiny_config(cls, feature_dim: int, text_dim: int) -> dict[str, Any]:
        """See the base class."""
        methods = ("ppm", "atp")
        configs = tuple(pruner_class(name).tiny_config(feature_dim, text_dim) for name in methods)
        return {"methods": methods, "configs": configs, "shares": (1.5, 1.0)}

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Signals of all members."""
        return tuple(dict.fromkeys(name for member in self._ordered() for name in member.needs))

    @property
    def reads_prompt(self) -> bool:
        """Any member does."""
        return any(member.reads_prompt for member in self._ordered())

    def stages(self, depth: int) -> tuple[int, ...]:
        """Those of the last member."""
        return self._ordered()[-1].stages(depth)

    def parts(self, keep: Keep) -> list[tuple[Pruner, Keep]]:
        """See the base class."""
        self.check_keep(keep)
        assert not isinstance(keep, str)  # it sets no budgets
        parts: list[tuple[Pruner, Keep]] = []
        found = 1.0  # share of the image's tokens that the part finds; a float is a share of these
        for member, share in zip(self._ordered(), self.config.shares, strict=True):
            if isinstance(keep, Tensor):
                asked: Keep = (keep * share).round().long().clamp_min(1)
            elif isinstance(keep, int):
                asked = max(1, round(keep * share))
            else:
                left = min(1.0, keep * share)
                asked, found = min(1.0, left / found), left
            parts.append((member, asked))
        return parts

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """All members on the same inputs, as if they stood at one place; in a host each acts at its own."""
        size, width = inputs.valid.shape
        found, features = inputs, None
        slots = torch.arange(width, device=inputs.valid.device).expand(size, -1)  # of what is found
        gates = inputs.valid.float() if self.training else None
        for member, asked in self.parts(keep):
            output = member(found, asked)
            if gates is not None and output.gates is not None:
                place = slots.masked_fill(~found.valid, width)
                gates = gates * output.gates.new_zeros(size, width + 1).scatter(1, place, output.gates)[:, :-1]
            slots, found, features = gather_rows(slots, output.index), found.after(output), output.features
        return PruneOutput(slots.masked_fill(~found.valid, 0), found.valid, features, gates=gates)

    def _ordered(self) -> list[Pruner]:
        """The members in the order in which they act."""
        return [self.members[name] for name in self.config.methods]  # type: ignore[misc]
