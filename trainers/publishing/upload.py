"""Bring a repository of the Hub to the content of a package: in one commit, which gets the next tag (`v1`, `v2`, …)."""

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from prunezoo.core.errors import PruneZooError
from prunezoo.core.hub import CONFIG_FILE, read_method
from prunezoo.core.source import Source
from trainers.cards.parts import CARD_FILE
from trainers.cli.errors import one_line

from .package import Package

HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])
"""What the Hub client's own errors descend from: httpx's or, in later versions, httpx2's."""
TRIES, PAUSE = 3, 1.0
"""How often it is tried where the Hub fails to serve, and the seconds before the second time; they double."""

R = TypeVar("R")


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
