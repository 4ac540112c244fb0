"""Strict saving and loading of pruners and tokenizers: a folder, or a repository of the Hugging Face Hub, two files.

``config.json`` is ``{"method", "prunezoo_version", "config": {...}, "dtype", "sha256"}``, the last of all other files,
``"base_model"`` where it was trained for one, and ``"settings"`` where it has any; ``model.safetensors`` the weights.
A :class:`Part` of a pruner has a folder of its own beside them.

A folder may come from anybody. Nothing in it is ever unpickled or run, and what is not exactly what the method expects
is refused with one line. The module is built without memory first and held against the header of its weights, so a
config that asks for more than the file holds costs nothing.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules import module as registration

from .base_model import BaseModel
from .bounds import file_inside
from .config import Configured
from .errors import PruneZooError
from .files import digest, read_header, read_json, read_metadata, read_tensors, write_tensors, wrong_weight
from .near import near
from .source import Source
from .upload import Published, check_public, check_repo, upload, with_card

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CONFIG_KEYS = {"method", "prunezoo_version", "config", "dtype"}
BASE_MODEL = "base_model"  # a key that only what was trained for some model has
SETTINGS = "settings"  # a key that only what was set up after its training has, see Configured.settings
DIGESTS = "sha256"  # of all other files, by name; folders that were saved before have none
OPTIONAL_KEYS = {BASE_MODEL, SETTINGS, DIGESTS}
SCRATCH = ".saving-"  # begins the names of the folders that files are written in before they take their place
MARK = {"format": "pt", DIGESTS: CONFIG_FILE}  # in the weights: the config beside them has their digest
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEADER_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of tensors, as the header of a safetensors file names them."""

P = TypeVar("P", bound=Configured)


class Part(nn.Module):
    """A part of a pruner that is saved in files of its own, in a folder that is called as the part is in the pruner.

    For weights that have a format of their own. It must be a direct child of the pruner.
    """

    files: ClassVar[tuple[str, ...]]  # what is in its folder

    def save(self, folder: Path) -> None:
        """Write these files into a folder that is there."""
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        """Read them, strictly: PruneZooError for what is missing, misshapen or NaN."""
        raise NotImplementedError


def parts_of(module: Configured) -> dict[str, Part]:
    """The parts of a module that have files of their own, by name."""
    return {name: child for name, child in module.named_children() if isinstance(child, Part)}


def version() -> str:
    """The installed version of prunezoo, or ``0+local`` in a clone that is not installed."""
    try:
        return metadata.version("prunezoo")
    except metadata.PackageNotFoundError:
        return "0+local"


def save(module: Configured, folder: str | Path) -> Path:
    """Write a module. All files are written whole beside the old ones before any takes its place, so a full disk or a
    crash while writing leaves the old checkpoint as it was. A crash between two of these moves leaves a folder that
    :func:`load` refuses. What killed saves left is removed. Other files in the folder (the card) stay.

    Raises:
        PruneZooError: It could not be written, or a weight is NaN, infinite or beyond measure.
    """
    folder = Path(folder)
    for name, tensor in module.state_dict().items():
        if wrong := wrong_weight(tensor):
            raise PruneZooError(f"not saved to {folder}: tensor '{name}' of '{module.name}' holds {wrong}")
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _own_state(module).items()}
    floats = {str(t.dtype).removeprefix("torch.") for t in state.values() if t.is_floating_point()}
    if len(floats) > 1:
        raise PruneZooError(
            f"not saved to {folder}: weights of mixed types {sorted(floats)}; cast with module.to(dtype)"
        )
    config: dict[str, Any] = {
        "method": module.name,
        "prunezoo_version": version(),
        "config": module.config.to_dict(),
        "dtype": floats.pop() if floats else "float32",
    }
    if module.base_model is not None:
        config[BASE_MODEL] = module.base_model.to_dict()
    if settings := module.settings():
        config[SETTINGS] = settings
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-", dir=folder) as scratch:
            write_tensors(state, Path(scratch, WEIGHTS_FILE), MARK)
            for name, part in parts_of(module).items():
                Path(scratch, name).mkdir()
                part.save(Path(scratch, name))
            files = file_names(module)
            config[DIGESTS] = {file: digest(Path(scratch, file)) for file in files[:-1]}
            Path(scratch, CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for file in files:
                shutil.copymode(Path(scratch, CONFIG_FILE), Path(scratch, file))  # safetensors: for its owner alone
                with Path(scratch, file).open("rb") as written:
                    os.fsync(written.fileno())
            for file in files:
                (folder / file).parent.mkdir(exist_ok=True)
                Path(scratch, file).replace(folder / file)
    except (OSError, SafetensorError) as error:
        raise PruneZooError(f"cannot save to {folder}: {error}; free space or choose another folder") from error
    return folder


def _sweep(folder: Path) -> None:
    """Remove what saves left that were killed: their folders are called by processes that are no more."""
    for left in folder.glob(f"{SCRATCH}*"):
        number = left.name.removeprefix(SCRATCH).partition("-")[0]
        if not (number.isdecimal() and _lives(int(number))):
            shutil.rmtree(left, ignore_errors=True)


def _lives(process: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's, or none that can be
        return True
    return True


def file_names(module: Configured) -> tuple[str, ...]:
    """The files that a module is saved in, relative to its folder; the config, which makes it whole, comes last."""
    parts = [f"{name}/{file}" for name, part in parts_of(module).items() for file in part.files]
    return (*parts, WEIGHTS_FILE, CONFIG_FILE)


def read_method(source: Source) -> str:
    """The method that a folder or a Hub repository was saved from."""
    return str(_read_config(source.file(CONFIG_FILE))["method"])


def load(cls: type[P], source: Source) -> P:
    """A pruner or tokenizer of class ``cls``, in eval mode and in its saved type, from a folder or a Hub id.

    Raises:
        PruneZooError: Another method, an unknown config key, a missing, extra, misshapen or NaN tensor, a broken file,
            or files of different saves.
    """
    path = source.file(CONFIG_FILE)
    stored = _read_config(path)
    if stored["method"] != cls.name:
        raise PruneZooError(f"{path}: method is '{stored['method']}', not '{cls.name}'; use AutoPruner.from_pretrained")
    if stored["dtype"] not in DTYPES:
        raise PruneZooError(f"{path}: unknown dtype '{stored['dtype']}'{near(stored['dtype'], DTYPES)}")
    config = cls.config_class.from_dict(stored["config"], where=f"{path}: ")
    weights = source.file(WEIGHTS_FILE)
    header = read_header(weights)
    try:
        with torch.device("meta"), _no_more_than(len(header)):
            module = cls(config).to(DTYPES[stored["dtype"]])
    except PruneZooError as error:
        raise PruneZooError(f"{path}: {error}") from error
    except Exception as error:  # a config that no check of the method's foresaw
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PruneZooError(f"{path}: no '{cls.name}' can be built of this config ({reason})") from error
    _check_header(module, header, weights)
    # strict already, but for the parts, which are read apart; the tensors read take the place of those without memory
    module.load_state_dict(read_tensors(weights), strict=False, assign=True)
    noted = stored.get(DIGESTS)
    if noted is None and DIGESTS in read_metadata(weights):
        raise PruneZooError(f"{path}: {_torn(WEIGHTS_FILE)}")
    if BASE_MODEL in stored:
        module.base_model = BaseModel.from_dict(stored[BASE_MODEL], where=f"{path}: ")
    module.apply_settings(stored.get(SETTINGS, {}), where=f"{path}: ")
    for name, part in parts_of(module).items():
        paths = [source.file(f"{name}/{file}") for file in part.files]
        part.load(paths[0].parent)
    for file in file_names(module)[:-1]:
        if noted is not None and noted.get(file) != digest(source.file(file)):
            raise PruneZooError(f"{path}: {_torn(file)}")
    return module.eval()


def _torn(file: str) -> str:
    return f"{file} is of another save, or damaged; save or download the folder again"


@contextmanager
def _no_more_than(tensors: int) -> Iterator[None]:
    """Refuse to build a module that registers far more than these tensors: a config may ask for a million layers."""
    most = {"parameters": 2 * tensors + 16, "buffers": 2 * tensors + 16, "modules": 16 * tensors + 256}
    seen = dict.fromkeys(most, 0)

    def count(kind: str) -> None:
        seen[kind] += 1
        if seen[kind] > most[kind]:
            raise PruneZooError(
                f"the config asks for far more {kind} than the {tensors} tensors of {WEIGHTS_FILE} are; "
                "they do not belong together"
            )

    with ExitStack() as stack:
        for handle in (
            registration.register_module_parameter_registration_hook(lambda *_: count("parameters")),
            registration.register_module_buffer_registration_hook(lambda *_: count("buffers")),
            registration.register_module_module_registration_hook(lambda *_: count("modules")),
        ):
            stack.callback(handle.remove)
        yield


def _check_header(module: Configured, header: dict[str, tuple[tuple[int, ...], str]], path: Path) -> None:
    """Refuse a file that does not hold exactly the tensors of this module."""
    expected = _own_state(module)
    for name in sorted(expected.keys() - header.keys()):
        raise PruneZooError(f"{path}: tensor '{name}' is missing; the file is not a whole '{module.name}' checkpoint")
    for name in sorted(header.keys() - expected.keys()):
        raise PruneZooError(f"{path}: unexpected tensor '{name}'; written by another version?")
    for name, (shape, dtype) in header.items():
        if shape != tuple(expected[name].shape):
            raise PruneZooError(
                f"{path}: tensor '{name}' has shape {shape}, the config asks for "
                f"{tuple(expected[name].shape)}; {CONFIG_FILE} and {WEIGHTS_FILE} do not belong together"
            )
        if HEADER_DTYPES.get(dtype) != expected[name].dtype:
            raise PruneZooError(f"{path}: tensor '{name}' is {dtype}, the config asks for {expected[name].dtype}")


def _own_state(module: Configured) -> dict[str, Tensor]:
    """The state of a module without its parts'."""
    parts = tuple(f"{name}." for name in parts_of(module))
    return {name: tensor for name, tensor in module.state_dict().items() if not name.startswith(parts)}


def _read_config(path: Path) -> dict[str, Any]:
    """``config.json``, its keys checked."""
    stored = read_json(path)
    keys = set(stored) if isinstance(stored, dict) else set()
    for key in sorted(CONFIG_KEYS - keys):
        raise PruneZooError(f"{path}: key '{key}' is missing; not written by save_pretrained of prunezoo")
    for key in sorted(keys - CONFIG_KEYS - OPTIONAL_KEYS):
        raise PruneZooError(f"{path}: unknown key '{key}'{near(key, CONFIG_KEYS | OPTIONAL_KEYS)}")
    for key in sorted(CONFIG_KEYS - {"config"}):
        if not isinstance(stored[key], str):
            raise PruneZooError(f"{path}: key '{key}' must be a string, got {stored[key]!r:.60}")
    if not isinstance(stored["config"], dict):
        raise PruneZooError(f"{path}: key 'config' must be an object of config fields")
    if not isinstance(stored.get(SETTINGS, {}), dict):
        raise PruneZooError(f"{path}: key '{SETTINGS}' must be an object of settings")
    if not isinstance(stored.get(DIGESTS, {}), dict):
        raise PruneZooError(f"{path}: key '{DIGESTS}' must be an object of file names and digests")
    return stored


def short_card(module: Configured, repo: str) -> str:
    """A model card that says what it is and how it is loaded, and nothing of how good it is."""
    base = module.base_model.name if module.base_model and "/" in module.base_model.name else None
    lines = ["---", "library_name: prunezoo", "tags:", "- prunezoo", f"- {module.name}"]
    lines += [f"base_model: {json.dumps(base)}"] if base else []
    lines += ["---", f"# {repo.partition('/')[2]}", "", f"Weights of the method `{module.name}` of prunezoo."]
    lines += [f"Trained for `{base}`."] if base else []
    loader = (
        f"{type(module).__name__}.from_pretrained" if not hasattr(module, "stage") else "AutoPruner.from_pretrained"
    )
    return "\n".join([*lines, "Nothing was measured for this card.", "", f'    {loader}("{repo}")', ""])


class Pretrained(Configured):
    """A configured module that is saved into a folder, and loaded strictly from one or from the Hub."""

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``; :func:`save`."""
        return save(self, folder)

    def push_to_hub(self, repo: str, private: bool = False, token: str | None = None) -> Published:
        """Upload it to the Hub in one commit, which gets the next tag (`v1`, `v2`, …); the same again is no commit.

        It is saved and loaded strictly first. A repository without a card gets a short one, which says that nothing was
        measured; `python -m trainers.publish` makes one of measurements.

        Args:
            repo: ``ORG/NAME``, made where it is not there.
            private: Make a new repository private.
            token: Of the Hub; by default that of `hf auth login` or HF_TOKEN.

        Returns:
            Its address, its tag, and whether anything was uploaded.

        Raises:
            PruneZooError: No Hub id, weights that do not load strictly, a base model that is a folder of a machine, a
                repository that holds something else or measurements of other weights, or the Hub refuses.
        """
        check_repo(repo)
        check_public(self.base_model, f"'{self.name}'")
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.save_pretrained(scratch)
            load(type(self), Source(folder))
            files = {name: file_inside(folder, name).read_bytes() for name in file_names(self)}
        return upload(repo, with_card(repo, files, short_card(self, repo)), self.name, read_method, private, token)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None, **options: Any) -> Self:
        """Load this method, in eval mode, from a folder or a Hub id; strict in config, names, shapes and method.

        Args:
            source: A folder written by :meth:`save_pretrained`, or a Hub id.
            revision: Branch, tag or commit, for a Hub id.
            options: The other fields of :class:`source.Source`: ``cache_dir``, ``token``, ``local_files_only``, …
        """
        return load(cls, Source(source, revision, **options))
