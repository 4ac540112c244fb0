"""The parts of README.md and of some pages of docs/ that are made from measured files.

They stand between `<!-- NAME: begin -->` and `<!-- NAME: end -->`:

    python -m trainers.upkeep.readme     write them anew

No number and no "yes" in them is typed: `support` and `methods` come from tests/families/*.json, which `make support`
writes, `speed` from hub_cards/speed.json and `first token` from hub_cards/first_token.json, which `make speed` writes,
`measured`, `zoo` and those of the league from the records beside the shipped modules, in hub_cards/league/ and in
hub_cards/measured/.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prunezoo.core.errors import PruneZooError
from prunezoo.core.files import read_object
from trainers.benchmarking.tables import first_token_section, speed_section
from trainers.cards.zoo import markdown
from trainers.cli.errors import command
from trainers.evaluation import league
from trainers.evaluation.summary import read_zoo, summary_section

from .methods import methods_section
from .support import support_section

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
RIVALS = 10
"""Methods without weights that README's table has; docs/league.md has all."""
TIMED = ("uniform", "divprune", "visionzip", "tome", "fastv", "ppm", "m3")
"""Methods that README's table of speed has, some of each stage and kind; docs/protocol.md has all."""


def support(whole: bool = False) -> str:
    """What works on which family; in README in groups."""
    return support_section(_read(ROOT / "tests" / "families" / "support.json", "support"), whole)


def methods() -> str:
    """Which method goes with which family."""
    return methods_section(_read(ROOT / "tests" / "families" / "methods.json", "support"))


def measured() -> str:
    """Retention of the shipped modules and of their best rivals."""
    return summary_section(read_zoo(), RIVALS)


def speed(shown: Sequence[str] | None = None) -> str:
    """What pruning saves in time, by some methods or all."""
    return speed_section(_read(ROOT / "hub_cards" / "speed.json", "speed"), shown)


def first_token() -> str:
    """The time to the first token under the stages, at Qwen-VL's proportions."""
    return first_token_section(_read(ROOT / "hub_cards" / "first_token.json", "speed"))


SECTIONS: dict[str, Callable[[], str]] = {"support": support, "measured": measured, "speed": partial(speed, TIMED)}
"""What makes a section, by name."""


PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    README: SECTIONS,
    ROOT / "docs" / "choose.md": {"zoo": markdown},
    ROOT / "docs" / "families.md": {"support": partial(support, whole=True), "methods": methods},
    ROOT / "docs" / "protocol.md": {"speed": speed},
    ROOT / "docs" / "input.md": {"first token": first_token},
    ROOT / "docs" / "league.md": {
        "league": league.tables,
        "floors": league.floors,
        "groups": league.groups,
        "places": league.places_kept,
    },
}
"""The pages with such sections."""


def rendered(text: str, page: Path = README) -> str:
    """A page with all its sections made anew.

    Raises:
        PruneZooError: a section has no place in it, or what it is made from is not there.
    """
    for name, render in PAGES[page].items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        if begin not in text or end not in text:
            raise PruneZooError(f"{page.name}: no place for '{name}': write '{begin.strip()}' and '{end}' there")
        before, rest = text.split(begin, 1)
        text = before + begin + render() + rest[rest.index(end) :]
    return text


def _read(path: Path, target: str) -> Any:
    return read_object(path, what="a record", remedy=f"`make {target}` writes it")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write them anew."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.upkeep.readme",
        description="Write the tables of README.md and docs/ anew, from the records beside what is shipped.",
    )
    p.parse_args(argv)
    for page in PAGES:
        page.write_text(rendered(page.read_text(encoding="utf-8"), page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
