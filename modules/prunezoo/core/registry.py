"""Names of the methods. A file in one of the method folders registers itself; nothing else has to be edited.

An installed distribution can bring methods too: its entry points of the group `prunezoo.pruners` name modules, each of
which registers what it holds.
"""

import importlib
import logging
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar, get_args
from urllib.parse import parse_qsl

import torch

from .base_model import BaseModel, check_base_model
from .bounds import parse_json
from .choosing import Criterion
from .config import PrunerConfig, fit_width
from .contract import Pruner
from .errors import PruneZooError
from .files import read_object
from .hub import Pretrained, load, read_method
from .near import near
from .prefill import Prefill
from .schedule import Schedule
from .signals import parse_signal
from .source import Source

METHOD_FOLDERS = ("learned", "training_free", "tokenizers")
PLUGINS = "prunezoo.pruners"
"""Group of the entry points that bring methods from outside."""
TAKEN = {
    "select": "how any scorer chooses",
    "schedule": "a file of counts by block",
    "options": "a file of config fields",
}
"""Words behind a name that are no fields of a config, whatever the method."""
log = logging.getLogger(__name__)
_PRUNERS: dict[str, type[Pruner]] = {}
P = TypeVar("P", bound=type[Pruner])


def register_pruner(name: str) -> Callable[[P], P]:
    """Class decorator that enters a pruner under ``name`` (lower case, digits, ``_``), checked here and now.

    Raises:
        PruneZooError: The name is malformed or taken, or the class breaks the contract's static rules.
    """

    def register(cls: P) -> P:
        if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
            raise PruneZooError(f"pruner name '{name}' must be lower case letters and digits, parts joined by '_'")
        taken = _PRUNERS.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise PruneZooError(f"pruner name '{name}' is taken by {taken.__module__}.{taken.__qualname__}")
        if not issubclass(cls, Pruner) or not issubclass(cls.config_class, PrunerConfig):
            raise PruneZooError(f"{cls.__name__} must be a Pruner and its config_class a PrunerConfig")
        if (cls.score is Pruner.score) == (cls.reduce is Pruner.reduce):
            raise PruneZooError(f"{cls.__name__} must override score() or reduce(), one of the two")
        if cls.distribution and (cls.score is Pruner.score or cls.choose_budget is not Pruner.choose_budget):
            raise PruneZooError(f"{cls.__name__} is a distribution: it must override score() and not choose_budget()")
        if cls.remembers and (cls.stage not in ("prompt", "layer") or cls.remember is Pruner.remember):
            raise PruneZooError(
                f"{cls.__name__} remembers: it must be of prompt or layer stage and override remember()"
            )
        if unknown := [word for word in cls.criteria if word not in get_args(Criterion)]:
            known = ", ".join(get_args(Criterion))
            raise PruneZooError(f"{cls.__name__}: criteria {unknown} are unknown; there are: {known}")
        for taken_field, what in TAKEN.items():
            if taken_field in {field.name for field in fields(cls.config_class)}:
                raise PruneZooError(f"{cls.__name__}: config field '{taken_field}' is taken, it says {what}")
        if isinstance(cls.needs, tuple):  # else a property, which depends on the config
            for signal in cls.needs:
                parse_signal(signal)
        cls.name = name
        _PRUNERS[name] = cls
        return cls

    return register


@cache
def _discover() -> None:
    """Import every file of the method folders and every plug-in, once, so that it registers itself."""
    parent = __package__.rpartition(".")[0]
    for folder in METHOD_FOLDERS:
        package = importlib.import_module(f"{parent}.{folder}")
        for entry in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{entry.name}")
    for plugin in sorted(entry_points(group=PLUGINS), key=lambda plugin: plugin.name):  # of two, the same one first
        _load(plugin)


def _load(plugin: EntryPoint) -> None:
    """Import a plug-in. One that fails brings nothing, is named, and takes nothing else down."""
    before = dict(_PRUNERS)
    try:
        plugin.load()
    except Exception as error:  # whatever somebody else's code raises
        _PRUNERS.clear()
        _PRUNERS.update(before)
        named = f"'{plugin.name}' ({plugin.value}{f' of {plugin.dist.name}' if plugin.dist else ''})"
        why = " ".join(str(error).split()) or type(error).__name__
        log.warning("plug-in %s brings no pruner: %s; mend or uninstall it", named, why)


def list_pruners() -> tuple[str, ...]:
    """The registered names, sorted."""
    _discover()
    return tuple(sorted(_PRUNERS))


def pruner_class(name: str) -> type[Pruner]:
    """The class registered under ``name``; an unknown name is an error that lists the known ones."""
    if name not in list_pruners():
        if other := _kin(Pretrained).get(name):
            raise PruneZooError(f"'{name}' is no pruner: load it with {other.__name__}.from_pretrained")
        raise PruneZooError(f"unknown pruner '{name}'{near(name, list_pruners())}")
    return _PRUNERS[name]


def _kin(cls: type[Pretrained]) -> dict[str, type[Pretrained]]:
    """What is built on a class, at any depth, and has a name; by that."""
    below = cls.__subclasses__()
    return {one.name: one for one in below if one.name} | {k: v for one in below for k, v in _kin(one).items()}


def build_pruner(name: str, /, vlm: Any = None, **config: Any) -> Pruner:
    """A new, untrained instance of the method ``name`` with these config fields.

    Where they do not say the width of the tokens or of the tower, or leave sizes open, these suit ``vlm``, if there is
    one.
    """
    pruner = pruner_class(name)(**config)
    if vlm is None:
        return pruner
    model = BaseModel.describe(vlm)
    return fit_width(pruner, model.width, model.tower_width, Prefill.of(vlm.config))


def load_pruner(
    source: str | Path, revision: str | None = None, *, vlm: Any = None, any_model: bool = False, **options: Any
) -> Pruner:
    """A ready pruner, in eval mode.

    Args:
        source: A registry name of a method without weights (``divprune``), a folder written by ``save_pretrained``,
            or a Hub id (``org/ppm-llava-1.5-7b``). A string may go on with options: config fields to be set otherwise,
            ``select``, see :attr:`Pruner.select`, ``checkpoints/ppm-tiny?select=mmr``, ``schedule``, a file of a
            :class:`schedule.Schedule`, ``tome?schedule=half.json``, and ``options``, a file of config fields as
            `python -m trainers.search` writes it, ``vflowopt?options=found.json``; fields beside it win.
        revision: Branch, tag or commit, for a Hub id.
        vlm: The model it is for: refuses, here and now, a pruner that was trained for a model of another build. Without
            it `attach` does.
        any_model: Forget which model it was trained for, so that it goes with any that its widths allow.
        options: For a Hub id, as `transformers` takes them: ``cache_dir``, ``token``, ``local_files_only``,
            ``force_download``; see :class:`source.Source`.

    Raises:
        PruneZooError: Nothing of that name, what is there is not whole, it is of another model than ``vlm``, an unknown
            option, or one on which the weights depend.
    """
    name, changes = split_options(source)
    pruner = _load_plain(name, revision, **options)
    select, schedule, found = (changes.pop(word, None) for word in TAKEN)
    if found is not None:
        changes = {**read_options(Path(str(found)), pruner.name), **changes}
    if changes:
        pruner = _vary(pruner, changes, str(source))
    set_choice(pruner, select, schedule)
    if any_model:
        pruner.base_model = None
    if vlm is not None:
        check_base_model(pruner.name, pruner.base_model, vlm)
    return pruner


def set_choice(pruner: Pruner, select: Any = None, schedule: Any = None) -> None:
    """Give a pruner what stands behind ``?`` in its name and is no config field: a rule, and a schedule's file."""
    if select is not None:
        pruner.select = select
    if schedule is not None:
        pruner.given_schedule = Schedule.load(str(schedule))


def read_options(path: Path, method: str) -> dict[str, Any]:
    """The config fields that a file has for a method; PruneZooError where it is of another, or none."""
    remedy = "give a file that `python -m trainers.search` wrote"
    record = read_object(path, "method", "options", what="options of a method", remedy=remedy)
    if not isinstance(record["options"], dict):
        raise PruneZooError(f"{path}: options must be an object of config fields; {remedy}")
    if record["method"] != method:
        raise PruneZooError(f"{path}: options of '{record['method']!s:.40}' are not for '{method}'; {remedy} for it")
    return dict(record["options"])


def split_options(source: str | Path) -> tuple[str | Path, dict[str, Any]]:
    """A source and the options behind its ``?``, values read as JSON where they are any, else as text."""
    if isinstance(source, Path):
        return source, {}
    name, _, query = source.partition("?")
    changes: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        try:
            changes[key] = parse_json(value)
        except ValueError:
            changes[key] = value
    return name, changes


def _load_plain(source: str | Path, revision: str | None, **options: Any) -> Pruner:
    """As :func:`load_pruner`, without options of the pruner's own."""
    if str(source) in list_pruners():
        try:
            pruner = build_pruner(str(source))
        except PruneZooError as error:
            raise PruneZooError(f"'{source}' needs training ({error}): give a trained folder or Hub id") from None
        if any(True for _ in pruner.parameters()):
            raise PruneZooError(f"'{source}' is a learned method: give the folder or Hub id of a trained checkpoint")
        return pruner.eval()
    if isinstance(source, str) and "/" not in source and not Path(source).exists():
        hint = near(source, list_pruners())
        raise PruneZooError(f"'{source}' is neither a known pruner, nor a folder, nor a Hub id like 'org/name'{hint}")
    place = Source(source, revision, **options)
    return load(pruner_class(read_method(place)), place)


def _vary(pruner: Pruner, changes: Mapping[str, Any], source: str) -> Pruner:
    """The same weights under another config."""
    variant = type(pruner)(pruner.config, **changes)
    variant.to(next((p.dtype for p in pruner.parameters()), torch.float32))
    try:
        variant.load_state_dict(pruner.state_dict())
    except RuntimeError:
        raise PruneZooError(f"'{source}': the weights depend on {', '.join(changes)}, train it so") from None
    variant.base_model = pruner.base_model
    variant.apply_settings(pruner.settings())
    return variant.eval()


class AutoPruner:
    """Loads any pruner; the method is read from what it loads."""

    @staticmethod
    def from_pretrained(
        source: str | Path, revision: str | None = None, *, vlm: Any = None, any_model: bool = False, **options: Any
    ) -> Pruner:
        """See :func:`load_pruner`."""
        return load_pruner(source, revision, vlm=vlm, any_model=any_model, **options)
