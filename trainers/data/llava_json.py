r"""LLaVA-format instruction data: one JSON list and a folder of images, as LLaVA's own training reads them.

An entry is ``{"id": …, "image": "coco/train2017/1.jpg", "conversations": [{"from": "human", "value": "<image>\n…"},
{"from": "gpt", "value": "…"}, …]}``. Every answer becomes one item, with the turns before it as its history, because
which tokens matter differs from question to question. Entries without a picture hold nothing to prune and are left out.
"""

import json
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, overload
from zlib import crc32

from PIL import Image, UnidentifiedImageError

from modules.core.errors import PruneZooError

from .suite import Item

PLACEHOLDER = "<image>"


class LlavaJson(Sequence[Item]):
    """Items of one LLaVA-format file; pictures are opened when their item is asked for.

    Args:
        annotations: The JSON file.
        images: Folder that the entries' ``image`` paths are relative to.

    Raises:
        PruneZooError: A file is missing, an entry is malformed, its image is missing or lies outside the folder. All
            entries are checked here, without decoding any picture; a picture that proves broken later names its file.
    """

    def __init__(self, annotations: str | Path, images: str | Path) -> None:
        self.annotations, self.images = Path(annotations), Path(images)
        if not self.images.is_dir():
            raise PruneZooError(f"{self.images}: no such folder; set data.images to what {annotations} refers to")
        self._entries: list[tuple[str, str, list[tuple[str, str]]]] = []
        self._places: list[tuple[int, int]] = []  # (entry, last turn) of each item
        seen: set[str] = set()
        for number, entry in enumerate(self._read()):
            name, image, turns = self._check(entry, number, seen)
            if image is not None:
                self._places += [(len(self._entries), turn) for turn in range(len(turns))]
                self._entries.append((name, image, turns))

    def part(self, split: str, validation_share: float, limit: int | None = None) -> "LlavaJson":
        """The items of one split; all items of one picture fall into the same one, by a hash of its path.

        Args:
            split: ``train`` or ``validation``.
            validation_share: Share of the pictures in (0, 1) that make the validation split.
            limit: Only the first so many items.
        """
        if not 0 < validation_share < 1:
            raise PruneZooError(f"validation_share must lie in (0, 1), got {validation_share}")
        held_out = [crc32(image.encode()) / 2**32 < validation_share for _, image, _ in self._entries]
        chosen = copy(self)
        chosen._places = [p for p in self._places if held_out[p[0]] == (split == "validation")][:limit]
        if not chosen._places:
            raise PruneZooError(f"{self.annotations}: no picture falls into the {split} split; change validation_share")
        return chosen

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, turn = self._places[index]
        name, image, turns = self._entries[number]
        path = self.images / image
        try:
            with Image.open(path) as file:
                picture = file.convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise PruneZooError(
                f"{path}: broken image of entry '{name}' in {self.annotations} ({error}); replace it or drop the entry"
            ) from error
        return Item(id=f"{name}/{turn}", image=picture, turns=tuple(turns[: turn + 1]), group="all")

    def _read(self) -> list[Any]:
        try:
            entries = json.loads(self.annotations.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise PruneZooError(f"{self.annotations}: no such file; set data.json to a LLaVA-format JSON") from None
        except (OSError, ValueError) as error:
            raise PruneZooError(f"{self.annotations}: not readable as JSON ({error})") from error
        if not isinstance(entries, list):
            raise PruneZooError(f"{self.annotations}: must hold a list of entries, not {type(entries).__name__}")
        return entries

    def _check(self, entry: Any, number: int, seen: set[str]) -> tuple[str, str | None, list[tuple[str, str]]]:
        """Name, image path (None without picture) and turns of an entry; `seen` are the images known to be there."""
        name = str(entry.get("id", f"#{number}")) if isinstance(entry, dict) else f"#{number}"

        def wrong(what: str) -> PruneZooError:
            return PruneZooError(f"{self.annotations}: entry '{name}': {what}")

        if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
            raise wrong("key 'conversations' with a list of turns is missing; add it or drop the entry")
        image = entry.get("image")
        placeholders = sum(str(turn).count(PLACEHOLDER) for turn in entry["conversations"])
        if image is None:
            if placeholders:
                raise wrong(f"key 'image' is missing though the text has {PLACEHOLDER}; add it or drop the entry")
            return name, None, []
        if not isinstance(image, str) or not image:
            raise wrong("'image' must be one path; entries with several pictures are not supported, drop them")
        if placeholders > 1:
            raise wrong(f"{placeholders} times {PLACEHOLDER} for one image; keep one")
        if image not in seen:
            inside = not any(p.is_absolute() or p.drive or ".." in p.parts for p in _both(image))
            if not inside:
                raise wrong(f"image '{image}' lies outside {self.images}; use a path inside that folder")
            path = self.images / image
            if not path.is_file() or not path.stat().st_size:
                raise wrong(f"image {path} is missing or empty; put it there or drop the entry")
            seen.add(image)
        return name, image, self._turns(entry["conversations"], wrong)

    @staticmethod
    def _turns(conversation: list[Any], wrong: Callable[[str], PruneZooError]) -> list[tuple[str, str]]:
        """(question, answer) pairs, without placeholders."""
        for number, turn in enumerate(conversation):
            speaker = ("human", "gpt")[number % 2]
            if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
                raise wrong(f"turn {number} must be {{'from': '{speaker}', 'value': text}}; mend it or drop the entry")
        if not conversation or len(conversation) % 2:
            raise wrong("conversations must be pairs of a human and a gpt turn; mend it or drop the entry")
        texts = [turn["value"].replace(PLACEHOLDER, "").strip() for turn in conversation]
        if not all(texts[1::2]):
            raise wrong("an answer is empty; fill it or drop the entry")
        return list(zip(texts[::2], texts[1::2], strict=True))


def _both(path: str) -> tuple[PurePosixPath, PureWindowsPath]:
    """A path as either system would read it, so that a data set is as safe on one as on the other."""
    return PurePosixPath(path), PureWindowsPath(path)
