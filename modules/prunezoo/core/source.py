"""Where a pruner or tokenizer is loaded from: a folder, or a repository of the Hugging Face Hub."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .bounds import file_inside
from .errors import PruneZooError


class Source:
    """A folder, or a repository of the Hub, of which all files are read at one commit.

    Args:
        name: Folder, or Hub id such as ``org/name``.
        revision: Branch, tag or commit of a Hub id; by default its main branch.
        cache_dir: Where downloads are kept; by default where all Hugging Face libraries keep them.
        token: For a private or gated repository; True: the one of ``hf auth login``, False: none.
        local_files_only: Take what was downloaded before and ask nobody; HF_HUB_OFFLINE=1 does the same.
        force_download: Download even what is in the cache.
    """

    def __init__(
        self,
        name: str | Path,
        revision: str | None = None,
        *,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> None:
        self.name, self.revision = name, revision
        self.options: dict[str, Any] = {
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }

    def file(self, filename: str) -> Path:
        """The local path of one file, downloaded where needed.

        Raises:
            PruneZooError: There is no such folder, repository, revision or file, it links out of its folder, or
                the Hub cannot be reached.
        """
        name, folder = self.name, Path(self.name)
        if folder.is_dir():
            return file_inside(folder, filename)
        if isinstance(name, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise PruneZooError(f"'{name}' is neither a known pruner, nor a folder, nor a Hub id like 'org/name'")
        try:
            path = Path(
                hf_hub_download(name, filename, revision=self.revision, library_name="prunezoo", **self.options)
            )
        except LocalEntryNotFoundError as error:
            offline = constants.HF_HUB_OFFLINE or self.options["local_files_only"]
            why = "only the cache may be asked" if offline else "the Hub cannot be reached"
            raise PruneZooError(f"'{name}' is no folder here, {filename} is not in the cache, and {why}") from error
        except RevisionNotFoundError as error:
            raise PruneZooError(f"the Hub repository '{name}' has no revision '{self.revision}'") from error
        except EntryNotFoundError as error:
            raise PruneZooError(f"{filename} is missing in the Hub repository '{name}'; is it prunezoo's?") from error
        except GatedRepoError as error:
            raise PruneZooError(f"'{name}' is gated: ask for access on its page, then `hf auth login`") from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise PruneZooError(f"'{name}' is neither a folder here nor a Hub repository that you can read") from error
        except Exception as error:  # whatever the network stack raises: the user needs the name and one line
            raise PruneZooError(f"cannot download {filename} of '{name}': {str(error).splitlines()[0]}") from error
        # in the cache a file lies under its commit, where all others must come from too, though a push came between
        self.revision = path.parents[filename.count("/")].name
        return path
