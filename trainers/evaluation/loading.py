"""Bring a frozen vision-language model and its processor into memory, for measuring."""

import platform
from typing import Any

import torch

from prunezoo.core.errors import PruneZooError
from prunezoo.core.hub import DTYPES
from prunezoo.host.parts import loading
from prunezoo.host.parts.loading import default_device, default_dtype


def device_name(device: torch.device) -> str:
    """The GPU's name, or the kind of CPU and how many threads it uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


def check_device(device: str) -> None:
    """PruneZooError where nothing can be computed on it."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's words for no, and not built for
        reason = str(error).strip().splitlines()[0]
        raise PruneZooError(f"--device {device}: cannot be used here ({reason}); cpu always can") from None


def load_vlm(source: str, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """Load a model and its processor, frozen and in eval mode.

    Args:
        source: local folder or Hub id of a `transformers` image-text-to-text model.
        device: where to; by default a GPU if there is one.
        dtype: float32, bfloat16 or float16; by default float32 on a CPU and bfloat16 on a GPU.

    Raises:
        PruneZooError: there is no such model, or it is none that reads images; or no such device.
    """
    device = device or default_device()
    check_device(device)
    dtype = dtype or default_dtype(device)
    if dtype not in DTYPES:
        raise PruneZooError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        return loading.load_vlm(source, device, dtype)
    except PruneZooError as error:
        raise PruneZooError(f"--vlm {error}") from None
