"""Conversations about pictures from a Hugging Face data set: a Hub id, a folder that `save_to_disk` wrote, or files.

A row has a picture (column ``image``) and either LLaVA-style ``conversations`` or a ``question`` and an ``answer``. One
without a picture holds nothing to prune and is left out; one with several is left out too, and counted.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
from PIL import Image

from prunezoo.core.errors import PruneZooError

from .pictures import MOST_BYTES, BrokenImage, decode_picture, open_picture
from .talks import Entry, Reader, Talks, read_turns, tell_skipped

FILES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}


class HubDataset(Talks):
    """Items of a data set of the library `datasets`.

    Args:
        name: Hub id, folder of `save_to_disk`, or a parquet, arrow or JSON-lines file.
        split: Which of its splits.
        configuration: Which of its configurations, where it has several.
        columns: Other names of the columns, as ``{"image": "picture"}``.
        read: What a row asks; by default its conversation, or its question and answer.
        wanted: The columns that ``read`` reads.
        option: Where columns are named, for messages.

    Attributes:
        table_fingerprint: Another one for another table.

    Raises:
        PruneZooError: It cannot be opened, or has other columns.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        configuration: str | None = None,
        columns: dict[str, str] | None = None,
        read: Reader | None = None,
        wanted: Sequence[str] = (),
        option: str = "data.columns",
    ) -> None:
        try:
            import datasets
        except ImportError:
            raise PruneZooError("Hugging Face data sets need another package: pip install datasets") from None
        named = {key: key for key in ("image", "conversations", "question", "answer")} | (columns or {})
        try:
            if Path(name).is_dir() and not (Path(name) / "README.md").exists():
                table = datasets.load_from_disk(name)
                table = table[split] if isinstance(table, datasets.DatasetDict) else table
            elif Path(name).suffix in FILES:
                table = datasets.load_dataset(FILES[Path(name).suffix], data_files=name, split="train")
            else:
                table = datasets.load_dataset(name, configuration, split=split)
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).strip().splitlines()[0]
            raise PruneZooError(f"{name}: cannot be opened as a data set, split '{split}' ({reason})") from error
        there = set(table.column_names)
        words = wanted if read is not None else columns_of_text(named, there)
        if missing := [column for column in (named["image"], *words) if column not in there]:
            raise PruneZooError(
                f"{name}: column {', '.join(missing)} is missing, there are: {', '.join(sorted(there))}; name yours in "
                f"{option}"
            )
        self.table_fingerprint = str(table._fingerprint)
        self.column = named["image"]
        self.images = undecoded(name, table.select_columns([self.column]), self.column, option)
        counts = pictures_of_rows(self.images, self.column)
        rows = words_of(table, list(words), numbers=read is None)
        read = read or reader_of(words)
        entries = []
        for number, (count, row) in enumerate(zip(counts, rows, strict=True)):
            if count == 1:
                entries.append(Entry(f"{split}-{number}", str(number), *read(row, wrong_row(name, number))))
        tell_skipped(name, [f"{split}-{number}" for number, count in enumerate(counts) if count > 1])
        super().__init__(name, entries)

    def open(self, picture: str) -> Image.Image:
        """See Talks."""
        found = self.images[int(picture)][self.column]
        kept = found[0] if isinstance(found, list) else found
        if kept["bytes"] is not None:
            return decode_picture(kept["bytes"])
        if "://" not in kept["path"]:
            return open_picture(kept["path"])
        try:
            with fsspec.open(kept["path"], "rb") as file:
                return decode_picture(file.read(MOST_BYTES + 1))
        except (OSError, ValueError, ImportError) as error:
            raise BrokenImage(str(error)) from error


def columns_of_text(named: Mapping[str, str], there: Container[str]) -> list[str]:
    """The column of the conversations, where there is one; else those of question and answer."""
    if named["conversations"] in there:
        return [named["conversations"]]
    return [named["question"], named["answer"]]


def reader_of(words: Sequence[str]) -> Reader:
    """A reader of rows that have these columns, as :func:`columns_of_text` gives them."""
    if len(words) == 1:
        return lambda row, wrong: (*read_turns(row[words[0]], wrong), None)
    question, answer = words
    return lambda row, wrong: (*read_turns(question_and_answer(row[question], row[answer]), wrong), None)


def undecoded(name: str, table: Any, column: str, option: str = "data.columns") -> Any:
    """A table whose pictures, or lists of pictures, are left as bytes and paths: they are opened here.

    Raises:
        PruneZooError: The column holds something else.
    """
    import datasets

    kind = table.features[column]
    picture = datasets.Image(decode=False)
    listed = isinstance(kind, datasets.List | datasets.LargeList)
    try:
        return table.cast_column(column, datasets.List(picture) if listed else picture)
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's own errors are kinds of these
        kind = getattr(kind, "dtype", type(kind).__name__)
        raise PruneZooError(
            f"{name}: column '{column}' holds {kind} instead of pictures; name the right one in {option}: image"
        ) from error


def pictures_of_rows(table: Any, column: str) -> list[int]:
    """How many pictures each row has, without reading any."""
    import pyarrow as pa
    import pyarrow.compute as pc

    counts: list[int] = []
    for batch in table.with_format("arrow").iter(1000):
        values = batch[column].combine_chunks()
        if pa.types.is_struct(values.type):
            there = pc.or_(pc.is_valid(values.field("bytes")), pc.is_valid(values.field("path")))
            counts += pc.and_(pc.is_valid(values), there).cast(pa.int64()).to_pylist()
        else:
            counts += pc.fill_null(pc.list_value_length(values), 0).to_pylist()
    return counts


def words_of(table: Any, columns: list[str], numbers: bool = True) -> Iterator[dict[str, Any]]:
    """The rows' texts; of columns that hold names of classes, or with ``numbers`` numbers, as these are written."""
    features = {column: table.features[column] for column in columns}
    for row in table.select_columns(columns):
        for column, kind in features.items():
            value = row[column]
            if isinstance(value, int) and hasattr(kind, "int2str"):
                row[column] = kind.int2str(value)
            elif numbers and isinstance(value, int | float) and not isinstance(value, bool):
                row[column] = str(value)
        yield row


def question_and_answer(question: Any, answer: Any) -> list[dict[str, Any]]:
    """Two columns, as a conversation."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def wrong_row(name: str, number: int) -> Any:
    """Makes an error of what is wrong with a row."""
    return lambda what: PruneZooError(f"{name}: row {number}: {what}")
