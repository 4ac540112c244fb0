"""The whole zoo as lines of a table: every method and every shipped pruner, with the results of the shipped records."""

from collections.abc import Sequence
from dataclasses import dataclass

from prunezoo.core.registry import list_pruners, load_pruner, pruner_class
from trainers.cli.names import CHECKPOINTS, has_weights, methods_shipped, trained_for
from trainers.evaluation.summary import Line, Zoo, footnotes, read_zoo
from trainers.evaluation.tables import percent
from trainers.planning.share import share_on

from .about import About, about, stage_of


@dataclass(frozen=True)
class Entry:
    """One line: a method, or a trained pruner of it.

    Attributes:
        name: what commands take.
        method: its registry name.
        kind: learned or training-free.
        stage: input, vision, prompt or layer.
        trained_for: the frozen model; empty for what needs no training, None for a learned method that is not shipped.
        line: what was measured of it; None: nothing.
        about: the method in words.
        work: of a trained pruner, see `planning.share.prefill_share`; None: it has none of its own that can be counted.
    """

    name: str
    method: str
    kind: str
    stage: str
    trained_for: str | None
    line: Line | None
    about: About
    work: float | None = None


def entries(zoo: Zoo) -> list[Entry]:
    """The whole zoo: what is learned first, the trained pruners under their own names."""
    shipped = methods_shipped()
    found = []
    for method in sorted(list_pruners(), key=lambda name: (not has_weights(name), name)):
        cls = pruner_class(method)
        stage = stage_of(cls)
        if not has_weights(method):
            names = [name for name in zoo.rivals if name.partition("?")[0] == method] or [method]
            lines = {name: zoo.rivals.get(name) for name in sorted(names)}
            found += [Entry(name, method, "training-free", stage, "", line, about(cls)) for name, line in lines.items()]
            continue
        folders = [folder for folder, of in shipped.items() if of == method]
        for folder in folders:
            model = trained_for(folder)
            work = share_on(load_pruner(CHECKPOINTS / folder), str(CHECKPOINTS / model))
            found.append(Entry(folder, method, "learned", stage, model, zoo.shipped.get(folder), about(cls), work))
        if not folders:
            found.append(Entry(method, method, "learned", stage, None, None, about(cls)))
    return found


def lines_of(zoo: Zoo, found: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table."""
    columns = zoo.columns()
    results_of = (f"{tokens} tokens" for tokens in columns.values())
    header = ["name", "kind", "stage", "trained for", "work", *results_of, "arXiv"]
    lines = []
    for entry in found:
        papers = "–" if entry.about.evidence == "ours" else entry.about.papers[0]
        trained = "not shipped" if entry.trained_for is None else entry.trained_for or "–"
        rows = [entry.line.at(tokens) if entry.line else None for tokens in columns.values()]
        results = [percent(row["retention"]) if row else "–" for row in rows]
        work = "–" if entry.work is None else f"{100 * entry.work:.1f} %"
        lines.append([entry.name, entry.kind, entry.stage, trained, work, *results, papers])
    return header, lines


def markdown() -> str:
    """The table of docs/choose.md."""
    zoo = read_zoo()
    header, lines = lines_of(zoo, entries(zoo))
    marks, notes = footnotes(line[0] for line in lines)
    rows = [f"| {' | '.join(header)} |", "|---|---|---|---|" + "---:|" * (len(header) - 5) + "---|"]
    rows += [f"| {' | '.join([f'`{line[0]}`{marks[line[0]]}', *line[1:]])} |" for line in lines]
    said = (
        f"Mean retention in % on `{zoo.record['suite']}`, {zoo.record['split']} split, with `{zoo.record['vlm']}`, at "
        "measured tokens, mean over the model's layers; how many questions, and the command, stand in each card, and "
        "of methods without weights in the records of `hub_cards/measured/`; a dash: not measured with so many tokens. "
        "Work: the pruner's own operations at 1/9, over those of the language model on all tokens; a dash: no "
        "weights, or part of its work is done by the model."
    )
    return "\n".join([*rows, "", *notes, said, ""])
