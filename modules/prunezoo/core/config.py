"""Configs: flat, frozen, JSON values only; and the modules that are built from one. Nothing here knows a file."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import UnionType
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import nn

from .base_model import BaseModel
from .bounds import MOST_ENTRIES
from .errors import PruneZooError
from .near import near
from .prefill import Prefill


@dataclass(frozen=True)
class PrunerConfig:
    """Base of the configs: flat, frozen, JSON values only; check ranges in ``__post_init__``, raise PruneZooError."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Build from a mapping; an unknown key, or a value of another type, is an error that names it and ``where``."""
        known = [f.name for f in fields(cls)]
        hints = get_type_hints(cls)
        for key, value in values.items():
            if key not in known:
                raise PruneZooError(f"{where}unknown config key '{key}' of {cls.__name__}{near(key, known)}")
            if not _fits(value, hints[key]):
                kind = getattr(hints[key], "__name__", hints[key]) if get_origin(hints[key]) is None else hints[key]
                long = f" of at most {MOST_ENTRIES} entries" if "tuple" in str(hints[key]) else ""
                raise PruneZooError(
                    f"{where}config key '{key}' of {cls.__name__} must be {kind}{long}, got {value!r:.60}"
                )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def check_choices(self, method: str, **choices: Iterable[str]) -> None:
        """Raise PruneZooError, with the nearest one, where a field is none of its choices.

        Args:
            method: Whose config it is, for the message.
            choices: By field, what it may be.
        """
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise PruneZooError(f"{name}='{value}' of {method} is unknown{near(value, known)}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    def for_tower(self, width: int) -> Self:
        """The same for a vision tower of this width, where the config does not say its own; itself by default.

        For configs that have such a width.
        """
        return self

    def for_tokens(self, width: int) -> Self:
        """The same for tokens of this width, where the config does not say its own: where `width` is the default.

        A config that holds others hands it on to them.
        """
        default = {one.name: one.default for one in fields(self)}.get("width")
        return self if default is None or self.width != default else replace(self, width=width)  # type: ignore[attr-defined,call-arg]

    def for_prefill(self, prefill: Prefill) -> Self:
        """The same with sizes that suit a model's prefill, where the config leaves them open; itself by default."""
        return self

    def filled(self) -> Self:
        """The same with every size said, those left open as for no model in particular; itself by default."""
        return self


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a config is of the type of its field; numbers are finite and fit 64 bits, lists are short."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in args)
    if origin is Literal:
        return isinstance(value, str | int) and value in args
    if origin is tuple:
        return (
            isinstance(value, list | tuple) and len(value) <= MOST_ENTRIES and all(_fits(one, args[0]) for one in value)
        )
    if hint in (int, float):
        kinds = (int,) if hint is int else (int, float)
        return type(value) in kinds and abs(value) < 2**63  # false for NaN
    return hint is Any or isinstance(value, origin or hint)


C = TypeVar("C", bound="Configured")


def fit_width(module: C, width: int, tower_width: int | None = None, prefill: Prefill | None = None) -> C:
    """A module that has not been trained, for tokens of this width, and for a vision tower of that one and a prefill,
    if they are known; itself where its config says all that.
    """
    config = module.open_config.for_tokens(width)
    config = config if tower_width is None else config.for_tower(tower_width)
    config = config if prefill is None else config.for_prefill(prefill)
    return module if config.filled() == module.config else type(module)(config)


class Configured(nn.Module):
    """A module that is built from a config."""

    name: ClassVar[str] = ""
    config_class: ClassVar[type[PrunerConfig]] = PrunerConfig

    config: PrunerConfig  # with every size said
    open_config: PrunerConfig  # as it was given: what it leaves open is for a model to say, see :func:`fit_width`
    base_model: BaseModel | None = None  # the frozen model that it was trained for, where it was for one

    def __init__(self, config: PrunerConfig | Mapping[str, Any] | None = None, **overrides: Any) -> None:
        """Take a config, a mapping or nothing, then single fields over it; unknown keys are refused."""
        super().__init__()
        values = config.to_dict() if isinstance(config, PrunerConfig) else dict(config or {})
        self.open_config = self.config_class.from_dict({**values, **overrides})
        self.config = self.open_config.filled()

    def settings(self) -> dict[str, Any]:
        """What is saved beside the config: JSON values that neither config nor weights hold; none by default."""
        return {}

    def apply_settings(self, settings: Mapping[str, Any], where: str = "") -> None:
        """Take what :meth:`settings` gave.

        Raises:
            PruneZooError: An unknown key, or a value that is none; the message names it and ``where``.
        """
        for key in settings:
            raise PruneZooError(f"{where}unknown setting '{key}' of '{self.name}'; written by another version?")
