"""What the commands write on a terminal: every text letter by letter, whoever wrote it.

Names of folders, questions and answers are other people's. `[/INST]` in a question is no markup, `:fire:` in a name no
picture, and an escape sequence in either must not reach the terminal.
"""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from .text import visible


class Terminal(Console):
    """A console that takes every text as it is: neither markup nor emoji codes mean anything, nor control characters.

    Styles are given by `style=` or in a `rich.text.Text`.

    Args:
        options: as `rich.console.Console` takes them.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is printed of anything, `rich.text.Text` among it."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))

    def render_str(self, text: str, **options: Any) -> Text:
        """Text of a string; all strings that are printed, and those in tables and rules, come through here."""
        return super().render_str(visible(text), **options)


class Description(ProgressColumn):
    """What a task is called."""

    def render(self, task: Task) -> Text:
        """Its description."""
        return Text(visible(task.description))


def progress_bar(console: Console, unit: str) -> Progress:
    """A bar that says how many of how many, of what, and how long it takes; tasks may be called anything."""
    columns = (Description(), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)
