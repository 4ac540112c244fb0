"""The terminal's view of a benchmark: one table for each batch size and prompt length."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from trainers.evaluation.scores import FULL
from trainers.evaluation.tables import display_name

from .measure import BARE, Row

COLUMNS = {
    "vision": "vision",
    "prefill": "prefill",
    "first_token": "first token",
    "decode": "a later token",
    "end_to_end": "end to end",
    "peak_memory": "memory",
}
"""Parts that a table shows as ratios, and their headings; `pruner` stands beside them in milliseconds."""
LEGEND = (
    "The bare model in milliseconds and MiB, all others as the bare model over them: measured / ideal, "
    "the ideal from the model's floating-point operations at the tokens that each layer reads. "
    "Tokens: image tokens of a picture in the language model, mean over its layers."
)


def settings_of(rows: Sequence[Row]) -> Iterator[tuple[tuple[int, int], dict[tuple[str, str], dict[str, Row]]]]:
    """Batch size and length, and their rows by case (pruner, keep) and part."""
    for setting in dict.fromkeys((row["batch"], row["length"]) for row in rows):
        cases: dict[tuple[str, str], dict[str, Row]] = {}
        for row in rows:
            if (row["batch"], row["length"]) == setting:
                cases.setdefault((row["pruner"], row["keep"]), {})[row["part"]] = row
        yield setting, cases


def table_lines(cases: Mapping[tuple[str, str], Mapping[str, Row]]) -> Iterator[list[str]]:
    """The cells of a table, its header first; the table of docs/protocol.md has the same."""
    columns = [part for part in COLUMNS if part in cases[BARE, "1.0"]]
    yield ["pruner", "keep", "tokens", *(COLUMNS[part] for part in columns), "pruner: ms, % of a prefill"]
    for (pruner, keep), parts in cases.items():
        tokens = next(iter(parts.values()))["tokens"]
        cell = absolute if pruner == BARE else ratio
        own = of_prefill(parts["pruner"], cases[BARE, "1.0"]["prefill"]) if "pruner" in parts else ""
        yield [display_name(pruner), keep, f"{tokens:g}", *(cell(parts[part]) for part in columns), own]


def absolute(row: Row) -> str:
    """Milliseconds, or MiB."""
    if row["median_s"] is None:
        return f"{row['bytes'] / 2**20:.0f} MiB"
    return f"{1000 * row['median_s']:.1f} ms"


def of_prefill(pruner: Row, prefill: Row) -> str:
    """What a pruner takes itself, `8.6 (0.5 %)`: milliseconds, and of the bare model's prefill."""
    seconds = pruner["median_s"]
    return f"{1000 * seconds:.1f} ({100 * seconds / prefill['median_s']:.1f} %)"


def ratio(row: Row) -> str:
    """`2.61 / 2.80`, or without an ideal `2.61`."""
    ideal = "" if row["ideal_speedup"] is None else f" / {row['ideal_speedup']:.2f}"
    return f"{row['speedup']:.2f}{ideal}"


def overhead_line(overhead: Mapping[str, Any]) -> str:
    """What attaching costs, in a sentence."""
    share, spread, first, wide = (
        f"{100 * overhead[key]:.2f}" for key in ("share", "spread", "first_token", "first_token_spread")
    )
    return (
        f"attach with every token kept, batch {overhead['batch']}, {overhead['tokens']} tokens: "
        f"{share} % of a prefill more in front of the language model (interquartile range {spread}); "
        f"{first} % up to the first token ({wide})"
    )


def print_record(record: Mapping[str, Any], console: Console) -> None:
    """Print a table for each setting, and what attaching costs."""
    for (batch, length), cases in settings_of(record["rows"]):
        table = Table(
            title=f"batch {batch}, {length} text tokens, {record['vlm']} on {record['device']}",
            title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
        )  # fmt: skip
        header, *lines = table_lines(cases)
        for number, name in enumerate(header):
            table.add_column(name, justify="left" if number < 2 else "right", no_wrap=number > 0)
        for line in lines:
            table.add_row(*line, style="dim" if line[0] == BARE else None)
        console.print(table)
    if record["rows"]:
        console.print(LEGEND, style="dim")
    for overhead in record["overhead"]:
        console.print(overhead_line(overhead))


def speed_section(record: Mapping[str, Any], shown: Collection[str] | None = None) -> str:
    """A benchmark in Markdown.

    Args:
        record: What was measured.
        shown: Pruners whose rows are wanted, beside those of the bare model and of `full`; None: all.
    """
    wanted = None if shown is None else {BARE, FULL, *shown}
    lines = []
    for (batch, length), cases in settings_of(record["rows"]):
        some = {case: parts for case, parts in cases.items() if wanted is None or case[0] in wanted}
        header, *rest = table_lines(some)
        lines += [f"Batch {batch}, {length} text tokens:", "", f"| {' | '.join(header)} |"]
        lines += ["|---|---|" + "---:|" * (len(header) - 2), *(f"| {' | '.join(line)} |" for line in rest), ""]
    lines += [LEGEND, "", *(f"{overhead_line(overhead)}." for overhead in record["overhead"]), ""]
    versions = ", ".join(f"{name} {release}" for name, release in record["versions"].items())
    lines += [
        f"`{record['vlm']}`, {record['dtype']}, {record['device']}; {versions}; medians of {record['repeats']}.",
        "",
    ]
    return "\n".join([*lines, "```", record["command"], "```", ""])


def speed_brief(record: Mapping[str, Any], shown: Sequence[str]) -> str:
    """The table of README: some pruners of a benchmark's first setting, as speed-ups over the bare model."""
    (batch, _), cases = next(settings_of(record["rows"]))
    bare = cases[BARE, "1.0"]
    parts = {part: name for part, name in COLUMNS.items() if part not in ("vision", "peak_memory")}
    lines = [f"| pruner | tokens | {' | '.join(parts.values())} |", "|---|---:|" + "---:|" * len(parts)]
    for (pruner, _), rows in cases.items():
        if pruner in shown:
            cells = [f"{rows[part]['speedup']:.1f}x" for part in parts]
            lines.append(f"| `{pruner}` | {rows['prefill']['tokens']:.0f} | {' | '.join(cells)} |")
    said = (
        f"Speed-up over the unpruned model, measured alternating with it: `{record['vlm']}` with random weights and "
        f"{bare['prefill']['tokens']:.0f} image tokens, {record['dtype']}, batch {batch}, {record['device']}, medians "
        f"of {record['repeats']}. Unpruned: prefill {absolute(bare['prefill'])}, end to end "
        f"{absolute(bare['end_to_end'])}. Tokens: mean over the decoder layers. "
        "[All methods, with the ideal speed-up and memory](docs/protocol.md#speed)."
    )
    return "\n".join([*lines, "", said, ""])


def first_token_section(record: Mapping[str, Any]) -> str:
    """The table in Markdown of what `trainers.upkeep.first_token` wrote."""
    tower, language = (record["parameters"][name] / 1e6 for name in ("tower", "language"))
    lines = [
        "| | patches | first token, s | times bare (lowest–highest) | tower, times bare |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        first, inside = row["first_token"], row["tower"]
        times = f"{first['times']:.2f} ({first['low']:.2f}–{first['high']:.2f})"
        lines.append(
            f"| {row['way']} | {row['patches']:,} | {first['seconds']:.2f} | {times} | {inside['times']:.2f} |"
        )
    where = f"tower of {tower:.0f} M and language model of {language:.0f} M parameters with random weights"
    how = f"medians of {record['repeats']} turns, {record['threads']} thread of a CPU, time of the process"
    lines += ["", f"Qwen2-VL's make, {where}, {record['words']} words; {how}; `{record['command']}`.", ""]
    return "\n".join(lines)
