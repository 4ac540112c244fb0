"""Does a device compute what a CPU computes, under pruners and in every way that a model is run? And how often does it
wait for the host?
"""

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from prunezoo.core.contract import Pruner
from prunezoo.host import attach

from .shapes import SHAPES, MadeUp, Shape

KINDS = ("divprune", "uniform", "fastv")
"""Pruners, one of each kind: by features, by place, between decoder layers."""
STEPS = 16
"""New tokens that are compared."""
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
"""What makes a host wait, by the names of torch's profiler."""


@torch.no_grad()
def written(vlm: Any, request: MadeUp, **options: Any) -> Tensor:
    """``(B, STEPS)`` on the host: what the model writes, always the likeliest token."""
    out = vlm.generate(**request(), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, **options)
    return out[:, request.columns :].cpu()


def agreement(one: Tensor, other: Tensor) -> float:
    """Share of equal tokens, up to the first that differs in each row: behind it the two read different texts."""
    return float((one == other).cumprod(1).float().mean())


def parity(
    device: str, build: Callable[[str, Any], Pruner], tick: Callable[[], None], pruners: Sequence[str] = KINDS
) -> Iterator[dict[str, Any]]:
    """Tiny models of every shape, on the CPU and on the device.

    Args:
        device: To be compared with the CPU.
        build: A pruner by its name, for a model.
        tick: Called before each case; may stop it all.
        pruners: Their names.

    Yields:
        `{shape, pruner, way, dtype, error | agreement}`: the largest difference of logits in float32, or the share of
        equal tokens in bfloat16; ways beyond the plain one against the plain one on the same device.
    """
    for shape in SHAPES:
        for name in pruners:
            tick()
            row = {"shape": shape.name, "pruner": name, "way": "sdpa"}
            yield {**row, "dtype": "float32", "error": logits_error(shape, name, device, build)}
            tick()
            told = [_written_by(shape, name, place, build) for place in ("cpu", device)]
            yield {**row, "dtype": "bfloat16", "agreement": agreement(*told)}
    for way, run in ways(device).items():
        tick()
        shape = SHAPES[0]
        plain, other = (_written_by(shape, "uniform", device, build, one) for one in (None, run))
        row = {"shape": shape.name, "pruner": "uniform", "way": way, "dtype": "bfloat16"}
        yield {**row, "agreement": agreement(plain, other)}


@torch.no_grad()
def logits_error(shape: Shape, name: str, device: str, build: Callable[[str, Any], Pruner]) -> float:
    """The largest difference of the last logits, in float32, of a prompt that lost half of its image tokens."""
    vlm, found = shape.build(True, "cpu", torch.float32), []
    for place in ("cpu", device):
        own = copy.deepcopy(vlm).to(place)
        with attach(own, build(name, own), 0.5):
            found.append(own(**MadeUp(own, shape, 2, 32, 6)()).logits[:, -1].cpu())
    return float((found[0] - found[1]).abs().max())


Way = Callable[[Any, MadeUp], Tensor]


def _written_by(
    shape: Shape, name: str, device: str, build: Callable[[str, Any], Pruner], way: Way | None = None
) -> Tensor:
    vlm = shape.build(True, "cpu", torch.bfloat16).to(device)
    with attach(vlm, build(name, vlm), 0.5):
        request = MadeUp(vlm, shape, 2, 32, 6)
        return written(vlm, request) if way is None else way(vlm, request)


def ways(device: str) -> dict[str, Way]:
    """How else a model is run, where it can be: kernels of attention, a static cache (with CUDA graphs on a GPU), and
    compiled.
    """

    def by_kernel(kernel: str) -> Way:
        def run(vlm: Any, request: MadeUp) -> Tensor:
            vlm.set_attn_implementation(kernel)
            return written(vlm, request)

        return run

    def static(vlm: Any, request: MadeUp) -> Tensor:
        return written(vlm, request, cache_implementation="static")

    def compiled(vlm: Any, request: MadeUp) -> Tensor:
        vlm.get_decoder().compile()
        return written(vlm, request)

    found: dict[str, Way] = {"eager": by_kernel("eager"), "static cache": static}
    if torch.device(device).type == "cuda":
        found |= {"flash_attention_2": by_kernel("flash_attention_2")} if is_flash_attn_2_available() else {}
        found |= {"flash_attention_3": by_kernel("flash_attention_3")} if is_flash_attn_3_available() else {}
        found |= {"torch.compile": compiled}
    return found


def stalls(vlm: Any, request: MadeUp, pruner: Pruner | None, keep: float) -> int:
    """How often a prefill makes the host wait: as CUDA warns of it, on a CPU as the profiler sees what would."""

    @torch.no_grad()
    def prefill() -> None:
        vlm(**request())

    if pruner is None:
        return _waits(vlm.device, prefill)
    with attach(vlm, pruner, keep):
        return _waits(vlm.device, prefill)


def _waits(device: torch.device, prefill: Callable[[], None]) -> int:
    prefill()  # layouts of grids are worked out once
    if device.type != "cuda":
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler's start and stop are printed
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            prefill()
        return sum(event.count for event in seen.key_averages() if event.key in READS)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            prefill()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in said)
