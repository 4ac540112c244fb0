"""The parts of README.md and of some pages of docs/ that are made from measured files.

They stand between `<!-- NAME: begin -->` and `<!-- NAME: end -->`:

    python -m trainers.upkeep.readme     write them anew

No number and no "yes" in them is typed: `models`, `support` and `methods` come from tests/families/*.json, which
`make support` writes, `stages` from the registry, `speed` from hub_cards/speed.json and `first token` from
hub_cards/first_token.json, which `make speed` writes, `gpu` from hub_cards/gpu/, of `make gpu`, `walk` from
hub_cards/walk.json, `gain`, `accuracy`, `zoo` and those of the league from the records beside the shipped modules, in
hub_cards/league/, hub_cards/league_pages/ and hub_cards/measured/, `pages` from hub_cards/pages/.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prunezoo.core.errors import PruneZooError
from prunezoo.core.files import read_object
from trainers.benchmarking.gpu_table import GPUS, gpu_section, read_gpu
from trainers.benchmarking.measure import BARE
from trainers.benchmarking.tables import first_token_section, speed_brief, speed_section
from trainers.cards.zoo import markdown
from trainers.cli.errors import command
from trainers.evaluation import before_tower, league
from trainers.evaluation.record import mean_row
from trainers.evaluation.scores import ALL_TOKENS, FULL

from .documents import documents, sentence
from .methods import methods_section
from .pages import by_stage
from .support import support_brief, support_section
from .walk import walk_section

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
TIMED = ("divprune", "visionzip", "tome", "fastv", "ppm")
"""Methods that README's table of speed has, some of each stage and kind; docs/protocol.md has all."""
TRAINED, PLAIN = "checkpoints/ppm-tiny", "divprune"
"""The trained pruner and the method without weights whose gain README's first lines tell."""


def recorded_families() -> Any:
    """What works on which family, as the tests recorded it."""
    return _read(ROOT / "tests" / "families" / "support.json", "support")


def recorded_speed() -> Any:
    """What pruning saves in time."""
    return _read(ROOT / "hub_cards" / "speed.json", "speed")


def methods() -> str:
    """Which method goes with which family."""
    return methods_section(_read(ROOT / "tests" / "families" / "methods.json", "support"))


def gain() -> str:
    """What a trained pruner keeps and what pruning saves, in two sentences."""
    record, places = league.read_league()[0], league.league()[league.BUDGET]
    trained, plain = (next(place.row for place in places if place.name == name) for name in (TRAINED, PLAIN))
    tokens, (low, high) = mean_row(record, FULL, ALL_TOKENS)["tokens"], trained["ci"]
    speed = recorded_speed()
    fast = {row["part"]: row for row in speed["rows"] if row["pruner"] == PLAIN}
    bare = next(row for row in speed["rows"] if row["pruner"] == BARE)
    return (
        f"- **Accuracy:** with {trained['tokens']:.0f} of {tokens:.0f} image tokens, our test model `tiny-llava` keeps "
        f"{trained['retention']:.1f} % of its accuracy under the trained pruner PPM (95 % interval {low:.1f} to "
        f"{high:.1f}, {record['n']:,} questions), and {plain['retention']:.1f} % under DivPrune, which needs no "
        f"training. {sentence()}\n"
        f"- **Speed:** with {fast['prefill']['tokens']:.0f} of {bare['tokens']:.0f} image tokens, a LLaVA of 120 M "
        f"parameters reads its prompt {fast['prefill']['speedup']:.1f} times as fast and answers "
        f"{fast['end_to_end']['speedup']:.1f} times as fast ({speed['device']}, DivPrune).\n"
    )


def first_token() -> str:
    """The time to the first token under the stages, at Qwen-VL's proportions."""
    return first_token_section(_read(ROOT / "hub_cards" / "first_token.json", "speed"))


def gpu() -> str:
    """What was measured on GPUs, one table for each; a sentence where there is none yet."""
    records = [read_gpu(path) for path in sorted(GPUS.glob("*.json"))]
    return "\n".join(map(gpu_section, records)) or "No GPU has been measured yet.\n"


def walked() -> str:
    """How long a newcomer's way through README takes."""
    how = "`python -m trainers.upkeep.walk --json hub_cards/walk.json` writes it"
    return walk_section(read_object(ROOT / "hub_cards" / "walk.json", what="a record", remedy=how))


PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    README: {
        "gain": gain,
        "models": lambda: support_brief(recorded_families()),
        "stages": by_stage,
        "accuracy": league.leaders,
        "speed": lambda: speed_brief(recorded_speed(), TIMED),
    },
    ROOT / "docs" / "quick_start.md": {"walk": walked},
    ROOT / "docs" / "choose.md": {"zoo": markdown},
    ROOT / "docs" / "families.md": {"support": lambda: support_section(recorded_families()), "methods": methods},
    ROOT / "docs" / "protocol.md": {"speed": lambda: speed_section(recorded_speed()), "gpu": gpu},
    ROOT / "docs" / "pages.md": {"pages": documents, "league": lambda: league.tables(league.PAGES)},
    ROOT / "docs" / "input.md": {"first token": first_token, "before tower": before_tower.table},
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
