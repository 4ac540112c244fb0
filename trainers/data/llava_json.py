r"""LLaVA-format instruction data: one JSON list, or JSON lines, and a folder of images, as LLaVA's training reads them.

An entry is ``{"id": …, "image": "coco/train2017/1.jpg", "conversations": [{"from": "human", "value": "<image>\n…"},
{"from": "gpt", "value": "…"}, …]}``. Entries without a picture hold nothing to prune and are left out; those with
several are left out too, and counted.
"""

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image

from prunezoo.core.bounds import parse_json, read_bytes
from prunezoo.core.errors import PruneZooError

from .pictures import open_picture
from .talks import PLACEHOLDER, Entry, Reader, Talks, Wrong, read_conversation, tell_skipped, whole_text

MOST_BYTES = 1 << 34
"""Of the annotations; LLaVA's own have 1 GB."""


class LlavaJson(Talks):
    """Items of one LLaVA-format file.

    Args:
        annotations: The JSON file; with the ending ``.jsonl``, an entry a line.
        images: Folder that the entries' ``image`` paths are relative to.
        image: Key of the path in an entry.
        read: What an entry asks.

    Raises:
        PruneZooError: A file is missing, an entry is malformed, its image is missing or lies outside the folder. All
            entries are checked here, without decoding any picture; a picture that proves broken later names its file.
    """

    def __init__(
        self, annotations: str | Path, images: str | Path, image: str = "image", read: Reader = read_conversation
    ) -> None:
        self.annotations, self.images, self.image, self.read = Path(annotations), Path(images), image, read
        if not self.images.is_dir():
            raise PruneZooError(f"{self.images}: no such folder; set data.images to what {annotations} refers to")
        self.skipped: list[str] = []  # entries with several pictures
        seen: set[str] = set()
        entries = [self._check(entry, number, seen) for number, entry in enumerate(self._read())]
        tell_skipped(str(annotations), self.skipped)
        super().__init__(str(annotations), [entry for entry in entries if entry is not None])

    def open(self, picture: str) -> Image.Image:
        """See Talks."""
        return open_picture(self.images / picture)

    def picture_stamp(self, picture: str) -> str:
        """See Talks. The time of the last change (``ctime``) is set by the system alone: whatever writes moves it."""
        known = (self.images / picture).stat()
        return f"{known.st_size} {known.st_mtime_ns} {known.st_ctime_ns} {known.st_ino}"

    def _read(self) -> list[Any]:
        try:
            # the sig is what some editors put in front
            text = read_bytes(self.annotations, MOST_BYTES).decode("utf-8-sig")
        except FileNotFoundError:
            raise PruneZooError(f"{self.annotations}: no such file; set data.json to a LLaVA-format JSON") from None
        except PruneZooError:
            raise
        except (OSError, ValueError) as error:
            raise PruneZooError(f"{self.annotations}: not readable as JSON ({error})") from error
        if self.annotations.suffix == ".jsonl":
            # a line ends with a line feed and nothing else that Unicode calls the end of one: JSON has those in texts
            lines = enumerate(text.split("\n"), start=1)
            return [self._parse(line, f", line {number}") for number, line in lines if line.strip()]
        entries = self._parse(text)
        if not isinstance(entries, list):
            raise PruneZooError(f"{self.annotations}: must hold a list of entries, not {type(entries).__name__}")
        return entries

    def _parse(self, text: str, where: str = "") -> Any:
        try:
            return parse_json(text)
        except ValueError as error:
            raise PruneZooError(f"{self.annotations}: not readable as JSON{where} ({error})") from error

    def _check(self, entry: Any, number: int, seen: set[str]) -> Entry | None:
        """An entry, None without picture or with several; `seen` are the images known to be there."""
        named = entry.get("id") if isinstance(entry, dict) else None
        name = whole_text(str(named)) if isinstance(named, str | int | float) else f"#{number}"

        def wrong(what: str) -> PruneZooError:
            return PruneZooError(f"{self.annotations}: entry '{name}': {what}")

        if not isinstance(entry, dict):
            raise wrong("key 'conversations' with a list of turns is missing; add it or drop the entry")
        images = entry.get(self.image)
        images = [] if images in (None, "") else images if isinstance(images, list) else [images]
        if len(images) > 1:
            self.skipped.append(name)
            return None
        if not images:
            if speaks_of_picture(entry.get("conversations")):
                raise wrong(
                    f"key '{self.image}' is missing though the text has {PLACEHOLDER}; add it or drop the entry"
                )
            return None
        (image,) = images
        if not isinstance(image, str) or not image:
            raise wrong(f"'{self.image}' must be a path, not {type(image).__name__}; mend it or drop the entry")
        if image not in seen:
            self._look(image, wrong)
            seen.add(image)
        return Entry(name, image, *self.read(entry, wrong))

    def _look(self, image: str, wrong: Wrong) -> None:
        """Whether an image is in the folder."""
        if any(p.is_absolute() or p.drive or ".." in p.parts for p in (PurePosixPath(image), PureWindowsPath(image))):
            raise wrong(f"image '{image}' lies outside {self.images}; use a path inside that folder")
        path = self.images / image
        try:
            there = path.is_file() and path.stat().st_size
        except (OSError, ValueError):  # a name that no file system can hold
            there = False
        if not there:
            raise wrong(f"image {path} is missing or empty; put it there or drop the entry")


def speaks_of_picture(conversation: Any) -> bool:
    """Whether a question of a LLaVA-style list of turns has a placeholder."""
    questions = conversation[::2] if isinstance(conversation, list) else []
    texts = [turn.get("value") for turn in questions if isinstance(turn, dict)]
    return any(PLACEHOLDER in text for text in texts if isinstance(text, str))
