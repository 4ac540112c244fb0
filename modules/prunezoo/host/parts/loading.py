"""Bring a vision-language model and its processor into memory, from a folder or from the Hub."""

from functools import wraps
from inspect import signature
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from ...core.errors import PruneZooError
from ...core.hub import DTYPES


def load_vlm(source: str, device: str, dtype: str) -> tuple[Any, Any]:
    """A model, frozen and in eval mode, and its processor.

    Args:
        source: Local folder or Hub id of a `transformers` image-text-to-text model.
        device: Where to.
        dtype: Key of ``hub.DTYPES``.

    Raises:
        PruneZooError: No such type; no such model, or it is none that reads images.
    """
    if dtype not in DTYPES:
        raise PruneZooError(f"dtype={dtype}: write {', '.join(DTYPES)}")
    try:
        vlm = AutoModelForImageTextToText.from_pretrained(source, dtype=DTYPES[dtype])
        processor = load_processor(source)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PruneZooError(f"{source}: not a loadable image-text-to-text model ({reason})") from None
    return vlm.to(device).eval().requires_grad_(False), processor


def load_processor(source: str) -> Any:
    """The processor of a model; without its half for clips where torchvision, which that needs, is not installed, or
    where that half was never saved.

    Args:
        source: As in :func:`load_vlm`.

    Raises:
        PruneZooError: It needs another package that is not installed.
    """
    try:
        return AutoProcessor.from_pretrained(source)
    except (ImportError, OSError, ValueError) as error:
        if not any(word in str(error).lower() for word in ("torchvision", "video processor")):
            raise
    return images_only(PROCESSOR_MAPPING_NAMES[AutoConfig.from_pretrained(source).model_type]).from_pretrained(source)


def images_only(name: str) -> Any:
    """The processor class of `transformers` of that name, less its half for clips."""
    kind = getattr(transformers, name)
    parts = [part for part in kind.get_attributes() if part != "video_processor"]
    settings = signature(kind.__init__).parameters.keys() - {"video_processor"}

    @wraps(kind.__init__)  # by whose signature settings are saved
    def init(self: Any, *args: Any, **options: Any) -> None:
        try:
            kind.__init__(self, **dict(zip(parts, args, strict=False)), video_processor=None, **options)
        except ImportError as error:
            raise PruneZooError(f"{name} needs a package ({str(error).splitlines()[0]})") from None

    def validate(processor_config: dict[str, Any], valid_kwargs: Any) -> Any:
        # `valid_kwargs` are the names that the code of `init` has: none. Without this no setting of a file would be
        # read: no chat template, no number of tokens an image.
        return kind.validate_init_kwargs(processor_config, settings)

    members = {
        "__init__": init,
        "get_attributes": classmethod(lambda _: parts),
        "validate_init_kwargs": staticmethod(validate),
    }
    # Of the same name, since files name the class that they are for.
    return type(name, (kind,), members)


def default_device() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """`float32` on a CPU, `bfloat16` on a GPU."""
    return "float32" if torch.device(device).type == "cpu" else "bfloat16"
