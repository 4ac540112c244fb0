"""One request, timed by its parts, while the model runs as it always does.

Marks are set by hooks around what the model itself calls (the image encoder, the language model, the output
embedding), so that the bare model and every pruner, of whatever stage, are timed by the same clock at the same places.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Protocol

import torch

from prunezoo.core.contract import Pruner
from prunezoo.host import attach

from .flops import counted_flops

PARTS = (
    "preprocessing", "vision", "pruner", "other", "prefill", "decode", "first_token", "end_to_end",
)  # fmt: skip
"""What is timed; see :func:`timed_request`."""


class Asked(Protocol):
    """What is asked of a model: a prompt about each of some pictures.

    Attributes:
        items: One for each picture.
        image_tokens: Of each.
        columns: Image tokens and words of each prompt.
        length: Words of each.
    """

    items: list[Any]
    image_tokens: int
    columns: int
    length: int

    def __call__(self) -> dict[str, Any]:
        """What the model is given."""


@dataclass
class Marks:
    """Times at which a request passed certain places, and what was seen there."""

    vision: float = 0.0  # seconds in the image encoder
    vision_flops: int = 0
    prefill_begins: float = 0.0
    prefill_ends: float | None = None
    lengths: dict[int, int] = field(default_factory=dict)  # tokens that each decoder layer read in the prefill


@dataclass(frozen=True)
class Reading:
    """One request."""

    seconds: dict[str, float]  # by part
    lengths: tuple[int, ...]  # tokens in each decoder layer at the prefill; empty unless counted
    vision_flops: int  # 0 unless counted


def now(device: torch.device) -> float:
    """Seconds on a clock, with the device's queue run empty."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def probed(vlm: Any, count: bool) -> Iterator[Marks]:
    """Set marks while the block runs one request.

    Args:
        vlm: The model.
        count: Also note the lengths and the encoder's operations, which costs time of its own.
    """
    marks = Marks()
    encoder, decoder = vlm.base_model, vlm.get_decoder()
    encode = encoder.get_image_features

    @wraps(encode)
    def timed_encode(*args: Any, **kwargs: Any) -> Any:
        begun = now(vlm.device)
        run: Callable[[], Any] = lambda: encode(*args, **kwargs)  # noqa: E731
        result, flops = counted_flops(run) if count else (run(), 0)
        marks.vision += now(vlm.device) - begun
        marks.vision_flops += flops
        return result

    def prefill_begins(*_: Any) -> None:
        if marks.prefill_ends is None:  # a pruner may run part of the decoder for itself: the last call counts
            marks.prefill_begins = now(vlm.device)

    def prefill_ends(*_: Any) -> None:
        if marks.prefill_ends is None:
            marks.prefill_ends = now(vlm.device)

    def note_length(number: int) -> Callable[..., None]:
        def note(_module: Any, _args: Any, output: Any) -> None:
            if marks.prefill_ends is None:
                hidden = output if isinstance(output, torch.Tensor) else output[0]
                marks.lengths[number] = hidden.shape[1]

        return note

    with ExitStack() as undo:
        vars(encoder)["get_image_features"] = timed_encode
        undo.callback(vars(encoder).pop, "get_image_features")
        handles = [
            decoder.register_forward_pre_hook(prefill_begins),
            vlm.get_output_embeddings().register_forward_hook(prefill_ends),
        ]
        if count:
            handles += [layer.register_forward_hook(note_length(i)) for i, layer in enumerate(decoder.layers)]
        for handle in handles:
            undo.callback(handle.remove)
        yield marks


@torch.no_grad()
def timed_request(
    vlm: Any, request: Asked, pruner: Pruner | None, keep: int | float | str, decode: int, count: bool = False
) -> Reading:
    """Run one request from raw pictures to the last token, and time its parts.

    Args:
        vlm: The model.
        request: What is asked.
        pruner: Attached for the time of the request; None: the bare model.
        keep: As :func:`attach` takes it.
        decode: New tokens, at least 1, however soon the model would stop.
        count: Note lengths and operations too; the times then mean nothing.

    Returns:
        Seconds by part. ``preprocessing``: the processor. ``vision``: tower and projector. ``pruner``: the pruner
        itself, in the layer stage with its signals; in the vision and layer stage it is contained in ``vision`` and
        ``prefill``.
        ``other``: all else before the language model (signals, layout, embedding). ``prefill``: the language model up
        to the first logits. ``decode``: each later token, where there is one. ``first_token`` and ``end_to_end``: from
        the raw pictures on, the whole way.
    """
    device = vlm.device
    attached = attach(vlm, pruner, keep) if pruner is not None else nullcontext()
    with attached as attachment, probed(vlm, count) as marks:
        begun = now(device)
        batch = request()
        ready = now(device)
        vlm.generate(**batch, max_new_tokens=decode, min_new_tokens=decode, do_sample=False)
        done = now(device)
    assert marks.prefill_ends is not None
    stages = attachment.stats.stages if attachment is not None else []
    between = sum(
        stage.seconds for stage in stages if stage.stage in ("input", "prompt")
    )  # the others are inside of parts
    seconds = {
        "preprocessing": ready - begun,
        "vision": marks.vision,
        "pruner": sum(stage.seconds for stage in stages),
        "other": marks.prefill_begins - ready - marks.vision - between,
        "prefill": marks.prefill_ends - marks.prefill_begins,
        "first_token": marks.prefill_ends - begun,
        "end_to_end": done - begun,
    }
    if decode > 1:
        seconds["decode"] = (done - marks.prefill_ends) / (decode - 1)
    return Reading(seconds, tuple(n for _, n in sorted(marks.lengths.items())), marks.vision_flops)
