"""Strict saving and loading of pruners and tokenizers: a folder, or a repository of the Hugging Face Hub, two files.

``config.json`` is ``{"method", "prunezoo_version", "config": {...}, "dtype"}``; ``model.safetensors`` is the weights. A
:class:`Part` of a pruner has a folder of its own beside them. Nothing is ever unpickled. What is not exactly what the
method expects is refused with one line.
"""

import json
import os
import re
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import PruneZooError

if TYPE_CHECKING:
    from .contract import Configured

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CONFIG_KEYS = {"method", "prunezoo_version", "config", "dtype"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

P = TypeVar("P", bound="Configured")


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


def parts_of(module: "Configured") -> dict[str, Part]:
    """The parts of a module that have files of their own, by name."""
    return {name: child for name, child in module.named_children() if isinstance(child, Part)}


def version() -> str:
    """The installed version of prunezoo, or ``0+local`` in a clone that is not installed."""
    try:
        return metadata.version("prunezoo")
    except metadata.PackageNotFoundError:
        return "0+local"


def save(module: "Configured", folder: str | Path) -> Path:
    """Write a module. All files are written whole beside the old ones before any takes its place, so a full disk or a
    crash while writing leaves the old checkpoint as it was. Other files in the folder (the card) stay.

    Raises:
        PruneZooError: It could not be written, or a weight is NaN.
    """
    folder = Path(folder)
    for name, tensor in module.state_dict().items():
        if bool(tensor.isnan().any()):
            raise PruneZooError(f"not saved to {folder}: tensor '{name}' of '{module.name}' holds NaN")
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _own_state(module).items()}
    floats = {str(t.dtype).removeprefix("torch.") for t in state.values() if t.is_floating_point()}
    if len(floats) > 1:
        raise PruneZooError(
            f"not saved to {folder}: weights of mixed types {sorted(floats)}; cast with module.to(dtype)"
        )
    config = {
        "method": module.name,
        "prunezoo_version": version(),
        "config": module.config.to_dict(),
        "dtype": floats.pop() if floats else "float32",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
            save_file(state, Path(scratch, WEIGHTS_FILE), metadata={"format": "pt"})
            Path(scratch, CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for name, part in parts_of(module).items():
                Path(scratch, name).mkdir()
                part.save(Path(scratch, name))
            files = file_names(module)
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


def file_names(module: "Configured") -> tuple[str, ...]:
    """The files that a module is saved in, relative to its folder; the config, which makes it whole, comes last."""
    parts = [f"{name}/{file}" for name, part in parts_of(module).items() for file in part.files]
    return (*parts, WEIGHTS_FILE, CONFIG_FILE)


def read_method(source: str | Path, revision: str | None = None) -> str:
    """The method that a folder or a Hub repository was saved from."""
    return str(_read_config(_locate(source, CONFIG_FILE, revision))["method"])


def load(cls: type[P], source: str | Path, revision: str | None = None) -> P:
    """A pruner or tokenizer of class ``cls``, in eval mode and in its saved type, from a folder or a Hub id.

    Raises:
        PruneZooError: Another method, an unknown config key, a missing, extra, misshapen or NaN tensor, a broken file.
    """
    path = _locate(source, CONFIG_FILE, revision)
    stored = _read_config(path)
    if stored["method"] != cls.name:
        raise PruneZooError(f"{path}: method is '{stored['method']}', not '{cls.name}'; use AutoPruner.from_pretrained")
    if stored["dtype"] not in DTYPES:
        raise PruneZooError(f"{path}: unknown dtype '{stored['dtype']}'; known: {', '.join(DTYPES)}")
    module = cls(cls.config_class.from_dict(stored["config"], where=f"{path}: "))
    module.to(DTYPES[stored["dtype"]])
    _load_weights(module, _locate(source, WEIGHTS_FILE, revision))
    for name, part in parts_of(module).items():
        paths = [_locate(source, f"{name}/{file}", revision) for file in part.files]
        part.load(paths[0].parent)
    return module.eval()


def _load_weights(module: "Configured", path: Path) -> None:
    """Fill every tensor of the module from a safetensors file that holds exactly these."""
    stored = read_tensors(path)
    expected = _own_state(module)
    for name in sorted(expected.keys() - stored.keys()):
        raise PruneZooError(f"{path}: tensor '{name}' is missing; the file is not a whole '{module.name}' checkpoint")
    for name in sorted(stored.keys() - expected.keys()):
        raise PruneZooError(f"{path}: unexpected tensor '{name}'; written by another version?")
    for name, tensor in stored.items():
        if tensor.shape != expected[name].shape:
            raise PruneZooError(
                f"{path}: tensor '{name}' has shape {tuple(tensor.shape)}, the config asks for "
                f"{tuple(expected[name].shape)}; {CONFIG_FILE} and {WEIGHTS_FILE} do not belong together"
            )
    module.load_state_dict(stored, strict=False)  # strict already, but for the parts, which are read apart


def _own_state(module: "Configured") -> dict[str, Tensor]:
    """The state of a module without its parts'."""
    parts = tuple(f"{name}." for name in parts_of(module))
    return {name: tensor for name, tensor in module.state_dict().items() if not name.startswith(parts)}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        PruneZooError: It cannot be read, or a tensor holds NaN.
    """
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PruneZooError(f"{path}: not a readable safetensors file ({error}); save or download it again") from error
    for name, tensor in stored.items():
        if bool(tensor.isnan().any()):
            raise PruneZooError(f"{path}: tensor '{name}' holds NaN; train or download it again")
    return stored


def _read_config(path: Path) -> dict[str, Any]:
    """``config.json``, its keys checked."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PruneZooError(f"{path}: not readable JSON ({error}); save or download it again") from error
    keys = set(stored) if isinstance(stored, dict) else set()
    for key in sorted(CONFIG_KEYS - keys):
        raise PruneZooError(f"{path}: key '{key}' is missing; not written by save_pretrained of prunezoo")
    for key in sorted(keys - CONFIG_KEYS):
        raise PruneZooError(f"{path}: unknown key '{key}'; known: {', '.join(sorted(CONFIG_KEYS))}")
    if not isinstance(stored["config"], dict):
        raise PruneZooError(f"{path}: key 'config' must be an object of config fields")
    return stored


def _locate(source: str | Path, filename: str, revision: str | None) -> Path:
    """The local path of one file of a folder or of a Hub repository, downloaded where needed."""
    folder = Path(source)
    if folder.is_dir():
        if not (folder / filename).is_file():
            raise PruneZooError(f"{folder}: {filename} is missing; give a folder written by save_pretrained")
        return folder / filename
    if isinstance(source, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise PruneZooError(f"'{source}' is neither a known pruner, nor a folder, nor a Hub id like 'org/name'")
    try:
        return Path(hf_hub_download(source, filename, revision=revision, library_name="prunezoo"))
    except LocalEntryNotFoundError as error:
        raise PruneZooError(f"'{source}' is no folder here and the Hub cannot be reached for {filename}") from error
    except EntryNotFoundError as error:
        raise PruneZooError(f"{filename} is missing in the Hub repository '{source}'; is it a pruner?") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise PruneZooError(f"'{source}' is neither a folder here nor a Hub repository that you can read") from error
    except Exception as error:  # whatever the network stack raises: the user needs the name and one line
        raise PruneZooError(f"cannot download {filename} of '{source}': {str(error).splitlines()[0]}") from error
