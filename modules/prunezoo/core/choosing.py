"""How a method that scores tokens chooses among them, and how many it keeps where that is left to it.

Both belong to an instance, beside its config and weights: any scorer takes them without a line of its own.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .budgets import Keep, auto_mean, check_keep
from .checks import require
from .errors import PruneZooError
from .gates import topk_mask
from .hub import Pretrained
from .mass import Mass, check_mean
from .select import Select, mmr_mask, tile_mask
from .signals import DECODER_SIGNALS, parse_signal

FROM_PROMPT = (*DECODER_SIGNALS, "relevance", "text_features")
"""Kinds of signals that another question changes."""

Criterion = Literal[
    "attention",  # what attends to the token, in the vision tower or the language model
    "similarity",  # how alike tokens are: alike ones are joined, or one stands for them
    "diversity",  # how unlike the chosen ones are, or how much of the picture they cover
    "prompt",  # how well it matches the words of the prompt
    "magnitude",  # how strong or how varied its own values are
    "change",  # how far it is from what its neighbours in space, time or depth predict
    "learned score",  # what a trained network says of it
    "learned tokens",  # none of these tokens stays: a trained network makes others
    "position",  # where it is in the picture
    "chance",  # a draw that does not look at it
    "parts",  # that of the pruner or the pruners within
    "none",  # all are treated alike
]
"""By what a method tells tokens apart."""


class Choosing(Pretrained):
    """What is set up of a pruner after its training, and saved with it."""

    exact: ClassVar[bool] = True  # see the base class of pruners
    criteria: ClassVar[tuple[Criterion, ...]] = ()  # by what it tells tokens apart, what matters most first
    distribution: ClassVar[bool] = False  # its scores are logits of a distribution over the tokens: trained by a KL
    needs: ClassVar[tuple[str, ...]]  # of :class:`contract.Pruner`
    mass: Mass | None = None  # of a distribution: what `auto` may leave out, once it is calibrated
    threshold: float | None = None  # `auto` keeps what scores above it; a property where it depends on the config
    _select = Select()

    @classmethod
    def search_space(cls, depth: int) -> dict[str, tuple[Any, ...]]:
        """The config fields that `trainers.search` varies for a model, unless it is told others; none by default.

        Args:
            depth: Number of decoder layers.

        Returns:
            By name: least and most of a number, both whole where only whole ones make sense; or, where there are more
            or fewer than two, or they are no numbers, all that it may be.
        """
        return {}

    @property
    def reads_prompt(self) -> bool:
        """Whether another question may keep other tokens of the same image, at the same ``keep``.

        By default where it `needs` a signal that comes from the prompt; a method that reads `PruneInputs.text` says so
        itself. Who serves or caches what is kept of an image may do so for all questions where it is False.
        """
        return any(parse_signal(name).kind in FROM_PROMPT for name in self.needs)

    @property
    def select(self) -> str:
        """How tokens are chosen by :meth:`score`: "top", "mmr", "mmr:0.7", "mmr:0.7:4" or "tile".

        See :class:`select.Select`.
        It belongs to an instance, whatever its config and weights, and is saved with it unless it is "top".

        Raises:
            PruneZooError: On setting: not one of these, or the method has no scores to choose by.
        """
        return str(self._select)

    @select.setter
    def select(self, select: str) -> None:
        chosen = Select.parse(select)
        if chosen.kind != "top" and not self.scores_tokens:
            raise PruneZooError(
                f"select='{select}' is for methods that score tokens, and '{self.name}' chooses or makes them itself"
            )
        self._select = chosen

    def choose(self, scores: Tensor, inputs: Any, keep: Tensor) -> Tensor:
        """The tokens that `select` takes.

        Args:
            scores: ``(B, N)``, without gradient.
            inputs: The PruneInputs, inside of `reduce`.
            keep: ``(B,)`` long.

        Returns:
            ``(B, N)`` bool, ``keep`` of each image.
        """
        if self._select.kind == "mmr":
            how = self._select
            return mmr_mask(
                scores, inputs.features, inputs.valid, keep, inputs.most_asked, weight=how.weight, step=how.step
            )
        if self._select.kind == "tile":
            return tile_mask(scores, inputs.cells[..., 0], inputs.valid, keep, inputs.tiles)
        return topk_mask(scores, inputs.valid, keep)

    def above(self, scores: Tensor, valid: Tensor) -> Tensor:
        """``(B,)`` long, at least 1: how many of ``scores (B, N)``, where ``valid (B, N)``, are above the threshold."""
        assert self.threshold is not None  # the caller has looked
        return ((scores > self.threshold) & valid).sum(1).clamp_min(1)

    def check_keep(self, keep: Keep) -> None:
        """Raise PruneZooError unless ``keep`` is what :func:`check_keep` takes, and "auto" only if it sets budgets."""
        check_keep(keep)
        if isinstance(keep, str) and self.distribution:
            check_mean(self.name, self.mass, keep)
        elif isinstance(keep, str) and self.threshold is not None:
            if auto_mean(keep) is not None:
                raise PruneZooError(f"keep='{keep}': '{self.name}' keeps what passes its threshold, so give 'auto'")
        elif isinstance(keep, str) and not self.sets_budgets:
            raise PruneZooError(
                f"keep='{keep}' is for pruners that set budgets, and '{self.name}' sets none: give tokens or a share"
            )

    def asked_of(self, inputs: Any, keep: Tensor) -> Any:
        """The inputs of `reduce`, whose numbers of the host are those of ``keep (B,)``.

        They are, unless a subclass hands on another ``keep``. One that decides alone may, which costs a look at the
        device; one that is exact may not ask for more, of which the widest image would lose the last.
        """
        if not self.exact:
            return replace(inputs, asked=tuple(torch.minimum(keep, inputs.valid.sum(1)).tolist()))
        asked = inputs.asked
        words = f"pruner '{self.name}' chose %s tokens where {list(asked)} were asked for: hand `keep` on as it is"
        require((keep > inputs.most_asked).any(), lambda: words % keep.tolist())
        return inputs

    def check_gates(self) -> None:
        """Refuse to train where tokens are not chosen as gates are."""
        if self.training and self._select.kind != "top":
            raise PruneZooError(
                f"pruner '{self.name}' has select='{self.select}', and gates are those of the top: train with "
                "select='top', and set it afterwards"
            )

    def settings(self) -> dict[str, Any]:
        """See the base class: how it chooses, unless that is the top, and what `auto` means, if it is calibrated."""
        own = {} if self._select.kind == "top" else {"select": self.select}
        return own if self.mass is None else {**own, "auto": self.mass.to_dict()}

    def apply_settings(self, settings: Mapping[str, Any], where: str = "") -> None:
        """See the base class."""
        others = dict(settings)
        if "select" in others:
            try:
                self.select = others.pop("select")
            except PruneZooError as error:
                raise PruneZooError(f"{where}{error}") from None
        if self.distribution and "auto" in others:
            self.mass = Mass.from_dict(others.pop("auto"), where)
        super().apply_settings(others, where)

    @property
    def scores_tokens(self) -> bool:
        """Whether the method rates tokens; else it chooses or makes them itself."""
        raise NotImplementedError

    @property
    def sets_budgets(self) -> bool:
        """Whether ``keep="auto"`` works."""
        raise NotImplementedError
