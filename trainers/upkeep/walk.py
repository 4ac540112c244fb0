"""The way of a newcomer, timed: every command of README.md that a machine without network and GPU can run, in order.

    python -m trainers.upkeep.walk --json hub_cards/walk.json     from nothing to a pruner that could be published

The library is installed into a bare environment, and the repository is cloned and set up, by the commands that README
has, with this clone as the address. Uncommitted changes are not walked. Which build of torch is downloaded is pip's
choice: `PIP_CONSTRAINT=FILE` in front of the command has a say. The times of docs/quick_start.md are made from the
record that is written.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prunezoo.core.errors import PruneZooError
from trainers.cli.errors import check_output, command, whole_file
from trainers.cli.names import ROOT
from trainers.cli.options import add_option

ADDRESS = "https://ADDRESS-OF-THIS-REPOSITORY"
CLONE, BARE = "prunezoo", "bare"
"""The folders that are made: the clone, and the environment that has the library alone."""
VERSION = "from importlib.metadata import version; print(version('torch'))"


@dataclass(frozen=True)
class Step:
    """One command of a page: the heading above it, its words or code, and whether it installs."""

    heading: str
    language: str
    text: str
    installs: bool

    @property
    def short(self) -> str:
        """What is run, without its options."""
        if self.language != "bash":
            return "the Python of README"
        parts = [part.split() for part in self.text.split(" && ")]
        return " && ".join(" ".join(words[: 3 if words[0] == "python" else 2]) for words in parts)


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


def record_of(steps: Sequence[tuple[Step, float]], torch: str, load: float) -> dict[str, Any]:
    """What was walked, and on what machine.

    Args:
        steps: each with its seconds.
        torch: the release and build that pip has installed.
        load: processes that wanted to run on the machine when the walk began, as `os.getloadavg` counts them.
    """
    return {
        "date": str(datetime.now(UTC).date()),
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch,
        "load": round(load, 1),
        "steps": [{"heading": s.heading, "run": s.short, "seconds": round(seconds, 1)} for s, seconds in steps],
    }


def walk_section(record: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    lines = ["| part of README | command | seconds |", "|---|---|---:|"]
    lines += [f"| {step['heading']} | `{step['run']}` | {step['seconds']:.1f} |" for step in record["steps"]]
    minutes = sum(step["seconds"] for step in record["steps"]) / 60
    said = (
        f"{minutes:.1f} minutes in all on a {record['machine']}, with Python {record['python']} and torch "
        f"{record['torch']}, downloads included, under a load of {record['load']} from other work at the start. "
        f"Measured {record['date']} by `python -m trainers.upkeep.walk --json hub_cards/walk.json`."
    )
    return "\n".join([*lines, "", said, ""])


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Walk, and print a line for each step."""
    p = argparse.ArgumentParser(prog="python -m trainers.upkeep.walk", description="Run all commands of README, timed.")
    p.add_argument("--folder", type=Path, help="an empty one to work in; by default a new one that goes afterwards")
    add_option(p, "json")
    args = p.parse_args(argv)
    if args.folder is not None and args.folder.exists() and any(args.folder.iterdir()):
        raise PruneZooError(f"--folder {args.folder}: not empty; name another")
    if args.json is not None:
        check_output("--json", args.json)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.folder or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        venv.create(folder / BARE, with_pip=True)
        done = list(walk((ROOT / "README.md").read_text(encoding="utf-8"), folder, f"file://{ROOT}"))
        torch = subprocess.check_output([folder / BARE / "bin" / "python", "-c", VERSION], text=True).strip()  # noqa: S603
    for step, seconds in done:
        print(f"{seconds:7.1f} s  {step.heading}: {step.short}")
    if args.json is not None:
        with whole_file(args.json) as scratch_file:
            scratch_file.write_text(json.dumps(record_of(done, torch, load), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
