"""What works on which family: run the matrix of families under one or more interpreters, and note the outcomes.

    python -m trainers.upkeep.support .venv-min/bin/python .venv/bin/python

Each interpreter has a release of transformers of its own. The outcomes go into tests/families/support.json, and from
there into README.md and docs/families.md.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from prunezoo.core.errors import PruneZooError
from prunezoo.host.families import FAMILIES
from trainers.cli.errors import command

ROOT = Path(__file__).parent.parent.parent
MATRIX = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "families").glob("test_families*.py"))
OUTCOMES = ROOT / "tests" / "families" / "support.json"
STAGES = {"input": "input stage", "vision": "vision stage", "prompt": "prompt stage", "layer": "layer stage"}


def run_matrix(python: str, files: Sequence[str] = MATRIX, test: str = "test_matrix") -> dict[str, Any]:
    """Run a matrix with one interpreter.

    Args:
        python: The interpreter.
        files: Of the tests.
        test: Whose cells record an outcome.

    Returns:
        `{"transformers": release, "outcomes": {"STAGE-FAMILY-CHECK": "yes" or "refused: why"}}`.

    Raises:
        PruneZooError: a check failed, or the interpreter has no pytest or transformers.
    """
    version = "from importlib.metadata import version; print(version('transformers'))"
    release = subprocess.run([python, "-c", version], capture_output=True, text=True, check=False)  # noqa: S603
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # conftest.py needs what training needs, which not every interpreter has
        options = ["-q", "--noconftest", "-k", test, "-o", "junit_family=xunit1", f"--junitxml={report}"]
        code = subprocess.run([python, "-m", "pytest", *options, *files], cwd=ROOT, check=False).returncode  # noqa: S603
        if code or release.returncode:
            raise PruneZooError(f"{python}: the matrix did not pass, so there is nothing to note; see above")
        cases = list(ElementTree.parse(report).iter("testcase"))  # noqa: S314 - pytest's own file
    outcomes = {}
    for case in cases:
        name = case.attrib["name"].removeprefix(f"{test}[").removesuffix("]")
        outcomes[name] = next(p.attrib["value"] for p in case.iter("property") if p.attrib["name"] == "outcome")
    return {"transformers": release.stdout.strip(), "outcomes": outcomes}


Cells = dict[tuple[str, str], dict[str, dict[str, str]]]
"""By family and stage, then release of transformers, then check: its outcome."""


def cells_of(record: Mapping[str, Any]) -> Cells:
    """The outcomes of :func:`run_matrix`, in order."""
    cells: Cells = {}
    for run in record["runs"]:
        for name, outcome in run["outcomes"].items():
            stage, family, check = name.split("-")
            cells.setdefault((family, stage), {}).setdefault(run["transformers"], {})[check] = outcome
    return cells


def support_section(record: Mapping[str, Any]) -> str:
    """The whole table in Markdown: families down, stages across; below it why something is refused, with its remedy.

    Args:
        record: What :func:`run_matrix` gave, by release of transformers.
    """
    cells = cells_of(record)
    stages = [stage for stage in STAGES if any(stage == own for _, own in cells)]
    notes: dict[str, int] = {}
    lines = [f"| | {' | '.join(STAGES[stage] for stage in stages)} |", f"|---|{'---|' * len(stages)}"]
    every = [run["transformers"] for run in record["runs"]]
    for family in dict.fromkeys(family for family, _ in cells):
        title = family_title(family)
        row = [_cell(cells.get((family, stage), {}), title, notes, every) for stage in stages]
        lines.append(f"| {title} | {' | '.join(row)} |")
    checks = {name.split("-")[2] for run in record["runs"] for name in run["outcomes"]}
    lines += ["", *(f"[{number}] {note}  " for note, number in notes.items())]
    lines += ["", f"Up to {len(checks)} checks a cell, each with transformers {' and '.join(every)}.", ""]
    return "\n".join(lines)


def support_brief(record: Mapping[str, Any]) -> str:
    """The list of README: at which stages a family can be pruned at all, families that are alike in one line.

    Variants of a family, such as a LLaVA with a SigLIP tower, do not stand apart.
    """
    cells = cells_of(record)
    oldest, newest = (record["runs"][at]["transformers"] for at in (0, -1))
    groups: dict[tuple[str, ...], dict[str, None]] = {}  # names, by the stages that work
    for family in dict.fromkeys(family for family, _ in cells):
        own = {stage: cells.get((family, stage), {}) for stage in STAGES}
        works = tuple(stage for stage, runs in own.items() if _works(runs))
        old = {release: runs[oldest] for release, runs in own.items() if oldest in runs}
        young = bool(works) and not _works(old)
        groups.setdefault(works, {})[family_title(family).partition(" (")[0] + ("*" if young else "")] = None
    lines = [f"- {_stages(works)}: {', '.join(names)}" for works, names in groups.items()]
    tested = (
        f"- tested on tiny random models, with transformers {oldest} and {newest} (*: needs a newer one than {oldest})"
        "; clips, and why a stage is missing: [families](docs/families.md)"
    )
    return "\n".join([*lines, tested, ""])


def _stages(works: Sequence[str]) -> str:
    """Some of the stages, in words."""
    if len(works) == len(STAGES):
        return "**all stages**"
    return f"**{' and '.join(filter(None, [', '.join(works[:-1]), *works[-1:]]))} stage**" if works else "**none**"


def _works(runs: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether any check passed."""
    return any("yes" in outcomes.values() for outcomes in runs.values())


def _cell(runs: Mapping[str, Mapping[str, str]], title: str, notes: dict[str, int], every: Sequence[str]) -> str:
    """`yes`, with the numbers of the notes on what is refused; `no` where nothing works; a dash where nothing was run.

    Args:
        runs: By release of transformers, the outcome of each check.
        title: Of the family; left out of the notes, as is the pruner that a test used, so that families share them.
        notes: Their numbers; new ones are entered.
        every: The releases that others were run with.
    """
    if not runs:
        return "–"
    works = {release: "yes" in outcomes.values() for release, outcomes in runs.items()}
    marks: dict[str, None] = {}
    for release, outcomes in runs.items():
        checks: dict[str, list[str]] = {}  # by reason
        for check, outcome in outcomes.items():
            if outcome != "yes":
                reason = outcome.removeprefix("refused: ").replace(f"{title.split(' (')[0]} ", "")
                reason = re.sub(r"^pruner '\w+' ", "", reason)
                checks.setdefault(reason, []).append(check.replace("_", " "))
        for reason, names in checks.items():
            where = ", ".join(names) if works[release] else f"transformers {release}" if any(works.values()) else ""
            note = f"{where}: {reason}" if where else reason
            marks[f"[{notes.setdefault(note, len(notes) + 1)}]"] = None
    for release in every:
        if release not in runs:
            note = f"not with transformers {release}"
            marks[f"[{notes.setdefault(note, len(notes) + 1)}]"] = None
    return " ".join(["yes" if any(works.values()) else "no", *marks])


def family_title(name: str) -> str:
    """`qwen2_vl` as people write it; a variant in the tests, such as `llava_siglip`, is named after its family."""
    base = max((known for known in FAMILIES if name == known or name.startswith(f"{known}_")), key=len)
    rest = name.removeprefix(base).strip("_")
    return FAMILIES[base].title + (f" ({rest})" if rest else "")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.upkeep.support", description="Note what works on which family."
    )
    p.add_argument("python", nargs="*", default=[sys.executable], help="interpreters, the oldest transformers first")
    record = {"runs": [run_matrix(python) for python in p.parse_args(argv).python]}
    OUTCOMES.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
