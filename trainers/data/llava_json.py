r"""LLaVA-format instruction data: one JSON list, or JSON lines, and a folder of images, as LLaVA's training reads them.

An entry is ``{"id": …, "image": "coco/train2017/1.jpg", "conversations": [{"from": "human", "value": "<image>\n…"},
{"from": "gpt", "value": "…"}, …]}``. Entries without a picture hold nothing to prune and are left out.
"""

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image

from prunezoo.core.errors import PruneZooError

from .talks import PLACEHOLDER, Entry, Talks, read_turns


class LlavaJson(Talks):
    """Items of one LLaVA-format file.

    Args:
        annotations: The JSON file; with the ending ``.jsonl``, an entry a line.
        images: Folder that the entries' ``image`` paths are relative to.

    Raises:
        PruneZooError: A file is missing, an entry is malformed, its image is missing or lies outside the folder. All
            entries are checked here, without decoding any picture; a picture that proves broken later names its file.
    """

    def __init__(self, annotations: str | Path, images: str | Path) -> None:
        self.annotations, self.images = Path(annotations), Path(images)
        if not self.images.is_dir():
            raise PruneZooError(f"{self.images}: no such folder; set data.images to what {annotations} refers to")
        seen: set[str] = set()
        entries = [self._check(entry, number, seen) for number, entry in enumerate(self._read())]
        super().__init__(str(annotations), [entry for entry in entries if entry is not None])

    def open(self, picture: str) -> Image.Image:
        """See Talks."""
        with Image.open(self.images / picture) as file:
            return file.convert("RGB")

    def picture_stamp(self, picture: str) -> str:
        """See Talks. The time of the last change (``ctime``) is set by the system alone: whatever writes moves it."""
        known = (self.images / picture).stat()
        return f"{known.st_size} {known.st_mtime_ns} {known.st_ctime_ns} {known.st_ino}"

    def _read(self) -> list[Any]:
        lines = self.annotations.suffix == ".jsonl"
        try:
            text = self.annotations.read_text(encoding="utf-8")
            entries = [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
        except FileNotFoundError:
            raise PruneZooError(f"{self.annotations}: no such file; set data.json to a LLaVA-format JSON") from None
        except (OSError, ValueError) as error:
            raise PruneZooError(f"{self.annotations}: not readable as JSON ({error})") from error
        if not isinstance(entries, list):
            raise PruneZooError(f"{self.annotations}: must hold a list of entries, not {type(entries).__name__}")
        return entries

    def _check(self, entry: Any, number: int, seen: set[str]) -> Entry | None:
        """An entry, None without picture; `seen` are the images known to be there."""
        name = str(entry.get("id", f"#{number}")) if isinstance(entry, dict) else f"#{number}"

        def wrong(what: str) -> PruneZooError:
            return PruneZooError(f"{self.annotations}: entry '{name}': {what}")

        if not isinstance(entry, dict):
            raise wrong("key 'conversations' with a list of turns is missing; add it or drop the entry")
        image = entry.get("image")
        if image is None:
            if PLACEHOLDER in str(entry.get("conversations")):
                raise wrong(f"key 'image' is missing though the text has {PLACEHOLDER}; add it or drop the entry")
            return None
        if not isinstance(image, str) or not image:
            raise wrong("'image' must be one path; entries with several pictures are not supported, drop them")
        if image not in seen:
            self._look(image, wrong)
            seen.add(image)
        return Entry(name, image, read_turns(entry.get("conversations"), wrong))

    def _look(self, image: str, wrong: Callable[[str], PruneZooError]) -> None:
        """Whether an image is in the folder."""
        if any(p.is_absolute() or p.drive or ".." in p.parts for p in (PurePosixPath(image), PureWindowsPath(image))):
            raise wrong(f"image '{image}' lies outside {self.images}; use a path inside that folder")
        path = self.images / image
        if not path.is_file() or not path.stat().st_size:
            raise wrong(f"image {path} is missing or empty; put it there or drop the entry")
