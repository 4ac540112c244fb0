"""Publish a trained pruner on the Hugging Face Hub: `python -m trainers.publish CHECKPOINT_DIR ORG/NAME [--dry-run]`.

Only what loads strictly and carries a measured card is uploaded, and only the files that belong to it.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from rich.table import Table

from modules.core.contract import Pruner
from modules.core.errors import PruneZooError
from modules.core.hub import file_names
from modules.core.registry import load_pruner

from .cards import CARD_FILE, METRICS_FILE, weights_digest
from .errors import command, one_line
from .evaluation.record import read_record
from .run_record import RUN_FILE

REQUIRED = (CARD_FILE, METRICS_FILE)
OPTIONAL = (RUN_FILE,)
HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])
"""What the Hub client's own errors descend from: httpx's or, in later versions, httpx2's."""
HOW = "write it with `python -m trainers.evaluate … --card {folder}`"


@dataclass(frozen=True)
class Package:
    """What would be uploaded.

    Attributes:
        folder: the checkpoint folder.
        repo: ORG/NAME.
        files: names of the files, relative to the folder.
        pruner: the pruner, loaded strictly.
        card: the metadata of its card.
    """

    folder: Path
    repo: str
    files: tuple[str, ...]
    pruner: Pruner
    card: ModelCardData


def check(folder: Path, repo: str) -> Package:
    """Make sure that a folder may be published.

    Raises:
        PruneZooError: a bad name, a missing file, weights that do not load strictly, or a card that is not measured, or
            not on these weights.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PruneZooError(f"{repo!r} is no Hub id: {one_line(error)}") from None
    if repo.count("/") != 1:
        raise PruneZooError(f"{repo!r} is no Hub id: write ORG/NAME")
    if not folder.is_dir():
        raise PruneZooError(f"{folder}: no such folder")
    pruner = load_pruner(folder)
    how = HOW.format(folder=folder)
    for name in REQUIRED:
        if not (folder / name).is_file():
            raise PruneZooError(f"{folder}: {name} is missing; {how}")
    try:
        card = ModelCard.load(folder / CARD_FILE).data
    except ValueError as error:
        raise PruneZooError(f"{folder / CARD_FILE}: not a model card ({one_line(error)}); {how}") from None
    assert isinstance(card, ModelCardData)
    if not card.eval_results or not card.license or card.library_name != "prunezoo":
        raise PruneZooError(f"{folder / CARD_FILE}: a card without results, licence or library name; {how}")
    if weights_digest(folder) not in read_record(folder / METRICS_FILE).get("weights", {}).values():
        raise PruneZooError(f"{folder / METRICS_FILE}: measured with other weights than lie there now; {how}")
    files = (*file_names(pruner), *REQUIRED, *(name for name in OPTIONAL if (folder / name).is_file()))
    return Package(folder, repo, files, pruner, card)


def show(package: Package, console: Console) -> None:
    """Print what is uploaded and what is left."""
    table = Table(title=f"{package.folder} → {package.repo}", title_justify="left")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    for name in package.files:
        table.add_row(name, f"{(package.folder / name).stat().st_size:,}")
    console.print(table)
    parameters = sum(p.numel() for p in package.pruner.parameters())
    results = package.card.eval_results or []
    console.print(
        f"method {package.pruner.name}, {parameters:,} parameters; the card has {len(results)} measured results"
    )
    uploaded = {Path(name).parts[0] for name in package.files}
    left = sorted(p.name for p in package.folder.iterdir() if p.name not in uploaded)
    if left:
        console.print(f"left here: {', '.join(left)}")


def upload(package: Package, private: bool) -> str:
    """Create the repository if need be, and upload in one commit.

    Returns:
        Where it is.

    Raises:
        PruneZooError: the Hub cannot be reached, or refuses.
    """
    api = HfApi(library_name="prunezoo")
    try:
        api.create_repo(package.repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=package.repo,
            folder_path=package.folder,
            allow_patterns=list(package.files),
            commit_message=f"Upload {package.pruner.name}",
        )
    except LocalTokenNotFoundError:
        raise PruneZooError("no Hub token: run `hf auth login`, or set HF_TOKEN") from None
    except OfflineModeIsEnabled:
        raise PruneZooError("HF_HUB_OFFLINE is set: unset it to publish") from None
    except (HTTP_ERROR, ValueError, OSError) as error:
        raise PruneZooError(f"{package.repo}: not uploaded; {one_line(error)}") from None
    return f"{api.endpoint}/{package.repo}"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Publish, or with --dry-run only say what would be published."""
    p = argparse.ArgumentParser(prog="python -m trainers.publish", description="Publish a pruner on the Hub.")
    p.add_argument("folder", type=Path, help="the pruner's folder")
    p.add_argument("repo", help="ORG/NAME on the Hub")
    p.add_argument("--dry-run", action="store_true", help="check, and show what would be uploaded")
    p.add_argument("--private", action="store_true", help="make a new repository private")
    args = p.parse_args(argv)
    package = check(args.folder, args.repo)
    console = Console()
    show(package, console)
    if args.dry_run:
        console.print("dry run: nothing was uploaded")
    else:
        console.print(f"published: {upload(package, args.private)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
