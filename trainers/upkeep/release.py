"""What must hold before a version is tagged: `make release-check`. `--notes` prints what CHANGELOG.md says of it.

One version everywhere, a dated section of the changelog, a clean working tree, a tag that is not taken, tables that are
what was measured, and shipped pruners that could be published as they are.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

from packaging.version import InvalidVersion, Version

from prunezoo.core.bounds import MOST_JSON_BYTES, read_bytes
from prunezoo.core.errors import PruneZooError
from trainers.cli.errors import command
from trainers.cli.names import CHECKPOINTS, ROOT, methods_shipped
from trainers.cli.recipes import load_yaml
from trainers.publishing.package import check
from trainers.upkeep.readme import PAGES, rendered


def version_of(root: Path) -> str:
    """The version of pyproject.toml, which CITATION.cff must have too.

    Raises:
        PruneZooError: it is none, or they differ.
    """
    version = tomllib.loads(text_of(root / "pyproject.toml"))["project"]["version"]
    try:
        Version(version)
    except InvalidVersion:
        raise PruneZooError(f"pyproject.toml: version '{version}' is none, see PEP 440; write 1.2.3") from None
    cited = str(load_yaml(text_of(root / "CITATION.cff")).get("version"))
    if cited != version:
        raise PruneZooError(f"CITATION.cff: version is {cited}, that of pyproject.toml {version}; make them one")
    return version


def text_of(path: Path) -> str:
    """The text of a file of the repository."""
    return read_bytes(path, MOST_JSON_BYTES).decode()


def notes_of(root: Path, version: str) -> str:
    """What CHANGELOG.md says of a version, below its heading ``## [0.1.0] - 2026-01-31``.

    Raises:
        PruneZooError: it says nothing of it, or not when it was.
    """
    found = re.search(
        rf"^## \[{re.escape(version)}\](.*?)\n(.*?)(?=^## \[|\Z)", text_of(root / "CHANGELOG.md"), re.S | re.M
    )
    if not found or not found[2].strip():
        raise PruneZooError(f"CHANGELOG.md: nothing under '## [{version}]'; give what is under [Unreleased] that name")
    if not re.fullmatch(r" - \d{4}-\d\d-\d\d", found[1].rstrip()):
        raise PruneZooError(f"CHANGELOG.md: write '## [{version}] - YEAR-MONTH-DAY'")
    return found[2].strip() + "\n"


def git(root: Path, *words: str) -> str:
    """What git says."""
    ran = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)  # noqa: S603, S607
    if ran.returncode:
        raise PruneZooError(f"git {words[0]}: {' '.join(ran.stderr.split())}; run it in a clone")
    return ran.stdout.strip()


def check_git(root: Path, version: str) -> None:
    """Refuse a working tree with changes, and a tag that stands elsewhere.

    Raises:
        PruneZooError: there are changes, or such a tag.
    """
    if changed := git(root, "status", "--porcelain").splitlines():
        raise PruneZooError(f"{len(changed)} files are not committed, {changed[0].split()[-1]} among them; commit them")
    tag = f"v{version}"
    if tag in git(root, "tag", "--list", tag).split() and git(root, "rev-parse", f"{tag}^{{commit}}") != git(
        root, "rev-parse", "HEAD"
    ):
        raise PruneZooError(f"tag {tag} stands at another commit; raise the version in pyproject.toml")


def check_tables() -> None:
    """Refuse pages whose tables are not those of the records.

    Raises:
        PruneZooError: names the page.
    """
    for page in PAGES:
        text = page.read_text("utf-8")
        if rendered(text, page) != text:
            raise PruneZooError(f"{page.name}: other tables than were measured; run `python -m trainers.upkeep.readme`")


def check_shipped() -> None:
    """Refuse shipped pruners and tokenizers that could not be published as they are.

    Raises:
        PruneZooError: names the folder.
    """
    for name in methods_shipped():
        check(CHECKPOINTS / name, f"prunezoo/{name}")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Check everything, and print a line for each that holds; or print the notes."""
    p = argparse.ArgumentParser(prog="python -m trainers.upkeep.release", description="Check what a release needs.")
    p.add_argument("--notes", action="store_true", help="only print what CHANGELOG.md says of this version")
    args = p.parse_args(argv)
    version = version_of(ROOT)
    notes = notes_of(ROOT, version)
    if args.notes:
        print(notes, end="")
        return 0
    print(f"version {version}: one everywhere, and in CHANGELOG.md")
    checks: dict[str, Callable[[], None]] = {
        "working tree and tag": lambda: check_git(ROOT, version),
        "tables": check_tables,
        "shipped pruners": check_shipped,
    }
    for what, holds in checks.items():
        holds()
        print(f"{what}: right")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
