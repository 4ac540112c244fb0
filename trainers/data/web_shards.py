"""Conversations about pictures from WebDataset shards: tar files, on a disk or in object storage, read in place.

A sample is two members of a shard with one base name, the picture (``.jpg``, ``.jpeg``, ``.png``, ``.webp``) and a
``.json`` with LLaVA-style ``conversations``. The members are looked up once; then each is read by itself, so that these
data are shuffled, dealt out to processes and resumed as all others are. What is not local goes through `fsspec`.
"""

import itertools
import json
import math
import re
import tarfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import fsspec
from PIL import Image

from prunezoo.core.bounds import MOST_RECORD_BYTES, parse_json
from prunezoo.core.errors import PruneZooError
from prunezoo.core.files import read_json

from .pictures import BrokenImage, check_bytes, decode_picture
from .shards import write_whole
from .talks import Entry, Talks, read_turns

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
MOST_TEXT = 1 << 24
"""Bytes of a sample's JSON."""
MOST_SHARDS = 1_000_000
RANGE = re.compile(r"\{([0-9]{1,18})\.\.([0-9]{1,18})\}")


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
                    said = parse_json(text)
                except ValueError as error:
                    raise wrong(f"its .json is not readable ({error})") from error
                turns, place = read_turns(said.get("conversations") if isinstance(said, dict) else None, wrong)
                entries.append(Entry(f"{Path(url).stem}/{key}", f"{url}|{start}|{size}", turns, place))
        super().__init__(shards, entries)

    def open(self, picture: str) -> Image.Image:
        """See Talks."""
        url, start, size = picture.rsplit("|", 2)
        check_bytes(int(size))
        try:
            with fsspec.open(url, "rb") as file:
                file.seek(int(start))
                data = file.read(int(size))
        except OSError as error:
            raise BrokenImage(str(error)) from error
        return decode_picture(data)

    def split_by(self, entry: Entry) -> str:
        """See Talks. A picture's place holds the shards' folder, its sample's name does not."""
        return entry.name

    def _samples(self, url: str, index: Path | None) -> list[Any]:
        """Of one shard: key, (start, bytes) of its picture, and its JSON."""
        try:
            system, place = fsspec.core.url_to_fs(url)
            about = system.info(place)
            if about["type"] != "file":  # opening a pipe would wait for whoever writes into it
                raise PruneZooError(f"{url}: not a file; name tar files in data.shards")
            path = index / f"{Path(url).stem}-{sha256(url.encode()).hexdigest()[:12]}.json" if index else None
            if path and (kept := read_index(path, about["size"])) is not None:
                return kept
            with system.open(place, "rb") as file, tarfile.open(fileobj=file, mode="r:") as shard:
                found = list(pairs(url, shard))
        except (OSError, ValueError, ImportError, tarfile.TarError) as error:  # of fsspec: no such protocol, or package
            raise PruneZooError(f"{url}: not a readable tar file ({error}); fetch it again") from error
        if path:
            write_whole(path, json.dumps({"bytes": about["size"], "samples": found}).encode())
        return found


def read_index(path: Path, size: int) -> list[Any] | None:
    """What was found in a shard of so many bytes; None where nothing is kept, or it is of another shard or damaged."""
    try:
        kept = read_json(path, MOST_RECORD_BYTES)
        return (
            [(key, (int(start), int(many)), str(text)) for key, (start, many), text in kept["samples"]]
            if (kept["bytes"] == size)
            else None
        )
    except (ValueError, KeyError, TypeError):
        return None


def pairs(url: str, shard: tarfile.TarFile) -> Iterator[tuple[str, tuple[int, int], str]]:
    """The samples of a shard, in its order; folders, links and pipes among its members are none."""
    pictures: dict[str, tuple[int, int]] = {}
    texts: dict[str, str] = {}
    for member in shard:
        base, _, ending = member.name.rpartition(".")
        wrong = wrong_sample(url, base)
        if not member.isreg():
            continue
        if member.issparse():  # it may claim any size
            raise wrong("it is stored with holes; make the shard without --sparse")
        if f".{ending.lower()}" in PICTURES:
            pictures[base] = (member.offset_data, member.size)
        elif ending == "json":
            if member.size > MOST_TEXT:
                raise wrong(f"its .json has {member.size:,} bytes, more than {MOST_TEXT:,}")
            file = shard.extractfile(member)
            assert file is not None
            texts[base] = file.read().decode("utf-8-sig", "replace")
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
    try:
        files, places = fsspec.core.url_to_fs(pattern)
        return sorted(files.unstrip_protocol(path) for path in files.glob(places))
    except (OSError, ValueError, ImportError) as error:
        raise PruneZooError(f"{pattern}: {error}; mend data.shards") from error


def braces(text: str) -> list[str]:
    """``a{00..02}b`` as three texts.

    Raises:
        PruneZooError: They are more than MOST_SHARDS.
    """
    pieces = RANGE.split(text)  # text, first, last, text, first, last, …, text
    ranges = [(first, range(int(first), int(last) + 1)) for first, last in zip(pieces[1::3], pieces[2::3], strict=True)]
    if math.prod(max(numbers.stop - numbers.start, 0) for _, numbers in ranges) > MOST_SHARDS:
        raise PruneZooError(f"{text:.200}: more than {MOST_SHARDS:,} shards; mend data.shards")
    several = itertools.product(*([f"{n:0{len(first)}d}" for n in numbers] for first, numbers in ranges))
    return [
        "".join(itertools.chain.from_iterable(zip(pieces[::3], (*numbers, ""), strict=True))) for numbers in several
    ]


def wrong_sample(url: str, key: str) -> Any:
    """Makes an error of what is wrong with a sample."""
    return lambda what: PruneZooError(f"{url}: sample '{key}': {what}")
