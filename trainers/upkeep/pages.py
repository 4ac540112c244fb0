"""The pages of docs/methods/, one a method: what its file says, its options, where it runs, what was measured.

    python -m trainers.upkeep.pages     write them anew

Nothing in them is typed: they are made from the docstrings and configs of `modules/prunezoo/`, from
`tests/families/methods.json` and from the records of `hub_cards/league/`.
"""

import argparse
from collections.abc import Sequence

from prunezoo.core.contract import Pruner
from prunezoo.core.files import read_object
from prunezoo.core.registry import list_pruners, pruner_class
from trainers.cards.about import about, docstring, options, stage_of
from trainers.cards.axes import NOTE, axes, by_default
from trainers.cards.axes import markdown as axes_table
from trainers.cards.markdown import bibtex, fence
from trainers.cli.errors import command, whole_file
from trainers.cli.names import ROOT, has_weights, methods_shipped
from trainers.evaluation.league import SCENES, Place, league
from trainers.evaluation.scores import FULL, NONE
from trainers.evaluation.summary import read_zoo, summary_section
from trainers.evaluation.tables import display_name, percent, span

from .methods import OUTCOMES
from .support import family_title

FOLDER = ROOT / "docs" / "methods"
INDEX = "README.md"
AXES = "Axes"
"""Title of what the columns of the tables of axes mean, in the index."""
STAGES = {
    "input": "in front of the vision tower",
    "vision": "inside the vision tower",
    "prompt": "between projector and language model",
    "layer": "between decoder layers",
    "several": "at several of these",
}
"""Where a stage acts."""
MADE = "<!-- made by `python -m trainers.upkeep.pages`; edit the method's file instead -->"


def page(method: str) -> str:
    """The page of a method."""
    cls = pruner_class(method)
    said = about(cls)
    kind = "learned" if has_weights(method) else "training-free"
    parts = [
        f"{MADE}\n# `{method}`",
        f"{kind}, {_stage(method)}; evidence: {said.evidence}; file: [`{_file(cls)}`](../../{_file(cls)})",
        docstring(cls),
        "## Axes",
        axes_table(axes(method)),
        f"What they mean: [{AXES}]({INDEX}#{AXES.lower()}).",
        "## What it reads",
        _reads(cls),
        "## Options",
        _options(cls),
        "## Families",
        _families(method),
        "## Measured",
        _measured(method),
    ]
    if said.references:
        parts += ["## Cite", fence(bibtex(said.references), "bibtex")]
    return "\n\n".join(parts) + "\n"


def _stage(method: str) -> str:
    stage = stage_of(pruner_class(method))
    return "several stages" if stage == "several" else f"{stage} stage"


def _file(cls: type[Pruner]) -> str:
    return f"modules/{cls.__module__.replace('.', '/')}.py"


def _reads(cls: type[Pruner]) -> str:
    """Signals, with the settings of its defaults."""
    pruner = by_default(cls)
    if pruner is None:
        return "What its parts read."
    signals = ", ".join(f"`{name}`" for name in pruner.needs) or "no signal"
    kept = (
        "It keeps exactly as many tokens as it is asked for." if cls.exact else "It decides itself how many it keeps."
    )
    where = "[signals](../../modules/prunezoo/core/signals.py)"
    return f"Visual tokens, and with its default options of {where}: {signals}. {kept}"


def _options(cls: type[Pruner]) -> str:
    found = options(cls)
    if not found:
        return "None."
    rows = [f"| `{one.name}` | `{one.default}` | {one.text.replace('|', '&#124;')} |" for one in found]
    return "\n".join(
        [
            "| option | default | what it is |",
            "|---|---|---|",
            *rows,
            "",
            f"As `attach` and all commands take them: `{cls.name}?{found[0].name}=…`.",
        ]
    )


def _families(method: str) -> str:
    outcomes = read_object(OUTCOMES, "outcomes", what="a record", remedy="`make support` writes it")["outcomes"]
    own = {name.split("-")[0]: outcome for name, outcome in outcomes.items() if name.split("-")[1] == method}
    if not own:
        return "Not in the matrix of [families](../families.md)."
    works = ", ".join(family_title(name) for name, outcome in own.items() if outcome == "yes")
    refused: dict[str, list[str]] = {}
    for name, outcome in own.items():
        if outcome != "yes":
            refused.setdefault(outcome.removeprefix("refused: "), []).append(family_title(name))
    lines = [f"Runs on: {works or 'none'}."]
    lines += [f"- Not on {', '.join(names)}: {why}" for why, names in refused.items()]
    return "\n".join(lines) + "\n\nFrom the [matrix](../families.md), with tiny models of each family."


def _measured(method: str) -> str:
    """Its rows of the league, with those of its other settings and of what is shipped of it."""
    shipped = [folder for folder, of in methods_shipped().items() if of == method]
    found: dict[str, dict[str, Place]] = {}
    for keep, places in league().items():
        for place in places:
            if place.name.partition("?")[0] == method or place.name.rpartition("/")[2] in shipped:
                found.setdefault(place.name, {})[keep] = place
    if not found:
        return "Not in the [league](../league.md)."
    lines = [f"| | {' | '.join(SCENES.budgets)} |", "|---|" + "---:|" * len(SCENES.budgets)]
    for name, own in found.items():
        cells = [_cell(own.get(keep)) for keep in SCENES.budgets]
        lines.append(f"| `{display_name(name)}` | {' | '.join(cells)} |")
    said = "Mean retention in % at equal measured tokens; [the league](../league.md) has all methods."
    return "\n".join([*lines, "", said])


def _cell(place: Place | None) -> str:
    return f"{percent(place.row['retention'])} ({span(place.row)})" if place else "–"


def by_stage() -> str:
    """The list of README: how many methods act at each stage, with links to them."""
    lines = []
    for stage, where in STAGES.items():
        own = [name for name in _methods(stage) if name not in (FULL, NONE)]
        learned = sum(map(has_weights, own))
        link = f"docs/methods/{INDEX}#{_title(stage).lower().replace(' ', '-')}"
        lines.append(f"- [**{_title(stage)}**]({link}), {where}: {learned} learned, {len(own) - learned} training-free")
    return "\n".join([*lines, ""])


def _methods(stage: str) -> list[str]:
    """The methods of a stage, the learned ones first."""
    own = [name for name in list_pruners() if stage_of(pruner_class(name)) == stage]
    return sorted(own, key=lambda name: (not has_weights(name), name))


def _title(stage: str) -> str:
    return "Several stages" if stage == "several" else f"{stage.capitalize()} stage"


def index() -> str:
    """The list of all pages by stage, and what was measured."""
    lines = [MADE, "# Methods", ""]
    for stage, where in STAGES.items():
        lines += [f"## {_title(stage)}", "", f"{where.capitalize()}.", ""]
        lines += ["| method | kind | what it does | arXiv |", "|---|---|---|---|"]
        for name in _methods(stage):
            said, kind = about(pruner_class(name)), "learned" if has_weights(name) else "training-free"
            paper = said.papers[0] if said.papers and said.evidence != "ours" else "–"
            does = said.title.partition(": ")[2] or said.title
            lines.append(f"| [`{name}`]({name}.md) | {kind} | {does} | {paper} |")
        lines.append("")
    lines += [f"## {AXES}", "", NOTE, ""]
    lines += ["## Accuracy", "", summary_section(read_zoo())]
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """All pages, by name of file."""
    return {INDEX: index(), **{f"{name}.md": page(name) for name in list_pruners()}}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write them anew; pages of methods that are no more go."""
    p = argparse.ArgumentParser(prog="python -m trainers.upkeep.pages", description="Write docs/methods/ anew.")
    p.parse_args(argv)
    made = pages()
    for path in FOLDER.glob("*.md"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        with whole_file(FOLDER / name) as scratch:
            scratch.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
