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
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from prunezoo.core.errors import PruneZooError
from prunezoo.tokenizers.base import Tokenizer, load_tokenizer
from trainers.cards.parts import METRICS_FILE, weights_digest
from trainers.cli.errors import check_output, command
from trainers.cli.lock import hold
from trainers.cli.names import find_pruner
from trainers.cli.options import add_option, check_at_least_one
from trainers.compression.card import read_measurement, write_card
from trainers.compression.figures import draw_curves, draw_pictures
from trainers.compression.measure import shown_lengths
from trainers.compression.quality import METRICS
from trainers.compression.records import print_rows, quality_record, speed_rows
from trainers.data.photographs import Photographs, photographs, spread
from trainers.data.pictures import BrokenImage, open_picture
from trainers.data.suite import SPLITS
from trainers.evaluation.loading import check_device, default_device
from trainers.evaluation.record import versions, write_record

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


def load(source: str) -> Tokenizer:
    """The tokenizer, computing in float32."""
    return load_tokenizer(source).float()


def compress(args: argparse.Namespace, words: Sequence[str]) -> None:
    """A picture to a file."""
    try:
        picture = open_picture(args.source)
    except BrokenImage as error:
        raise PruneZooError(f"{args.source} is not a readable picture ({error})") from None
    data = load(args.tokenizer).compress(picture, args.bytes)
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
    hold("--json", args.json)
    check_output("--report", args.report, folder=True)
    tokenizers = {name: load(name) for name in args.tokenizer}
    first = next(iter(tokenizers.values()))
    if len({t.config.image_size for t in tokenizers.values()}) > 1:
        raise PruneZooError("tokenizers of different image_size cannot be measured together")
    pictures = Photographs(spread(photographs(args.images, args.split), args.limit), first.config.image_size)
    lengths = args.length or [length for length in LENGTHS if length <= first.config.tokens]
    for length in lengths:
        for name, tokenizer in tokenizers.items():
            if tokenizer.file_size(tokenizer.check_length(length)) != first.file_size(length):
                raise PruneZooError(f"{name}: {length} tokens are not as many bytes as the first's: measure them apart")
    record = {
        "command": shlex.join(["python", "-m", "trainers.codec", *words]),
        "images": args.images.name,
        "split": args.split,
        "n": len(pictures),
        "versions": versions(),
        **quality_record(tokenizers, pictures, lengths),
    }
    print_rows(record["rows"], ["codec", "tokens", "bytes", "fits", *METRICS])
    if args.json:
        write_record(record, args.json)
    if args.report:
        args.report.mkdir(parents=True, exist_ok=True)
        draw_curves(record, args.report / "curves.png")
        which = range(0, len(pictures), max(len(pictures) // PICTURES, 1))[:PICTURES]
        draw_pictures(first, [pictures[i] for i in which], shown_lengths(first)).save(args.report / "pictures.png")


def speed(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Pictures a second."""
    check_at_least_one(args, "batch", "repeats")
    check_device(args.device)
    check_output("--json", args.json)
    hold("--json", args.json)
    tokenizer = load(args.tokenizer).to(args.device)
    rows = speed_rows(tokenizer, args.batch, args.repeats)
    print_rows(rows, list(rows[0]))
    if args.json:
        facts = {"weights": weights_digest(args.tokenizer), "device": args.device, "threads": torch.get_num_threads()}
        facts |= {"batch": args.batch, "image_size": tokenizer.config.image_size}
        head = {"command": shlex.join(["python", "-m", "trainers.codec", *words]), **facts, "versions": versions()}
        write_record({**head, "rows": rows}, args.json)


def card(args: argparse.Namespace, words: Sequence[str]) -> None:
    """The model card. What is not given stays as it is in the folder's own metrics."""
    measured = {name: read_measurement(path) for name in ("quality", "speed") if (path := getattr(args, name))}
    given = {**measured, **({"photographs": args.photographs} if args.photographs else {})}
    own = args.folder / METRICS_FILE
    metrics = {**(read_measurement(own) if own.is_file() else {}), **given}
    for name in ("quality", "speed", "photographs"):
        if name not in metrics:
            raise PruneZooError(f"{own}: there is no '{name}' in it: give --{name}")
    for path in write_card(args.folder, metrics["quality"], metrics["speed"], metrics["photographs"]):
        print(path)


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
