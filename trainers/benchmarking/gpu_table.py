"""What `trainers.upkeep.gpu` measured, in Markdown."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prunezoo.core.files import read_object

from .measure import BARE
from .tables import COLUMNS, absolute, ratio

GPUS = Path(__file__).resolve().parents[2] / "hub_cards" / "gpu"
"""A record for each device."""


def read_gpu(path: Path) -> dict[str, Any]:
    """A record.

    Raises:
        PruneZooError: It is none.
    """
    keys = ("device", "date", "command", "versions", "parts")
    return read_object(path, *keys, what="a record of a GPU", remedy="write it with `make gpu`")


def gpu_section(record: Mapping[str, Any]) -> str:
    """The tables of one device."""
    parts = record["parts"]
    lines = [f"**{record['device']}**, {record['date']}:", ""]
    for name, part in parts.items():
        rows = [row for row in part["rows"] if "image_tokens" in row]
        if rows:
            columns = [column for column in COLUMNS if any(row["part"] == column for row in rows)]
            shown = (COLUMNS[column] for column in columns)
            lines += [f"| {name}: pruner | batch | image tokens | keep | {' | '.join(shown)} | pruner |"]
            lines += ["|---|---:|---:|---|" + "---:|" * (len(columns) + 1), *_cells(rows, columns), ""]
    for row in parts.get("parity", {}).get("rows", ()):
        said = f"error {row['error']:.1e}" if "error" in row else f"equal tokens {100 * row['agreement']:.0f} %"
        lines.append(f"- Parity, {row['shape']}, `{row['pruner']}`, {row['way']}, {row['dtype']}: {said}.")
    waits = {row["pruner"]: row["waits"] for row in parts.get("stalls", {}).get("rows", ())}
    if waits:
        lines.append(f"- Host waits in a prefill: {', '.join(f'`{name}` {count}' for name, count in waits.items())}.")
    for row in parts.get("training", {}).get("rows", ()):
        peak = (row["peak_bytes"]["step"] + row["weights_bytes"]) / 2**30
        lines.append(
            f"- A step of distillation: {row['step_s']:.3f} s, {row['step_over_floor']:.2f} times its floor, "
            f"{peak:.1f} GiB at its peak ({row['planned_bytes'] / 2**30:.1f} planned); the recipe's {row['steps']:,} "
            f"steps take {row['hours']:.1f} hours at this pace."
        )
    left_out = [f"{name}: {'; '.join(part['not_run'])}" for name, part in parts.items() if part["not_run"]]
    lines += [f"- Not run for want of time: {', '.join(left_out)}."] if left_out else []
    versions = ", ".join(f"{name} {release}" for name, release in record["versions"].items())
    return "\n".join([*lines, "", f"{versions}; `{record['command']}`.", ""])


def _cells(rows: list[dict[str, Any]], columns: list[str]) -> Iterator[str]:
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (row["batch"], row["image_tokens"], row["keep"], row["decode"], row["pruner"])
        cases.setdefault(key, {})[row["part"]] = row
    for (batch, tokens, keep, _, pruner), parts in cases.items():
        cell = absolute if pruner == BARE else ratio
        values = [cell(parts[column]) if column in parts else "–" for column in columns]
        own = f"{1000 * parts['pruner']['median_s']:.2f} ms" if "pruner" in parts else "–"
        yield f"| `{pruner}` | {batch} | {tokens:,} | {keep} | {' | '.join(values)} | {own} |"
