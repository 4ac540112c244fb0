"""Publish a pruner or tokenizer on the Hugging Face Hub: `python -m trainers.publish CHECKPOINT_DIR ORG/NAME`.

Only what loads strictly and was measured with these very weights is uploaded, with its card rendered anew, and only the
files that belong to it: in one commit, which gets the next tag (`v1`, `v2`, …). The same content is not uploaded twice.
"""

import argparse
import hashlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from rich.table import Table

from prunezoo.core.errors import PruneZooError
from prunezoo.core.hub import CONFIG_FILE, Pretrained, file_names, read_method
from prunezoo.core.registry import load_pruner
from prunezoo.core.source import Source
from prunezoo.tokenizers.one_d_piece import OneDPiece
from trainers.cards.cards import render_card
from trainers.cards.parts import (
    CARD_FILE,
    METRICS_FILE,
    PICTURE_FILE,
    POLICY_FILE,
    SPEED_FILE,
    STOP_FIGURE,
    STOP_FILE,
    weights_digest,
)
from trainers.cli.errors import command, one_line
from trainers.cli.names import find_pruner
from trainers.compression import card as tokenizer_card
from trainers.evaluation.record import read_record
from trainers.training.run_record import RUN_FILE

HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])
"""What the Hub client's own errors descend from: httpx's or, in later versions, httpx2's."""
TRIES, PAUSE = 3, 1.0
"""How often it is tried where the Hub fails to serve, and the seconds before the second time; they double."""

R = TypeVar("R")


@dataclass(frozen=True)
class Kind:
    """How one kind of checkpoint is loaded, and what its card rests on.

    Attributes:
        load: it, strictly, from its folder.
        read: the record `metrics.json`.
        measured: SHA-256 of the weights that a record measured.
        render: the card of a folder, by its record and Hub id.
        required: files that every card shows or rests on.
        optional: those that some do.
        how: the command that writes them, into `{folder}`.
    """

    load: Callable[[Path], Pretrained]
    read: Callable[[Path], dict[str, Any]]
    measured: Callable[[Mapping[str, Any]], set[str]]
    render: Callable[[Path, Mapping[str, Any], str], ModelCard]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    how: str


PRUNER = Kind(
    load_pruner,
    read_record,
    lambda metrics: set(metrics["weights"].values()),
    render_card,
    (METRICS_FILE,),
    (RUN_FILE, SPEED_FILE, PICTURE_FILE, STOP_FILE, STOP_FIGURE, POLICY_FILE),
    "python -m trainers.evaluate … --card {folder}",
)
TOKENIZER = Kind(
    OneDPiece.from_pretrained,
    tokenizer_card.read_json,
    tokenizer_card.measured_weights,
    tokenizer_card.render_card,
    (METRICS_FILE, tokenizer_card.CURVES, tokenizer_card.PICTURES),
    (RUN_FILE,),
    "python -m trainers.codec card {folder} …",
)


@dataclass(frozen=True)
class Package:
    """What would be uploaded.

    Attributes:
        folder: the checkpoint folder.
        repo: ORG/NAME.
        files: contents of the files, by their names in the repository.
        module: the pruner or tokenizer, loaded strictly.
        card: the metadata of its card.
    """

    folder: Path
    repo: str
    files: dict[str, bytes]
    module: Pretrained
    card: ModelCardData


@dataclass(frozen=True)
class Published:
    """Where it is.

    Attributes:
        address: of the repository.
        tag: the version.
        is_new: it was uploaded now; False: it was there already.
    """

    address: str
    tag: str
    is_new: bool


def check(folder: Path, repo: str) -> Package:
    """Make sure that a folder may be published, and render its card.

    Raises:
        PruneZooError: a bad name, a missing file, weights that do not load strictly, or not those that were measured.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PruneZooError(f"{repo!r} is no Hub id: {one_line(error)}") from None
    if repo.count("/") != 1:
        raise PruneZooError(f"{repo!r} is no Hub id: write ORG/NAME")
    if not folder.is_dir():
        raise PruneZooError(f"{folder}: no such folder")
    kind = TOKENIZER if read_method(Source(folder)) == OneDPiece.name else PRUNER
    module = kind.load(folder)
    how = f"write it with `{kind.how.format(folder=folder)}`"
    for name in kind.required:
        if not (folder / name).is_file():
            raise PruneZooError(f"{folder}: {name} is missing; {how}")
    metrics = kind.read(folder / METRICS_FILE)
    try:
        if kind.measured(metrics) != {weights_digest(folder)}:
            raise PruneZooError(f"{folder / METRICS_FILE}: measured with other weights than lie there now; {how}")
        card = kind.render(folder, metrics, repo)
    except PruneZooError:
        raise
    except Exception as error:  # whatever a record that is not whole makes the template stumble over
        why = f"{type(error).__name__}: {one_line(error)}"
        raise PruneZooError(f"{folder}: its records are not what a card rests on ({why}); {how}") from error
    names = (*file_names(module), *kind.required, *(name for name in kind.optional if (folder / name).is_file()))
    files = {name: (folder / name).read_bytes() for name in names} | {CARD_FILE: str(card).encode()}
    assert isinstance(card.data, ModelCardData)
    return Package(folder, repo, files, module, card.data)


def show(package: Package, console: Console) -> None:
    """Print what is uploaded and what is left."""
    table = Table(title=f"{package.folder} → {package.repo}", title_justify="left")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    for name, content in package.files.items():
        table.add_row(name, f"{len(content):,}")
    console.print(table)
    parameters = sum(p.numel() for p in package.module.parameters())
    results = package.card.eval_results or []
    console.print(
        f"method {package.module.name}, {parameters:,} parameters; the card has {len(results)} measured results"
    )
    uploaded = {Path(name).parts[0] for name in package.files}
    left = sorted(p.name for p in package.folder.iterdir() if p.name not in uploaded)
    if left:
        console.print(f"left here: {', '.join(left)}")


def upload(package: Package, private: bool) -> Published:
    """Bring the repository to this content, in one commit, and tag it; nothing where both are so already.

    Raises:
        PruneZooError: the Hub cannot be reached, or refuses, or the name holds something else.
    """
    api = HfApi(library_name="prunezoo")
    try:
        # all of it, from looking at what is there: a commit may have arrived though its answer did not
        return patiently(lambda: _upload(api, package, private))
    except LocalTokenNotFoundError:
        raise PruneZooError("no Hub token: run `hf auth login`, or set HF_TOKEN") from None
    except OfflineModeIsEnabled:
        raise PruneZooError("HF_HUB_OFFLINE is set: unset it to publish") from None
    except PruneZooError:
        raise
    except (HTTP_ERROR, RuntimeError, ValueError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = {401: "; check the token: `hf auth login`, or HF_TOKEN", 403: "; is the organisation yours?"}
        why = one_line(
            cast(Exception, error.__cause__) if isinstance(error, RuntimeError) and error.__cause__ else error
        )
        raise PruneZooError(f"{package.repo}: not uploaded; {why}{remedy.get(status or 0, '')}") from None


def _upload(api: HfApi, package: Package, private: bool) -> Published:
    repo = package.repo
    try:
        info = api.model_info(repo, files_metadata=True)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=private, exist_ok=True)
        info = api.model_info(repo, files_metadata=True)
    refuse_another(api, info, package)
    changed = changed_files(info, package.files)
    head = info.sha
    if changed:
        # on top of what was looked at: somebody else's push in between is refused, not overwritten
        operations = [CommitOperationAdd(name, package.files[name]) for name in changed]
        message = f"Upload {package.module.name}"
        head = api.create_commit(repo, operations, commit_message=message, parent_commit=info.sha).oid
    refs = api.list_repo_refs(repo)
    tag = next((ref.name for ref in refs.tags if ref.target_commit == head), None)
    if tag is None:
        numbers = [int(ref.name[1:]) for ref in refs.tags if re.fullmatch(r"v\d+", ref.name)]
        tag = f"v{max(numbers, default=0) + 1}"
        api.create_tag(repo, tag=tag, revision=head)
    return Published(f"{api.endpoint}/{repo}", tag, bool(changed))


def refuse_another(api: HfApi, info: ModelInfo, package: Package) -> None:
    """Refuse a repository that holds anything but an earlier version of this method."""
    names = {file.rfilename for file in info.siblings or ()} - {".gitattributes", CARD_FILE}
    if not names:
        return
    try:
        method = read_method(Source(package.repo, info.sha, token=api.token)) if CONFIG_FILE in names else None
    except PruneZooError:
        method = None
    if method != package.module.name:
        held = f"the method '{method}'" if method else "something that is not prunezoo's"
        raise PruneZooError(f"{package.repo} is taken: it holds {held}; choose another name")


def changed_files(info: ModelInfo, files: dict[str, bytes]) -> list[str]:
    """Names of the files that the repository has not, or has otherwise, by their hashes."""
    there = {file.rfilename: file for file in info.siblings or ()}
    changed = []
    for name, content in files.items():
        remote = there.get(name)
        if remote is not None and remote.lfs is not None:
            is_same = remote.lfs.sha256 == hashlib.sha256(content).hexdigest()
        else:  # git's own hash, of which the Hub makes its blob ids
            git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
            is_same = remote is not None and remote.blob_id == git
        if not is_same:
            changed.append(name)
    return changed


def patiently(call: Callable[[], R]) -> R:
    """Call again where the Hub failed to serve (5xx) or the line broke, as its client does for some calls."""
    for attempt in range(TRIES):
        try:
            return call()
        except HTTP_ERROR as error:
            response = getattr(error, "response", None)
            if attempt == TRIES - 1 or (response is not None and response.status_code < 500):
                raise
            time.sleep(PAUSE * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Publish, or with --dry-run only say what would be published."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.publish", description="Publish a pruner or tokenizer on the Hub."
    )
    p.add_argument("folder", type=Path, help="its folder, or the short name of one that ships")
    p.add_argument("repo", help="ORG/NAME on the Hub")
    p.add_argument("--dry-run", action="store_true", help="check, and show what would be uploaded")
    p.add_argument("--private", action="store_true", help="make a new repository private")
    args = p.parse_args(argv)
    package = check(Path(find_pruner(str(args.folder))), args.repo)
    console = Console()
    show(package, console)
    if args.dry_run:
        console.print("dry run: nothing was uploaded")
    else:
        published = upload(package, args.private)
        word = "published" if published.is_new else "unchanged, nothing was uploaded"
        console.print(f"{word}: {published.address} (revision {published.tag})", soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
