"""Conversations about pictures from WebDataset shards: tar files, on a disk or in object storage, read in place.

A sample is two members of a shard with one base name, the picture (``.jpg``, ``.jpeg``, ``.png``, ``.webp``) and a
``.json`` with LLaVA-style ``conversations``. The members are looked up once; then each is read by itself, so that these
data are shuffled, dealt out to processes and resumed as all others are. What is not local goes through `fsspec`.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import fsspec
from PIL import Image

from prunezoo.core.errors import PruneZooError

from .shards import write_whole
from .talks import Entry, Talks, read_turns

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


class WebShards(Talks):
    """Items of WebDataset shards.

    Args:
        shards: A path or URL with ``*`` or braces, as ``s3://bucket/train-{00000..00099}.tar``.
        index: Folder in which to keep what was found in each shard; with it, shards are looked through but once. None:
            at every start, which takes a while where they are far away.

    Raises:
        PruneZooError: There is no such shard, or a sample is malformed; the message names shard and sample.
    """

    def __init__(self, shards: str, index: Path | None = None) -> None:
        entries = []
        for url in expand(shards):
            for key, (start, size), text in self._samples(url, index):
                wrong = wrong_sample(url, key)
                try:
                    said = json.loads(text)
                except ValueError as error:
                    raise wrong(f"its .json is not readable ({error})") from error
                turns = read_turns(said.get("conversations") if isinstance(said, dict) else None, wrong)
                entries.append(Entry(f"{Path(url).stem}/{key}", f"{url}|{start}|{size}", turns))
        super().__init__(shards, entries)

    def open(self, picture: str) -> Image.Image:
        """See Talks."""
        url, start, size = picture.rsplit("|", 2)
        with fsspec.open(url, "rb") as file:
            file.seek(int(start))
            return Image.open(io.BytesIO(file.read(int(size))))

    def split_by(self, entry: Entry) -> str:
        """See Talks. A picture's place holds the shards' folder, its sample's name does not."""
        return entry.name

    def _samples(self, url: str, index: Path | None) -> list[Any]:
        """Of one shard: key, (start, bytes) of its picture, and its JSON."""
        path = index / f"{Path(url).stem}-{sha256(url.encode()).hexdigest()[:12]}.json" if index else None
        if path and path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        try:
            with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r:") as shard:
                found = list(pairs(url, shard))
        except (OSError, tarfile.TarError) as error:
            raise PruneZooError(f"{url}: not a readable tar file ({error}); fetch it again") from error
        if path:
            write_whole(path, json.dumps(found).encode())
        return found


def pairs(url: str, shard: tarfile.TarFile) -> Iterator[tuple[str, tuple[int, int], str]]:
    """The samples of a shard, in its order."""
    pictures: dict[str, tuple[int, int]] = {}
    texts: dict[str, str] = {}
    for member in shard:
        base, _, ending = member.name.rpartition(".")
        if f".{ending.lower()}" in PICTURES:
            pictures[base] = (member.offset_data, member.size)
        elif ending == "json":
            file = shard.extractfile(member)
            assert file is not None
            texts[base] = file.read().decode("utf-8", "replace")
    for key, text in texts.items():
        if key not in pictures:
            raise wrong_sample(url, key)("its picture is missing")
        yield key, pictures[key], text


def expand(shards: str) -> list[str]:
    """URLs of all shards, in order."""
    named = [place for piece in braces(shards) for place in ([piece] if "*" not in piece else glob(piece))]
    if not named:
        raise PruneZooError(f"{shards}: no such shard; set data.shards")
    return named


def glob(pattern: str) -> list[str]:
    """Files that a pattern stands for."""
    files, places = fsspec.core.url_to_fs(pattern)
    return sorted(files.unstrip_protocol(path) for path in files.glob(places))


def braces(text: str) -> list[str]:
    """``a{00..02}b`` as three texts."""
    head, opened, rest = text.partition("{")
    numbers, closed, tail = rest.partition("}")
    first, dots, last = numbers.partition("..")
    if not (opened and closed and dots and first.isdigit() and last.isdigit()):
        return [text]
    middle = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [head + number + end for number in middle for end in braces(tail)]


def wrong_sample(url: str, key: str) -> Any:
    """Makes an error of what is wrong with a sample."""
    return lambda what: PruneZooError(f"{url}: sample '{key}': {what}")
