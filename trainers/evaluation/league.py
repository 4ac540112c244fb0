"""The leagues: every method of the zoo at equal tokens, sorted by what was measured; docs/league.md is made from them.

There is one for each embedded model and its suite. Its records lie in a folder of `hub_cards/`, one a method, and are
what `trainers.evaluate --equal-tokens` writes, with one field more: `rows_kept`, where in the picture the tokens lie
that are kept. `trainers.upkeep.league` makes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import list_pruners, pruner_class
from trainers.cards.about import about, stage_of
from trainers.cli.names import ROOT, methods_shipped

from .answers import join_answers
from .methods import RIVALS
from .record import MEAN, Row, paired_of, read_record, select
from .scores import ALL_TOKENS, FULL, NO_TOKENS, NONE
from .statistics import interval
from .tables import budgets_of, display_name, methods_of, percent, span

BUDGET = "1/9"
"""The one that the best are told by."""
FLOORS = ("random", "uniform", "pool", "resize")
"""What no published method should be below."""
PUBLISHED = "training-free"

Record = Mapping[str, Any]


@dataclass(frozen=True)
class League:
    """Where methods compete.

    Attributes:
        vlm: the embedded model.
        suite: its questions.
        budgets: most tokens first.
        items: questions of the test split.
        folder: of the records.
    """

    vlm: str
    suite: str
    budgets: tuple[str, ...]
    items: int
    folder: Path


SCENES = League("tiny-llava", "scenes", ("1/2", "1/3", "2/9", "1/9", "1/18"), 2100, ROOT / "hub_cards" / "league")
PAGES = League("small-llava", "pages", ("1/2", "1/3", "1/9", "1/18"), 800, ROOT / "hub_cards" / "league_pages")
LEAGUES = {one.suite: one for one in (SCENES, PAGES)}


@dataclass(frozen=True)
class Place:
    """One method at one budget.

    Attributes:
        name: what `--pruner` takes.
        row: the mean over the groups.
        behind: points of mean retention that it is behind the best learned one; 0 for that one itself.
        ci: their 95 % interval, paired over the same questions.
        below: the floors that it is below, with an interval that does not reach 0.
    """

    name: str
    row: Row
    behind: float
    ci: tuple[float, float]
    below: tuple[str, ...]

    @property
    def kind(self) -> str:
        """What it is: learned, a floor, or training-free, ours or published."""
        if "/" in self.name:
            return "learned"
        if self.name in FLOORS:
            return "floor"
        ours = about(pruner_class(self.name.partition("?")[0])).evidence == "ours"
        return "training-free, ours" if ours else PUBLISHED


@cache
def read_league(of: League = SCENES) -> list[Record]:
    """All records, by name of file."""
    return [read_record(path) for path in sorted(of.folder.glob("*.json"))]


def standings(records: Sequence[Record], keep: str) -> list[Place]:
    """Who was measured at a budget, the best first."""
    rows = {name: row for record in records for name in methods_of(record) if (row := _mean(record, name, keep))}
    answers, keys = join_answers(records), [(name, keep) for name in rows]
    resampled = answers.resample(keys)
    points, draws = resampled.retention()[:, -1], resampled.retention_draws()[:, -1]
    number = {name: at for at, name in enumerate(rows)}
    best = max((name for name in rows if "/" in name), key=lambda name: points[number[name]])

    def less(name: str, other: str) -> tuple[float, tuple[float, float]]:
        own, theirs = number[name], number[other]
        return float(points[theirs] - points[own]), interval(draws[theirs] - draws[own])

    places = []
    for name, row in rows.items():
        behind, ci = less(name, best)
        below = tuple(floor for floor in FLOORS if floor in rows and floor != name and less(name, floor)[1][0] > 0)
        places.append(Place(name, row, behind, ci, below))
    return sorted(places, key=lambda place: -place.row["retention"])


def beside_rivals(name: str) -> dict[str, Any]:
    """What a card can rest on: the record of a shipped pruner, with its rivals' rows and the differences to them.

    Rivals are those of every table, and methods without weights of the same stage, as far as they were measured at all
    the budgets of its record; over the same questions, so that differences are paired as if it had been one run.

    Args:
        name: of its folder in `checkpoints/`.

    Raises:
        PruneZooError: the league has no record of it.
    """
    records = {display_name(one): record for record in read_league() for one in methods_of(record)}
    if name not in records:
        raise PruneZooError(f"the league has no record of '{name}': `python -m trainers.upkeep.league {name}` makes it")
    own, budgets = records[name], budgets_of(records[name])
    (pruner,) = methods_of(own)
    free = [one for one in records if one in list_pruners()]  # and not what is shipped, or has other settings
    alike = [one for one in free if _stage(one) == _stage(pruner)]
    known = [rival for rival in dict.fromkeys((*RIVALS, *alike)) if rival in records]
    rivals = [rival for rival in known if budgets_of(records[rival]) == budgets]
    keys = [(method, keep) for method in (pruner, *rivals) for keep in budgets]
    resampled = join_answers([own, *(records[rival] for rival in rivals)]).resample(keys)
    rows = [row for rival in rivals for row in records[rival]["rows"] if row["pruner"] == rival]
    paired = paired_of(keys, resampled, [pruner])
    command = f"{own['command']}\npython -m trainers.cards {name} --league"
    return {**own, "rows": [*own["rows"], *rows], "paired": paired, "command": command}


@cache
def league(of: League = SCENES) -> dict[str, list[Place]]:
    """Who was measured at each budget."""
    return {keep: standings(read_league(of), keep) for keep in of.budgets}


def tables(of: League = SCENES) -> str:
    """A table for each budget."""
    first, lines = read_league(of)[0], []
    for keep, places in league(of).items():
        lines += [f"### {keep} of the image tokens", ""]
        lines += ["| | method | kind | stage | tokens | operations | retention, % | behind the best learned, points |"]
        lines += ["|---:|---|---|---|---:|---:|---:|---:|"]
        for rank, place in enumerate(places, 1):
            row, ci = place.row, place.ci
            behind = "–" if ci == (0, 0) else f"{_points(place.behind)} ({_points(ci[0])} to {_points(ci[1])})"
            cells = [rank, f"`{display_name(place.name)}`", place.kind, _stage(place.name), f"{row['tokens']:.1f}"]
            cells += [f"{row['flops']:.2f}", f"{percent(row['retention'])} ({span(row)})", behind]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    full = _mean(first, FULL, ALL_TOKENS)
    assert full is not None
    lines += [
        f"The first {first['n']:,} questions of the {first['split']} split of `{first['suite']}` with "
        f"`{first['vlm']}`; mean retention over {len(first['groups'])} groups of questions with 95 % bootstrap "
        "intervals, differences paired over the same questions. With all "
        f"{full['tokens']:.0f} tokens the model answers {100 * full['accuracy']:.1f} %. Tokens are measured, mean over "
        "the decoder's layers. Operations are those of tower and language model, as a share of those with all tokens; "
        "what a method computes itself is left out. A method that is missing at a budget cannot be brought that low: "
        "the layers in front of it read everything.",
        "",
    ]
    return "\n".join(lines)


def leaders() -> str:
    """The table of README: the two best learned methods at 1/9 of the tokens, the two best others, and `random`."""
    places = league()[BUDGET]
    learned = [place.name for place in places if place.kind == "learned"]
    free = [place.name for place in places if place.kind.startswith(PUBLISHED)]
    lines = [f"| pruner | kind | {' | '.join(SCENES.budgets)} |", "|---|---|" + "---:|" * len(SCENES.budgets)]
    for name in (*learned[:2], *free[:2], "random"):
        own = {keep: place for keep, of in league().items() for place in of if place.name == name}
        kind = "baseline" if own[BUDGET].kind == "floor" else own[BUDGET].kind
        cells = [
            f"{percent(own[keep].row['retention'])} ({span(own[keep].row)})" if keep in own else "not possible"
            for keep in SCENES.budgets
        ]
        lines.append(f"| `{display_name(name)}` | {kind} | {' | '.join(cells)} |")
    first = read_league()[0]
    full, blind = _mean(first, FULL, ALL_TOKENS), _mean(first, NONE, NO_TOKENS)
    assert full is not None
    assert blind is not None
    lines += [
        "",
        f"Accuracy in % of the unpruned model's ([protocol](docs/protocol.md)), at shares of its "
        f"{full['tokens']:.0f} image tokens, with 95 % bootstrap interval: "
        f"`{first['vlm'].rpartition('/')[2]}` on {first['n']:,} held-out questions of "
        f"`{first['suite']}`, mean over {len(first['groups'])} kinds of questions. Unpruned it answers "
        f"{100 * full['accuracy']:.1f} % right, without image tokens {100 * blind['accuracy']:.1f} %. Shown: the best "
        f"two of {len(learned)} trained pruners and of {len(free)} training-free methods, and random choice "
        "([all](docs/league.md)).",
        "",
    ]
    return "\n".join(lines)


def floors() -> str:
    """Who is below random, uniform, pooling or a smaller picture."""
    lines = ["| budget | " + " | ".join(f"below `{floor}`" for floor in FLOORS) + " |", "|---|" + "---|" * len(FLOORS)]
    for keep, places in league().items():
        published = [place for place in places if place.kind == PUBLISHED]
        cells = []
        for floor in FLOORS:
            names = [f"`{place.name}`" for place in published if floor in place.below]
            cells.append(f"{len(names)} of {len(published)}" + (f": {', '.join(names)}" if names else ""))
        lines.append(f"| {keep} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def groups() -> str:
    """What each group of questions keeps, mean over the methods without weights, the floors left out."""
    records = read_league()
    names = records[0]["groups"]
    means = {}
    for keep, places in league().items():
        published = {place.name for place in places if place.kind == PUBLISHED}
        found = [
            row for record in records for row in record["rows"] if row["pruner"] in published and row["keep"] == keep
        ]
        means[keep] = {name: np.mean([row["retention"] for row in found if row["group"] == name]) for name in names}
    order = sorted(names, key=lambda name: means[SCENES.budgets[-1]][name])
    lines = ["| group of questions | " + " | ".join(SCENES.budgets) + " |", "|---|" + "---:|" * len(SCENES.budgets)]
    lines += [
        f"| {name} | " + " | ".join(f"{means[keep][name]:.1f}" for keep in SCENES.budgets) + " |" for name in order
    ]
    return "\n".join([*lines, ""])


def places_kept() -> str:
    """Where in the picture the tokens lie that each method keeps."""
    lines = ["| method | tokens | upper third | middle third | lower third |", "|---|---:|---:|---:|---:|"]
    found = [kept for record in read_league() for kept in record["rows_kept"]]
    thirds = [(kept, [sum(third) for third in np.array_split(kept["shares"], 3)]) for kept in found]
    for kept, shares in sorted(thirds, key=lambda pair: pair[1][0]):
        cells = " | ".join(f"{100 * share:.0f} %" for share in shares)
        lines.append(f"| `{display_name(kept['pruner'])}` | {kept['tokens']:.0f} | {cells} |")
    return "\n".join([*lines, ""])


def _points(value: float) -> str:
    """With a digit behind the point, and no sign in front of 0.0."""
    return f"{round(value, 1) + 0.0:.1f}"


def _stage(name: str) -> str:
    """Of a method, or of one that is shipped."""
    method = name.partition("?")[0]
    return stage_of(pruner_class(methods_shipped()[display_name(method)] if "/" in method else method))


def _mean(record: Record, name: str, keep: str) -> Row | None:
    """The mean row of a method at a budget; None where it was not measured."""
    return next(iter(select(record, pruner=name, keep=keep, group=MEAN)), None)
