"""The parts of README.md that are made from measured files, between `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

    python -m trainers.readme     write them anew

No number and no "yes" in them is typed: `support` comes from tests/support.json, which `make support` writes, and
`speed` from hub_cards/speed.json, which `make speed` writes.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modules.core.errors import PruneZooError

from .benchmarking.tables import speed_section
from .errors import command
from .support import support_section

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SECTIONS: dict[str, tuple[Path, Callable[[Mapping[str, Any]], str]]] = {
    "support": (ROOT / "tests" / "support.json", support_section),
    "speed": (ROOT / "hub_cards" / "speed.json", speed_section),
}
"""By name: the file that a section is made from, and what makes it."""


def rendered(text: str) -> str:
    """A README with all its sections made anew.

    Raises:
        PruneZooError: a section has no place in it, or its file is not there.
    """
    for name, (path, render) in SECTIONS.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        if begin not in text or end not in text:
            raise PruneZooError(f"README.md: no place for '{name}': write '{begin.strip()}' and '{end}' there")
        try:
            section = render(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise PruneZooError(f"{path.name}: {error.strerror}; `make {name}` writes it") from None
        before, rest = text.split(begin, 1)
        text = before + begin + section + rest[rest.index(end) :]
    return text


@command
def main() -> int:
    """Write README.md anew."""
    README.write_text(rendered(README.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
