"""Bring a repository of the Hub to some content: in one commit, which gets the next tag (`v1`, `v2`, …)."""

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar, cast

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id

from .base_model import BaseModel, public_name
from .errors import PruneZooError
from .source import Source

HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])
"""What the Hub client's own errors descend from: httpx's or, in later versions, httpx2's."""
TRIES, PAUSE = 3, 1.0
"""How often it is tried where the Hub fails to serve, and the seconds before the second time; they double."""
CARD_FILE = "README.md"
METRICS_FILE = "metrics.json"
"""What was measured, in the repository of a pruner that `trainers.publish` published."""

R = TypeVar("R")
Content = Callable[[ModelInfo], Mapping[str, bytes]]
"""The files to be there, by name, from what is there."""


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


def check_repo(repo: str) -> None:
    """Refuse what is no ``ORG/NAME``.

    Raises:
        PruneZooError: it is none.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PruneZooError(f"{repo!r} is no Hub id: {_one_line(error)}") from None
    if repo.count("/") != 1:
        raise PruneZooError(f"{repo!r} is no Hub id: write ORG/NAME")


def check_public(base_model: BaseModel | None, where: str) -> None:
    """Refuse a pruner that says of its model in which folder of a machine it lay.

    Raises:
        PruneZooError: it does; the message begins with ``where``.
    """
    if base_model and base_model.name != public_name(base_model.name):
        raise PruneZooError(
            f"{where}: base_model.name {base_model.name!r} is a folder of a machine; write "
            f"{public_name(base_model.name)!r}, or the model's Hub id"
        )


def upload(
    repo: str,
    content: Content,
    method: str,
    method_of: Callable[[Source], str],
    private: bool = False,
    token: str | None = None,
) -> Published:
    """Bring the repository to this content, in one commit, and tag it; nothing where both are so already.

    Args:
        repo: ORG/NAME; made where it is not there.
        content: the files.
        method: the method that they are of.
        method_of: reads the method of what the repository holds.
        private: make a new repository private.
        token: of the Hub; by default that of `hf auth login` or HF_TOKEN.

    Raises:
        PruneZooError: the Hub cannot be reached, or refuses, or the name holds something else.
    """
    api = HfApi(library_name="prunezoo", token=token)
    try:
        # all of it, from looking at what is there: a commit may have arrived though its answer did not
        return patiently(lambda: _upload(api, repo, content, method, method_of, private))
    except LocalTokenNotFoundError:
        raise PruneZooError("no Hub token: run `hf auth login`, or set HF_TOKEN") from None
    except OfflineModeIsEnabled:
        raise PruneZooError("HF_HUB_OFFLINE is set: unset it to publish") from None
    except PruneZooError:
        raise
    except (HTTP_ERROR, RuntimeError, ValueError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = {401: "; check the token: `hf auth login`, or HF_TOKEN", 403: "; is the organisation yours?"}
        why = _one_line(error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error)
        raise PruneZooError(f"{repo}: not uploaded; {why}{remedy.get(status or 0, '')}") from None


def _upload(
    api: HfApi, repo: str, content: Content, method: str, method_of: Callable[[Source], str], private: bool
) -> Published:
    try:
        info = api.model_info(repo, files_metadata=True)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=private, exist_ok=True)
        info = api.model_info(repo, files_metadata=True)
    refuse_another(api, repo, info, method, method_of)
    files = content(info)
    changed = changed_files(info, files)
    head = info.sha
    if changed:
        # on top of what was looked at: somebody else's push in between is refused, not overwritten
        operations = [CommitOperationAdd(name, files[name]) for name in changed]
        head = api.create_commit(repo, operations, commit_message=f"Upload {method}", parent_commit=info.sha).oid
    refs = api.list_repo_refs(repo)
    tag = next((ref.name for ref in refs.tags if ref.target_commit == head), None)
    if tag is None:
        numbers = [int(ref.name[1:]) for ref in refs.tags if re.fullmatch(r"v\d+", ref.name)]
        tag = f"v{max(numbers, default=0) + 1}"
        api.create_tag(repo, tag=tag, revision=head)
    return Published(f"{api.endpoint}/{repo}", tag, bool(changed))


def refuse_another(api: HfApi, repo: str, info: ModelInfo, method: str, method_of: Callable[[Source], str]) -> None:
    """Refuse a repository that holds anything but an earlier version of this method."""
    if not names_of(info) - {".gitattributes", CARD_FILE}:
        return
    try:
        held = method_of(Source(repo, info.sha, token=api.token))
    except PruneZooError:
        held = None
    if held != method:
        what = f"the method '{held}'" if held else "something that is not prunezoo's"
        raise PruneZooError(f"{repo} is taken: it holds {what}; choose another name")


def names_of(info: ModelInfo) -> set[str]:
    """Names of the files of a repository."""
    return {file.rfilename for file in info.siblings or ()}


def changed_files(info: ModelInfo, files: Mapping[str, bytes]) -> list[str]:
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


def with_card(repo: str, files: Mapping[str, bytes], card: str) -> Content:
    """Content of a pruner's own files, with a card where the repository has none.

    Raises:
        PruneZooError: when asked, that the repository says what was measured of other files.
    """

    def content(info: ModelInfo) -> Mapping[str, bytes]:
        there = names_of(info)
        if METRICS_FILE in there and changed_files(info, files):
            raise PruneZooError(
                f"{repo}: its card says what was measured of other weights; measure these and run `python -m "
                "trainers.publish`, or choose another name"
            )
        return files if CARD_FILE in there else {**files, CARD_FILE: card.encode()}

    return content


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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
