"""A frozen model under a pruner, served by vLLM (https://github.com/vllm-project/vllm); experimental.

    LLM(**prunezoo.serve.engine_args("llava-hf/llava-1.5-7b-hf", "divprune", keep=64))

vLLM finds the architecture by its entry point once prunezoo is installed beside it; its own stay as they are. Written
against vLLM 0.32, which is imported in `config`, `processor` and `model` alone.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.budgets import read_keep
from ..core.errors import PruneZooError
from .settings import ARCHITECTURE, Settings

__all__ = ["PROMPT_NOTE", "engine_args", "hf_overrides", "register", "words_of"]

PROMPT_NOTE = (
    "note: '{name}' reads the prompt: another question about the same picture is encoded anew, and nothing behind the "
    "picture is taken from the prefix cache; a pruner that reads no prompt shares both"
)


def engine_args(vlm: str | Path, pruner: str | Path, keep: Any, positions: str = "original") -> dict[str, Any]:
    """What `vllm.LLM` takes to serve a model under a pruner; other arguments of its own may be added.

    Args:
        vlm: Folder or Hub id.
        pruner: What `load_pruner` takes. It acts in every process of vLLM, so a folder must be there for all of them.
        keep: Tokens an image, or a share; "1/9" is one too. A request may ask for less.
        positions: As in :func:`attach`.

    Raises:
        PruneZooError: The pruner cannot be served; the message says why and what can.
    """
    return {"model": str(vlm), "hf_overrides": hf_overrides(pruner, keep, positions)}


def hf_overrides(pruner: str | Path, keep: Any, positions: str = "original") -> dict[str, Any]:
    """What of that goes for any model: `--hf-overrides` of vLLM's server. See :func:`engine_args`."""
    pruner = str(Path(pruner).resolve()) if Path(pruner).is_dir() else str(pruner)
    settings = Settings(pruner, read_keep(keep), positions)
    settings.load()
    return {"architectures": [ARCHITECTURE], "prunezoo": settings.to_dict()}


def words_of(options: Mapping[str, Any], prefix: str = "--") -> list[str]:
    """VLLM's arguments for nested options, in its dotted form.

    Raises:
        PruneZooError: A value with characters that a shell would take apart.
    """
    words: list[str] = []
    for key, value in options.items():
        if isinstance(value, Mapping):
            words += words_of(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            words += [word for one in value for word in (f"{prefix}{key}+", str(one))]
        else:
            words += [f"{prefix}{key}", str(value)]
    for word in words:
        if re.search(r"[^\w@%+=:,./-]", word):
            raise PruneZooError(
                f"'{word}' holds characters that a shell takes apart: rename it, or use prunezoo.serve.engine_args"
            )
    return words


def register() -> None:
    """Entry point of `vllm.general_plugins`, called in every process of vLLM."""
    from .config import register_architecture

    register_architecture()
