"""Counts what a device is asked while the host waits: numbers read back, and questions for what is not zero."""

from collections import Counter
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
ASKS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.unique_consecutive, aten._unique2}
COPIES = {torch.Tensor.tolist, torch.Tensor.cpu}
"""`numpy` is none of them: it takes tensors of the host only, so where a device is asked it would fail."""


class _Operations(TorchDispatchMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        packet = operation.overloadpacket
        by_mask = packet in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if packet in ASKS or by_mask:
            self.seen[str(packet)] += 1
        return operation(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in COPIES:
            self.seen[function.__name__] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def counted_reads():
    """A counter, by name of what was called; `total()` of it is how often the host waits."""
    seen = Counter()
    with _Calls(seen), _Operations(seen):
        yield seen
