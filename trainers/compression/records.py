"""What `python -m trainers.codec` writes of tokenizers: quality beside rivals, and speed; as records and as tables."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table

from prunezoo.core.errors import PruneZooError
from prunezoo.tokenizers.base import Text, Tokenizer
from trainers.cards.parts import weights_digest
from trainers.cli.terminal import Terminal
from trainers.data.photographs import Photographs
from trainers.training.run_record import RUN_FILE, read_run

from .measure import measure_rival, measure_tokenizer, paired_of, rows_of, shown_lengths
from .rivals import RIVALS
from .speed import measure_speed
from .texts import Texts


def quality_record(
    tokenizers: Mapping[str, Tokenizer], pictures: Photographs, sizes: Sequence[int], texts: Texts
) -> dict[str, Any]:
    """Measure tokenizers of one image size, of any kinds, and the rivals, within the same bytes on the same pictures.

    Args:
        tokenizers: by folder or Hub id; the first is compared in pairs with all others.
        pictures: in [0, 1], of the tokenizers' size.
        sizes: bytes of a whole file, rising; each codec has the best that fits.
        texts: of the pictures.

    Returns:
        image_size, kind, weights and training of each tokenizer, rows and paired differences.

    Raises:
        PruneZooError: a tokenizer has no file so small as any of these.
    """
    first = next(iter(tokenizers.values()))
    for name, tokenizer in tokenizers.items():
        if not tokenizer.length_within(sizes[-1]):
            raise PruneZooError(
                f"{name}: its smallest file has {tokenizer.file_size(1)} bytes, and the most to be measured are "
                f"{sizes[-1]}: give more --bytes"
            )
    with progress(len(pictures) * (len(tokenizers) + len(RIVALS))) as advance:
        own = {name: measure_tokenizer(t, pictures, sizes, texts, advance) for name, t in tokenizers.items()}
        rivals = {name: measure_rival(name, pictures, sizes, advance) for name in RIVALS}
    name, *others = own
    return {
        "image_size": first.config.image_size,
        "kinds": {name: tokenizer.name for name, tokenizer in tokenizers.items()},
        "weights": {name: weights_digest(name) for name in own},
        "trained": {name: training_of(name) for name in own},
        "rows": [row for codec, figures in {**own, **rivals}.items() for row in rows_of(codec, figures)],
        "paired": paired_of(name, own[name], {**{other: own[other] for other in others}, **rivals}),
    }


def speed_rows(tokenizer: Tokenizer, batch: int, repeats: int, text: Text | None = None) -> list[dict[str, Any]]:
    """See `measure_speed`: in float32 and in bfloat16, on the tokenizer's device, where the text is too."""
    side, device = tokenizer.config.image_size, next(tokenizer.parameters()).device
    images = torch.rand(batch, 3, side, side, device=device)
    rows = []
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        rows += measure_speed(tokenizer.to(dtype), images, shown_lengths(tokenizer), repeats, name, text)
    return rows


def training_of(source: str) -> dict[str, Any] | None:
    """Command and steps of the training of a tokenizer in a folder, where they were recorded."""
    path = Path(source) / RUN_FILE
    if not path.is_file():
        return None
    run = read_run(path)
    return {key: run[key] for key in ("command", "steps")}


@contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar; the function that is given moves it on."""
    with Progress(console=Terminal(stderr=True), transient=True) as bar:
        task = bar.add_task("photographs", total=total)
        yield lambda: bar.advance(task)


def print_rows(rows: Sequence[dict], columns: Sequence[str]) -> None:
    """A table of some columns."""
    table = Table(*columns)
    for row in rows:
        cells = [row[column] for column in columns]
        table.add_row(*("–" if c is None else f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells))
    Terminal(width=120).print(table)
