"""A plan as tables."""

from typing import Any

from rich.console import Console
from rich.table import Table

from .job import TERA, Job

GIB = 2**30


def show(job: Job, found: dict[str, Any], memory: float, tflops: float, source: str, console: Console) -> None:
    """Print them.

    Args:
        job: that is planned.
        found: what `plan` says of it.
        memory: GiB that a GPU has.
        tflops: 10^12 operations that it does in a second.
        source: of the model's configuration, in words.
        console: to print to.
    """
    total = sum(found["memory"].values())
    table = Table(title=f"memory of a GPU: {job.strategy} on {job.gpus}, batch {job.batch}, {job.tokens} tokens")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for part, size in found["memory"].items():
        table.add_row(part, f"{size / GIB:.2f}")
    table.add_row("together", f"{total / GIB:.2f}", style="bold")
    console.print(table)
    if total > memory * GIB:
        console.print(
            f"more than the {memory} GiB of a GPU: take model.recompute=true, a smaller data.batch_size, zero3 or "
            "fsdp2, or more GPUs"
        )
    work = Table(title="work")
    work.add_column("")
    work.add_column("", justify="right")
    sizes = found["parameters"]
    work.add_row("frozen parameters", f"{(sizes['vision'] + sizes['language']) / 1e9:.2f} G ({source})")
    work.add_row("trained parameters", f"{sizes['trained'] / 1e6:.1f} M")
    for stage, flops in found["flops_per_step"].items():
        work.add_row(f"a step of a GPU, {stage}", f"{flops / TERA:.1f} TFLOP")
    work.add_row("steps", f"{found['steps']:,}")
    work.add_row("samples of a step", f"{job.samples}")
    work.add_row("tokens read by the model", f"{found['tokens'] / 1e9:.2f} G")
    work.add_row(f"hours at {tflops:g} TFLOP/s of a GPU", f"{found['hours']:.1f}")
    work.add_row("the same with cached answers", f"{found['hours_cached']:.1f}")
    for name, size in found["caches"].items():
        work.add_row(f"cache of {name}, {found['items']:,} items", f"{size / 1e9:.2f} GB")
    console.print(work)
