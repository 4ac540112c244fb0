"""docs/families.md says what the matrix of methods and families recorded, and every cell was run."""

import json
import re
import subprocess
import sys

from trainers.upkeep.methods import CELLS, OUTCOMES, methods_section
from trainers.upkeep.readme import rendered
from trainers.upkeep.support import ROOT

PAGE = ROOT / "docs" / "families.md"


def test_the_page_is_what_was_recorded():
    text = PAGE.read_text(encoding="utf-8")
    assert rendered(text, PAGE) == text, "run `python -m trainers.upkeep.readme`"


def test_the_recorded_cells_are_those_of_the_tests():
    """Whatever method or family was added since must be run and recorded."""
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-k", "test_methods", *CELLS]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    recorded = json.loads(OUTCOMES.read_text(encoding="utf-8"))["outcomes"]
    assert set(recorded) == set(re.findall(r"test_methods\[(.*)\]", listed)), "run `make support`"


def test_every_outcome_reaches_the_table():
    outcomes = {
        "llava-random": "yes", "llava-tome": "yes", "gemma3-random": "yes",
        "gemma3-tome": "refused: pruner 'tome' cannot act inside: Gemma 3 pools behind it",
    }  # fmt: skip
    assert methods_section({"transformers": "5.9", "outcomes": outcomes}).splitlines() == [
        "| method | stage | LLaVA | Gemma 3 |",
        "|---|---|---|---|",
        "| `random` | prompt | yes | yes |",
        "| `tome` | vision | yes | no [1] |",
        "",
        "[1] cannot act inside: pools behind it  ",
        "",
        "With transformers 5.9.",
    ]
