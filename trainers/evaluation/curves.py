"""The figure of a report: retention against tokens, one panel a question group, with bootstrap intervals."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from trainers.cli.text import in_figure

from .record import MEAN, Row, select
from .scores import NONE, ORACLE, RELEVANCE, is_diagnostic
from .sight import unseen
from .tables import display_name, methods_of

# Okabe and Ito's colours, which people with colour-blindness can tell apart; the first is the leading method's
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C6D31", "#7A5195", "#5B8C5A", "#A05D56")
INK, GREY, LIGHT = "#222222", "#8a8a8a", "#c9c9c9"
MARKERS = "osD^vPX<>p"
NAMED = {ORACLE: INK, RELEVANCE: GREY}
"""Colours of the diagnostics that the legend names."""
COLUMNS = 4
JITTER = 0.014
"""Horizontal distance between the marks of two methods at one budget, as a share, so that intervals stay apart."""


def colours_of(pruners: Sequence[str]) -> dict[str, str]:
    """A colour for each method: diagnostics are black or grey, the rest take theirs in order."""
    plain = [p for p in pruners if not is_diagnostic(p)]
    colours = {p: COLOURS[i % len(COLOURS)] for i, p in enumerate(plain)}
    return {p: colours.get(p, NAMED.get(p, LIGHT)) for p in pruners}


def draw_curves(record: Mapping[str, Any], path: Path) -> None:
    """Draw one panel for the mean and one for each group, and save the figure as PNG."""
    panels = [MEAN, *record["groups"]]
    pruners = methods_of(record)
    colours = colours_of(pruners)
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.1 * columns, 2.75 * rows + 0.7), layout="constrained")
    axes: Axes | None = None
    for number, group in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1, sharex=axes, sharey=axes)
        _draw_panel(axes, record, group, pruners, colours)
        axes.set_title(
            "mean over groups" if group == MEAN else in_figure(group), fontsize=10, loc="left", color=INK, weight="bold"
        )
        if number % columns == 0:
            axes.set_ylabel("retention, %", fontsize=9)
        if number >= len(panels) - columns:
            axes.set_xlabel("image tokens kept", fontsize=9)
    figure.legend(
        handles=_legend(pruners, colours),
        loc="outside lower center",
        ncols=min(6, len(pruners) + 2),
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path, dpi=150, facecolor="white")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure of curves with intervals, in folders made if need be, without frames at the top and right."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, facecolor="white")


def _draw_panel(
    axes: Axes, record: Mapping[str, Any], group: str, pruners: Sequence[str], colours: Mapping[str, str]
) -> None:
    axes.axhline(100, color=GREY, linewidth=0.9, zorder=1)
    (floor,) = select(record, pruner=NONE, group=group)
    if floor["retention"] is not None:
        axes.axhline(floor["retention"], color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    budgets = sorted({row["tokens"] for row in select(record, group=group) if row["pruner"] in pruners})
    for number, pruner in enumerate(pruners):
        points: list[Row] = [row for row in select(record, pruner=pruner, group=group) if row["retention"] is not None]
        points.sort(key=lambda row: row["tokens"])
        diagnostic = is_diagnostic(pruner)
        # the first method stands on the budget itself, the others to its right and left by turns
        side = (number + 1) // 2 * (1 if number % 2 else -1)
        x = [row["tokens"] * (1 if diagnostic else (1 + JITTER) ** side) for row in points]
        y = [row["retention"] for row in points]
        axes.plot(
            x,
            y,
            color=colours[pruner],
            linewidth=2.2 if number == 0 else 1.2,
            linestyle="--" if diagnostic else "-",
            marker=None if diagnostic else MARKERS[number % len(MARKERS)],
            markersize=5 if number == 0 else 3.5,
            zorder=4 if number == 0 else 2,
        )
        if not diagnostic:
            low, high = [row["ci"][0] for row in points], [row["ci"][1] for row in points]
            axes.vlines(x, low, high, color=colours[pruner], linewidth=1.1, alpha=0.6, zorder=3)
    if group in unseen(record):
        axes.text(0.5, 0.5, "no retention", transform=axes.transAxes, ha="center", color=GREY, fontsize=9)
    axes.set_xscale("log")
    axes.set_xticks(budgets, [f"{tokens:g}" for tokens in budgets])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=3, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LIGHT)
    axes.set_ylim(bottom=0)


def _legend(pruners: Sequence[str], colours: Mapping[str, str]) -> list[Line2D]:
    """One entry a method; the attention of all layers shares one."""
    handles = []
    for number, pruner in enumerate(pruners):
        named = pruner in NAMED
        if is_diagnostic(pruner) and not named:
            continue
        handles.append(
            Line2D(
                [],
                [],
                color=colours[pruner],
                label=in_figure(display_name(pruner)),
                linestyle="--" if named else "-",
                linewidth=2.2 if number == 0 else 1.2,
                marker=None if named else MARKERS[number % len(MARKERS)],
                markersize=5 if number == 0 else 3.5,
            )
        )
    if any(is_diagnostic(p) and p not in NAMED for p in pruners):
        handles.append(Line2D([], [], color=LIGHT, linestyle="--", linewidth=1.2, label="attention, each layer"))
    handles.append(Line2D([], [], color=GREY, linewidth=0.9, label="all tokens"))
    handles.append(Line2D([], [], color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), label="zero tokens"))
    return handles
