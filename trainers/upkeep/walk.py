"""The way of a newcomer, timed: every command of README.md that a machine without network and GPU can run, in order.

    python -m trainers.upkeep.walk --folder /tmp/walk     from nothing to a pruner that could be published

The library is installed into a bare environment, and the repository is cloned and set up, by the commands that README
has, with this clone as the address. Uncommitted changes are not walked.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prunezoo.core.errors import PruneZooError
from trainers.cli.errors import command
from trainers.cli.names import ROOT

ADDRESS = "https://ADDRESS-OF-THIS-REPOSITORY"
CLONE, BARE = "prunezoo", "bare"
"""The folders that are made: the clone, and the environment that has the library alone."""


@dataclass(frozen=True)
class Step:
    """One command of a page: the heading above it, its words or code, and whether it installs."""

    heading: str
    language: str
    text: str
    installs: bool


def steps_of(page: str) -> Iterator[Step]:
    """The commands of a page in order; Python comes with all Python above it, which it goes on from."""
    heading, code = "", ""
    for found in re.finditer(r"^## ([^\n]*)$|^```(bash|python) ?(\w*)\n(.*?)^```$", page, re.S | re.M):
        title, language, needs, text = found.groups()
        if title:
            heading = title
        elif language == "python" and not needs:
            code += text
            yield Step(heading, language, code, False)
        elif language == "bash" and needs in ("", "install"):
            for line in text.replace("\\\n", " ").splitlines():
                yield Step(heading, language, line, bool(needs))


def walk(page: str, folder: Path, address: str) -> Iterator[tuple[Step, float]]:
    """Run the steps of a page, each with its seconds.

    Args:
        page: its text.
        folder: an empty one, in which everything is made.
        address: what stands for :data:`ADDRESS`, such as file:///path/to/a/clone.

    Raises:
        PruneZooError: a step failed; its own message is above.
    """
    for step in steps_of(page):
        environment = {**os.environ, "PATH": f"{_programs(step, folder)}{os.pathsep}{os.environ['PATH']}"}
        environment.pop("PYTHONPATH", None)
        text, place = step.text.replace(ADDRESS, address), folder if step.installs else folder / CLONE
        words = ["bash", "-ec", text] if step.language == "bash" else ["python", "-c", text]
        begun = time.monotonic()
        code = subprocess.run(words, cwd=place, env=environment, check=False).returncode  # noqa: S603 - README's own
        if code:
            raise PruneZooError(f"README.md, {step.heading}: `{text.splitlines()[-1]}` ended with code {code}")
        yield step, time.monotonic() - begun


def _programs(step: Step, folder: Path) -> Path:
    """The environment that a step runs in: the bare one for pip, else the clone's."""
    return folder / (BARE if step.text.startswith("pip ") else f"{CLONE}/.venv") / "bin"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Walk, and print a line for each step."""
    p = argparse.ArgumentParser(prog="python -m trainers.upkeep.walk", description="Run all commands of README, timed.")
    p.add_argument("--folder", type=Path, help="an empty one to work in; by default a new one that goes afterwards")
    args = p.parse_args(argv)
    if args.folder is not None and args.folder.exists() and any(args.folder.iterdir()):
        raise PruneZooError(f"--folder {args.folder}: not empty; name another")
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.folder or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        venv.create(folder / BARE, with_pip=True)
        lines = []
        for step, seconds in walk((ROOT / "README.md").read_text(encoding="utf-8"), folder, f"file://{ROOT}"):
            shown = step.text if step.language == "bash" else f"Python, {len(step.text.splitlines())} lines"
            lines.append(f"{seconds:7.1f} s  {step.heading}: {shown}")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
