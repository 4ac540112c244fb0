"""One picture and one question under several methods: what `trainers.show` prints, draws and serves."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prunezoo.core.errors import PruneZooError
from prunezoo.core.near import near
from trainers.data.pictures import BrokenImage, open_picture
from trainers.data.suite import Item, list_suites, load_suite

from .budgets import parse_budgets
from .examples import Example, answer_of, show_examples
from .measure import of_pruner, why_not
from .methods import Method
from .tables import display_name


def read_item(picture: str, question: str | None) -> Item:
    """A picture and a question about it.

    Args:
        picture: a file, or `SUITE:NUMBER` for an item of a suite's test split, which brings its own question.
        question: what to ask; None: the item's own.

    Raises:
        PruneZooError: no picture, or a file without a question.
    """
    suite, colon, number = picture.partition(":")
    if colon and suite in list_suites():
        if not number.isdigit():
            raise PruneZooError(f"{picture}: an item of a suite is written {suite}:3")
        items = load_suite(suite, "test")
        if int(number) >= len(items):
            raise PruneZooError(f"{picture}: the suite has items 0 to {len(items) - 1}")
        item = items[int(number)]
        return item if question is None else replace(item, turns=((question, ""),), relevant=None)
    if question is None and number.isdigit():
        raise PruneZooError(f"{picture}: no suite is called '{suite}'{near(suite, list_suites())}")
    if question is None:
        raise PruneZooError(f'{picture}: what is the question? python -m trainers.show {picture} "what is it?"')
    if not Path(picture).exists():
        raise PruneZooError(f"{picture}: no such file; an item of a suite is written scenes:3")
    try:
        return Item(picture, open_picture(picture), ((question, ""),), "")
    except BrokenImage as error:
        raise PruneZooError(f"{picture}: not a picture that can be read ({error})") from None


def look(vlm: Any, processor: Any, item: Item, methods: Sequence[Method], keeps: Sequence[str]) -> Example:
    """What each method keeps of a picture at each budget, and the answers, judged by the full model's if by no other.

    Raises:
        PruneZooError: a budget that is none, or a model or pruner that does not go with the other.
    """
    if not item.answer:
        item = replace(item, turns=(*item.turns[:-1], (item.question, answer_of(vlm, processor, item))))
    budgets = parse_budgets(keeps)
    for method in methods:
        why = why_not(vlm, processor, item, method, budgets)
        if why:
            raise PruneZooError(of_pruner(method.name, why))
    return show_examples(vlm, processor, [item], methods, budgets)[0]


def print_example(example: Example, console: Console) -> None:
    """Print the answers."""
    tokens = example.grid[0] * example.grid[1]
    for asked, said in example.item.turns[:-1]:
        console.print(f"{asked} {said}", style="dim", highlight=False)
    console.print(example.item.question, style="bold", highlight=False)
    table = Table("pruner", "keep", "tokens", "answer")
    table.add_row("all tokens", "", str(tokens), example.answer)
    for shown in example.shown:
        answer = Text(shown.answer, style="green" if shown.right else "red")
        table.add_row(display_name(shown.pruner), shown.keep, str(len(shown.kept)), answer)
    console.print(table)
