"""Peak memory of a run: of all tensors, as the allocator of the device counts them."""

import os
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile


def weights_size(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    return sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})


def peak_memory(device: torch.device, run: Callable[[], Any]) -> int:
    """Bytes that ``run`` allocates at its peak, beyond those that were allocated before it.

    On a GPU the caching allocator's own peak. On a CPU the peak of the running sum of every allocation and release of a
    tensor, as torch's profiler notes them: exact and repeatable, where the resident size of a process would depend on
    what the C library keeps for later and on how the weights were loaded. Scratch space that a matrix library takes
    for itself is in neither.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler's start and stop are printed
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0)
