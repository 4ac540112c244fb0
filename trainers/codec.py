"""The tokenizer as a codec: compress and decompress files, measure quality and speed.

    python -m trainers.codec compress IN OUT --bytes 96 --tokenizer checkpoints/one-d-piece-tiny
    python -m trainers.codec decompress IN OUT --tokenizer checkpoints/one-d-piece-tiny
    python -m trainers.codec measure --tokenizer F [F2 …] --images PHOTOGRAPHS [--json F] [--report DIR]
    python -m trainers.codec speed --tokenizer F [--json F]
    python -m trainers.codec card F --quality JSON --speed JSON --photographs "what they are"

`measure` paints held-out photographs from prefixes of their rows, beside JPEG and WebP within the same bytes, headers
included. `card` writes the tokenizer's model card from what `measure` and `speed` wrote, and later anew from the
folder's own metrics, or from those but for what is given.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from prunezoo.core.errors import PruneZooError
from prunezoo.tokenizers.one_d_piece import OneDPiece
from trainers.cards.parts import METRICS_FILE, weights_digest
from trainers.cli.errors import check_output, command
from trainers.cli.names import find_pruner
from trainers.cli.options import add_option, check_at_least_one
from trainers.compression.card import read_json, write_card
from trainers.compression.figures import draw_curves, draw_pictures
from trainers.compression.measure import (
    file_size,
    measure_rival,
    measure_tokenizer,
    paired_of,
    rows_of,
    shown_lengths,
)
from trainers.compression.quality import METRICS
from trainers.compression.rivals import RIVALS
from trainers.compression.speed import measure_speed
from trainers.data.photographs import Photographs, photographs, spread
from trainers.data.suite import SPLITS
from trainers.evaluation.loading import check_device, default_device
from trainers.evaluation.record import versions, write_record
from trainers.training.run_record import RUN_FILE

LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PICTURES = 6  # rows of the sheet that `measure` draws


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m trainers.codec", description="A tokenizer as a codec.")
    commands = p.add_subparsers(dest="command", required=True)
    one = argparse.ArgumentParser(add_help=False)
    one.add_argument("source", type=Path)
    one.add_argument("target", type=Path)
    add_option(one, "tokenizer", required=True, help="folder, Hub id, or one-d-piece-tiny, the embedded one")
    compress = commands.add_parser("compress", parents=[one], help="a picture to a file of so many bytes")
    compress.add_argument("--bytes", type=int, required=True, help="of the whole file")
    commands.add_parser("decompress", parents=[one], help="such a file to a picture")
    measure = commands.add_parser("measure", help="quality at several lengths, beside JPEG and WebP")
    add_option(measure, "tokenizer", nargs="+", required=True, help="folders or Hub ids; the first is drawn")
    measure.add_argument("--images", type=Path, required=True, help="folder of photographs")
    add_option(measure, "split", choices=SPLITS)
    add_option(measure, "limit", default=256, help="photographs, evenly over the folder")
    measure.add_argument("--length", nargs="+", type=int, help=f"tokens; by default {' '.join(map(str, LENGTHS))}")
    add_option(measure, "json")
    add_option(measure, "report", help="write curves and pictures into this folder")
    speed = commands.add_parser("speed", help="pictures a second, beside the bare ViT")
    add_option(speed, "tokenizer", required=True)
    add_option(speed, "batch", default=8)
    speed.add_argument("--repeats", type=int, default=10)
    add_option(speed, "device", default=default_device())
    add_option(speed, "json")
    card = commands.add_parser("card", help="the model card, from what was measured")
    card.add_argument("folder", type=Path, help="the tokenizer's folder")
    card.add_argument("--quality", type=Path, help="what `measure --json` wrote")
    card.add_argument("--speed", type=Path, help="what `speed --json` wrote")
    card.add_argument("--photographs", help="what it was trained and measured on, in a few words")
    return p


def load(source: str) -> OneDPiece:
    """The tokenizer, computing in float32."""
    return OneDPiece.from_pretrained(source).float()


def compress(args: argparse.Namespace, words: Sequence[str]) -> None:
    """A picture to a file."""
    try:
        with Image.open(args.source) as image:
            data = load(args.tokenizer).compress(image, args.bytes)
    except (OSError, UnidentifiedImageError) as error:
        raise PruneZooError(f"{args.source} is not a readable picture ({error})") from None
    args.target.write_bytes(data)
    print(f"{args.target}: {len(data)} bytes")


def decompress(args: argparse.Namespace, words: Sequence[str]) -> None:
    """A file to a picture."""
    try:
        data = args.source.read_bytes()
    except OSError as error:
        raise PruneZooError(f"{args.source}: {error.strerror}") from None
    try:
        picture = load(args.tokenizer).decompress(data)
    except PruneZooError as error:
        raise PruneZooError(f"{args.source}: {error}") from None
    try:
        picture.save(args.target)
    except ValueError as error:  # no known suffix
        raise PruneZooError(f"{args.target}: {error}; name it .png, .jpg or .webp") from None
    print(f"{args.target}: {picture.width} x {picture.height} pixels")


def measure(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Quality against bytes."""
    check_at_least_one(args, "limit")
    check_output("--json", args.json)
    check_output("--report", args.report, folder=True)
    tokenizers = {name: load(name) for name in args.tokenizer}
    first = next(iter(tokenizers.values()))
    if len({t.config.image_size for t in tokenizers.values()}) > 1:
        raise PruneZooError("tokenizers of different image_size cannot be measured together")
    paths = spread(photographs(args.images, args.split), args.limit)
    pictures = Photographs(paths, first.config.image_size)
    lengths = args.length or [length for length in LENGTHS if length <= first.config.tokens]
    for length in lengths:
        first.check_length(length)
    sizes = [file_size(first, length) for length in lengths]
    with progress(len(paths) * (len(tokenizers) + len(RIVALS))) as advance:
        own = {name: measure_tokenizer(t, pictures, lengths, advance) for name, t in tokenizers.items()}
        rivals = {name: measure_rival(name, pictures, sizes, advance) for name in RIVALS}
    name, *others = own
    record = {
        "command": shlex.join(["python", "-m", "trainers.codec", *words]),
        "images": args.images.name,
        "split": args.split,
        "n": len(paths),
        "image_size": first.config.image_size,
        "weights": {name: weights_digest(name) for name in own},
        "trained": {name: training_of(name) for name in own},
        "versions": versions(),
        "rows": [row for codec, figures in {**own, **rivals}.items() for row in rows_of(codec, figures)],
        "paired": paired_of(name, own[name], {**{other: own[other] for other in others}, **rivals}),
    }
    print_rows(record["rows"], ["codec", "tokens", "bytes", "fits", *METRICS])
    if args.json:
        write_record(record, args.json)
    if args.report:
        args.report.mkdir(parents=True, exist_ok=True)
        draw_curves(record, args.report / "curves.png")
        which = range(0, len(pictures), max(len(pictures) // PICTURES, 1))[:PICTURES]
        draw_pictures(first, [pictures[i] for i in which], shown_lengths(first)).save(args.report / "pictures.png")


def training_of(source: str) -> dict[str, Any] | None:
    """Command and steps of the training of a tokenizer in a folder, where they were recorded."""
    path = Path(source) / RUN_FILE
    if not path.is_file():
        return None
    run = json.loads(path.read_text(encoding="utf-8"))
    return {key: run[key] for key in ("command", "steps")}


def speed(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Pictures a second."""
    check_at_least_one(args, "batch", "repeats")
    check_device(args.device)
    check_output("--json", args.json)
    tokenizer = load(args.tokenizer).to(args.device)
    side = tokenizer.config.image_size
    images = torch.rand(args.batch, 3, side, side, device=args.device)
    lengths = shown_lengths(tokenizer)
    rows = []
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        rows += measure_speed(tokenizer.to(dtype), images, lengths, args.repeats, name)
    print_rows(rows, list(rows[0]))
    if args.json:
        facts = {"weights": weights_digest(args.tokenizer), "device": args.device}
        facts |= {"threads": torch.get_num_threads(), "batch": args.batch, "image_size": side}
        head = {"command": shlex.join(["python", "-m", "trainers.codec", *words]), **facts, "versions": versions()}
        write_record({**head, "rows": rows}, args.json)


def card(args: argparse.Namespace, words: Sequence[str]) -> None:
    """The model card. What is not given stays as it is in the folder's own metrics."""
    measured = {name: read_json(path) for name in ("quality", "speed") if (path := getattr(args, name))}
    given = {**measured, **({"photographs": args.photographs} if args.photographs else {})}
    own = args.folder / METRICS_FILE
    metrics = {**(read_json(own) if own.is_file() else {}), **given}
    for name in ("quality", "speed", "photographs"):
        if name not in metrics:
            raise PruneZooError(f"{own}: there is no '{name}' in it: give --{name}")
    for path in write_card(args.folder, metrics["quality"], metrics["speed"], metrics["photographs"]):
        print(path)


@contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar; the function that is given moves it on."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("photographs", total=total)
        yield lambda: bar.advance(task)


def print_rows(rows: Sequence[dict], columns: Sequence[str]) -> None:
    """A table of some columns."""
    table = Table(*columns)
    for row in rows:
        cells = [row[column] for column in columns]
        table.add_row(*("–" if c is None else f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells))
    Console(width=120).print(table)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(words)
    if args.command != "card":
        named = args.tokenizer
        args.tokenizer = find_pruner(named) if isinstance(named, str) else [find_pruner(name) for name in named]
    {run.__name__: run for run in (compress, decompress, measure, speed, card)}[args.command](args, words)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
