"""What the operator of a server says of the pruner, and which pruners can be served. Nothing of vLLM is needed here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, NoReturn, Self

import torch

from ..core.budgets import Keep, check_keep, counts_of
from ..core.contract import Pruner
from ..core.errors import PruneZooError
from ..core.hub import parts_of
from ..core.registry import load_pruner
from ..core.signals import parse_signal
from ..host.stages.prompt import check_positions

ARCHITECTURE = "PrunezooForConditionalGeneration"
KEEP = "prunezoo_keep"
"""What a request may set in `mm_processor_kwargs`: tokens an image or a share, at most what the server keeps."""
INSTEAD = "serve one that acts in front of the language model: divprune, fastervlm, visionzip, a trained ppm or m3"


@dataclass(frozen=True)
class Settings:
    """Which pruner, and how much it keeps."""

    pruner: str
    keep: Keep
    positions: str = "original"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_positions(self.positions)
        if not isinstance(self.keep, int | float):
            raise PruneZooError(
                f"keep='{self.keep}' cannot be served, since vLLM lays out the prompt before the image is seen: give "
                "tokens (64) or a share (0.25)"
            )

    @classmethod
    def of(cls, hf_config: Any) -> Self:
        """Those that a model's config carries, from ``--hf-overrides``.

        Raises:
            PruneZooError: There are none, or they are not right.
        """
        given = getattr(hf_config, "prunezoo", None)
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or not {"pruner", "keep"} <= given.keys() <= set(known):
            raise PruneZooError(f"--hf-overrides: 'prunezoo' must be an object of {', '.join(known)}, got {given!r}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    def load(self) -> Pruner:
        """The pruner, on the host, in eval mode.

        Raises:
            PruneZooError: It cannot be loaded, or not be served.
        """
        return load_served(self.pruner)

    def count(self, tokens: int, asked: Any = None) -> int:
        """How many of an image's tokens are kept.

        Args:
            tokens: It has.
            asked: What a request asks for; None: what the server keeps.

        Raises:
            PruneZooError: The request asks for more than the server keeps, or for nothing that could be kept.
        """
        assert isinstance(self.keep, int | float)
        (most,) = counts_of(self.keep, (tokens,))
        if asked is None:
            return most
        if not isinstance(asked, int | float):
            raise PruneZooError(f"{KEEP}={asked!r}: must be tokens an image, at least 1, or a share up to 1.0")
        check_keep(asked)
        (count,) = counts_of(asked, (tokens,))
        if count > most:
            raise PruneZooError(f"{KEEP}={asked}: this server keeps {self.keep} of an image at most, ask for no more")
        return count


@lru_cache(maxsize=4)
def load_served(source: str) -> Pruner:
    """A pruner that can be served, whatever default type and device are set; see :meth:`Settings.load`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            pruner = load_pruner(source).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    check_served(pruner)
    return pruner


def check_served(pruner: Pruner) -> None:
    """Raise PruneZooError, with what works instead, where vLLM has no place for what a pruner does."""

    def refuse(why: str, instead: str = INSTEAD) -> NoReturn:
        raise PruneZooError(f"pruner '{pruner.name}' cannot be served: {why}; {instead}")

    if pruner.name == "full":
        refuse("it keeps everything", "serve the model as it is, without prunezoo")
    if pruner.stage != "prompt":
        refuse(f"it acts in the {pruner.stage} stage, inside of models that vLLM runs itself")
    if not pruner.exact:
        refuse("it decides itself how many tokens it keeps, and vLLM must know before the image is seen")
    if parts_of(pruner):
        refuse("it brings a LoRA of the language model", "serve an m3 without one, as m3-tiny is")
    if pruner.together or pruner.remembers:
        refuse("it compares the images of a prompt or a stream, and vLLM encodes and caches each alone")
    if pruner.across_batch:
        refuse(f"{pruner.across_batch} compares the images of a batch, and vLLM encodes and caches each alone")
    if unread := [name for name in pruner.needs if not parse_signal(name).is_vision and name != "pixels"]:
        refuse(f"it needs '{unread[0]}', which only a pass of the language model or another encoder tells")
