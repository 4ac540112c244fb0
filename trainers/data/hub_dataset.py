"""Conversations about pictures from a Hugging Face data set: a Hub id, a folder that `save_to_disk` wrote, or files.

A row has a picture (column ``image``) and either LLaVA-style ``conversations`` or a ``question`` and an ``answer``.
"""

from pathlib import Path
from typing import Any

from PIL import Image

from prunezoo.core.errors import PruneZooError

from .talks import Entry, Talks, read_turns

FILES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}


class HubDataset(Talks):
    """Items of a data set of the library `datasets`.

    Args:
        name: Hub id, folder of `save_to_disk`, or a parquet, arrow or JSON-lines file.
        split: Which of its splits.
        configuration: Which of its configurations, where it has several.
        columns: Other names of the columns, as ``{"image": "picture"}``.

    Raises:
        PruneZooError: It cannot be opened, or has other columns.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        configuration: str | None = None,
        columns: dict[str, str] | None = None,
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
        talking = named["conversations"] in there
        wanted = [named["image"], *([named["conversations"]] if talking else [named["question"], named["answer"]])]
        if missing := [column for column in wanted if column not in there]:
            raise PruneZooError(
                f"{name}: column {', '.join(missing)} is missing, there are: {', '.join(sorted(there))}; name yours in "
                "data.columns"
            )
        self.images = table.select_columns([named["image"]]).cast_column(named["image"], datasets.Image())
        self.column = named["image"]
        entries = []
        for number, row in enumerate(table.select_columns(wanted[1:])):
            turns = row[wanted[1]] if talking else question_and_answer(row[wanted[1]], row[wanted[2]])
            entries.append(Entry(f"{split}-{number}", str(number), read_turns(turns, wrong_row(name, number))))
        super().__init__(name, entries)

    def open(self, picture: str) -> Image.Image:
        """See Talks."""
        image = self.images[int(picture)][self.column]
        if image is None:
            raise OSError("the row has no image")
        return image


def question_and_answer(question: Any, answer: Any) -> list[dict[str, Any]]:
    """Two columns, as a conversation."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def wrong_row(name: str, number: int) -> Any:
    """Makes an error of what is wrong with a row."""
    return lambda what: PruneZooError(f"{name}: row {number}: {what}")
