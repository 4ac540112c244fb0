"""Mixed precision only where the processor has it: a CPU without bfloat16 emulates it, some ten times slower."""

from typing import Any

import torch


def usable_precision(precision: Any, accelerator: Any) -> Any:
    """What a recipe's `precision` becomes on this machine.

    Args:
        precision: As Lightning's trainer takes it.
        accelerator: Likewise.

    Returns:
        "32-true" for "bf16-mixed" on a CPU that has no bfloat16 instructions; else `precision`.
    """
    if precision != "bf16-mixed" or not _on_cpu(accelerator) or torch.cpu._is_avx512_bf16_supported():
        return precision
    print("This CPU has no bfloat16 instructions, and emulates them some ten times slower: training in 32-true.")
    return "32-true"


def _on_cpu(accelerator: Any) -> bool:
    found = torch.cuda.is_available() or torch.backends.mps.is_available()
    return accelerator == "cpu" or (accelerator == "auto" and not found)
