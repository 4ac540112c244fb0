"""The tokenizer as a codec: compress and decompress files, measure quality, speed and what the codes tell.

    python -m trainers.codec compress IN OUT --bytes 96 --tokenizer checkpoints/one-d-piece-tiny
    python -m trainers.codec decompress IN OUT --tokenizer checkpoints/one-d-piece-tiny
    python -m trainers.codec measure --tokenizer F [F2 …] --images PHOTOGRAPHS [--bytes 32 64] [--json F] [--report DIR]
    python -m trainers.codec probe --tokenizer F [F2 …] --images PHOTOGRAPHS [--bytes 32 64] [--json F]
    python -m trainers.codec speed --tokenizer F [--json F]
    python -m trainers.codec pictures FOLDER --suite scenes --split train --limit 8000
    python -m trainers.codec card F --quality JSON --speed JSON --photographs "what they are"

A tokenizer that reads a text wants `--text` to compress, and the same to decompress: the file does not have it, and
beside another text it paints another picture. `measure` and `probe` read captions, `NAME.txt` beside `NAME.jpg`.

`measure` paints held-out photographs from prefixes of their rows, tokenizers of any kinds beside JPEG and WebP within
the same bytes, headers included. `probe` fits a line from what the codes stand for to the class of a photograph, which
is the name of its folder. `pictures` writes a suite's pictures, and captions where it has them, as such photographs: a
tokenizer that is trained on them paints what the suite's model can read. `card` writes the tokenizer's model card from
what `measure` and `speed` wrote, and later anew from the folder's own metrics, or from those but for what is given.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from prunezoo.core.errors import PruneZooError
from prunezoo.tokenizers.base import Text, Tokenizer, load_tokenizer
from trainers.cards.parts import METRICS_FILE, weights_digest
from trainers.cli.errors import check_output, command
from trainers.cli.lock import hold
from trainers.cli.names import find_pruner, find_vlm
from trainers.cli.options import add_option, check_at_least_one
from trainers.compression.card import read_measurement, write_card
from trainers.compression.figures import draw_curves, draw_pictures
from trainers.compression.measure import shown_lengths
from trainers.compression.probe import Side, label, probe_record
from trainers.compression.quality import METRICS
from trainers.compression.records import print_rows, progress, quality_record, speed_rows
from trainers.compression.suite_pictures import write_pictures
from trainers.compression.texts import captions_for, same_text
from trainers.data.photographs import Photographs, photographs, spread
from trainers.data.pictures import BrokenImage, open_picture
from trainers.data.suite import SPLITS, list_suites
from trainers.evaluation.loading import check_device, default_device, load_vlm
from trainers.evaluation.record import versions, write_record
from trainers.evaluation.run import read_suite
from trainers.training.sight import Sight

WORDS = "whose words a tokenizer that reads a text was trained beside; by default tiny-llava"
CAPTIONS = "folder with NAME.txt for each NAME.jpg, for a tokenizer that reads a text; by default beside the pictures"
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
    one.add_argument("--text", help="what is on the picture, for a tokenizer that reads a text; both ways the same")
    add_option(one, "vlm", default="tiny-llava", help=WORDS)
    compress = commands.add_parser("compress", parents=[one], help="a picture to a file of so many bytes")
    compress.add_argument("--bytes", type=int, required=True, help="of the whole file")
    commands.add_parser("decompress", parents=[one], help="such a file to a picture")
    several = argparse.ArgumentParser(add_help=False)
    add_option(several, "tokenizer", nargs="+", required=True, help="folders or Hub ids; the first is drawn")
    several.add_argument("--images", type=Path, required=True, help="folder of photographs")
    several.add_argument("--captions", type=Path, metavar="FOLDER", help=CAPTIONS)
    add_option(several, "vlm", default="tiny-llava", help=WORDS)
    add_option(several, "json")
    measure = commands.add_parser("measure", parents=[several], help="quality at equal bytes, beside JPEG and WebP")
    add_option(measure, "split", choices=SPLITS)
    add_option(measure, "limit", default=256, help="photographs, evenly over the folder")
    sizes = measure.add_mutually_exclusive_group()
    sizes.add_argument("--bytes", nargs="+", type=int, help="of a whole file; each codec has the best that fits")
    sizes.add_argument(
        "--length", nargs="+", type=int,
        help=f"the bytes of so many tokens of the first; by default {' '.join(map(str, LENGTHS))} and its whole row",
    )  # fmt: skip
    add_option(measure, "report", help="write curves and pictures into this folder")
    probe = commands.add_parser("probe", parents=[several], help="the class of a photograph, told from its codes")
    add_option(probe, "split", choices=SPLITS[1:], help="which judges; the probes are fitted on train")
    add_option(probe, "limit", default=4096, help="photographs of each split, evenly over the folder")
    probe.add_argument("--bytes", nargs="+", type=int, help="of a whole file; by default each tokenizer's whole row")
    speed = commands.add_parser("speed", help="pictures a second, beside the bare ViT")
    add_option(speed, "tokenizer", required=True)
    speed.add_argument("--text", help="beside each picture, for a tokenizer that reads a text")
    add_option(speed, "vlm", default="tiny-llava", help=WORDS)
    add_option(speed, "batch", default=8)
    speed.add_argument("--repeats", type=int, default=10)
    add_option(speed, "device", default=default_device())
    add_option(speed, "json")
    pictures = commands.add_parser("pictures", help="a suite's pictures as files, with captions where it has them")
    pictures.add_argument("target", type=Path, metavar="FOLDER", help="where; goes on there")
    add_option(pictures, "suite", nargs="+", required=True, help=f"one of {', '.join(list_suites())}")
    for name in ("suite-option", "limit"):
        add_option(pictures, name)
    add_option(pictures, "split", choices=SPLITS)
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
    tokenizer = load(args.tokenizer)
    data = tokenizer.compress(picture, args.bytes, same_text(tokenizer, args.text, args.vlm))
    args.target.write_bytes(data)
    print(f"{args.target}: {len(data)} bytes")


def decompress(args: argparse.Namespace, words: Sequence[str]) -> None:
    """A file to a picture."""
    try:
        data = args.source.read_bytes()
    except OSError as error:
        raise PruneZooError(f"{args.source}: {error.strerror}") from None
    tokenizer = load(args.tokenizer)
    text = same_text(tokenizer, args.text, args.vlm)
    try:
        picture = tokenizer.decompress(data, text)
    except PruneZooError as error:
        raise PruneZooError(f"{args.source}: {error}") from None
    try:
        picture.save(args.target)
    except ValueError as error:  # no known suffix
        raise PruneZooError(f"{args.target}: {error}; name it .png, .jpg or .webp") from None
    print(f"{args.target}: {picture.width} x {picture.height} pixels")


def load_several(args: argparse.Namespace) -> tuple[dict[str, Tokenizer], Tokenizer]:
    """The tokenizers that are named, all of one image size; and the first of them."""
    tokenizers = {name: load(name) for name in args.tokenizer}
    sizes = {name: tokenizer.config.image_size for name, tokenizer in tokenizers.items()}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise PruneZooError(f"tokenizers of different image_size cannot be measured together ({said})")
    return tokenizers, next(iter(tokenizers.values()))


def measure(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Quality against bytes."""
    check_at_least_one(args, "limit", *(["bytes"] if args.bytes else []))
    check_output("--json", args.json)
    hold("--json", args.json)
    check_output("--report", args.report, folder=True)
    tokenizers, first = load_several(args)
    pictures = Photographs(spread(photographs(args.images, args.split), args.limit), first.config.image_size)
    whole = first.config.tokens
    lengths = args.length or [*(length for length in LENGTHS if length < whole), whole]
    sizes = sorted({*(args.bytes or (first.file_size(first.check_length(length)) for length in lengths))})
    texts = captions_for(tokenizers, pictures.paths, args.images, args.captions, args.vlm)
    record = {
        "command": shlex.join(["python", "-m", "trainers.codec", *words]),
        "images": args.images.name,
        "split": args.split,
        "n": len(pictures),
        "versions": versions(),
        **quality_record(tokenizers, pictures, sizes, texts),
    }
    print_rows(record["rows"], ["codec", "tokens", "bytes", "fits", *METRICS])
    if args.json:
        write_record(record, args.json)
    if args.report:
        args.report.mkdir(parents=True, exist_ok=True)
        draw_curves(record, args.report / "curves.png")
        which = range(0, len(pictures), max(len(pictures) // PICTURES, 1))[:PICTURES]
        sheet = draw_pictures(first, [pictures[i] for i in which], shown_lengths(first), texts(first, which))
        sheet.save(args.report / "pictures.png")


def probe(args: argparse.Namespace, words: Sequence[str]) -> None:
    """What a line through the codes tells."""
    check_at_least_one(args, "limit", *(["bytes"] if args.bytes else []))
    check_output("--json", args.json)
    hold("--json", args.json)
    tokenizers, first = load_several(args)
    paths = [spread(photographs(args.images, split), args.limit) for split in ("train", args.split)]
    classes, labels = label(args.images, paths)
    train, held_out = (
        Side(
            Photographs(own, first.config.image_size),
            of,
            captions_for(tokenizers, own, args.images, args.captions, args.vlm),
        )
        for own, of in zip(paths, labels, strict=True)
    )
    sight = Sight(*load_vlm(args.vlm, "cpu", "float32"), f"--vlm {args.vlm}")
    with progress(sum(map(len, paths)) * (len(tokenizers) + 1)) as advance:
        budgets = sorted({*args.bytes}) if args.bytes else [None]
        found = probe_record(tokenizers, train, held_out, budgets, sight, advance)
    record = {
        "command": shlex.join(["python", "-m", "trainers.codec", *words]),
        "images": args.images.name,
        "split": args.split,
        "classes": len(classes),
        "n": {"train": len(paths[0]), args.split: len(paths[1])},
        "versions": versions(),
        "kinds": {name: tokenizer.name for name, tokenizer in tokenizers.items()},
        "weights": {name: weights_digest(name) for name in [*tokenizers, args.vlm]},
        **found,
    }
    rows = [{**row, "low": row["ci"][0], "high": row["ci"][1]} for row in record["rows"]]
    print_rows(rows, ["probe", "reads", "tokens", "bytes", "numbers", "c", "accuracy", "low", "high"])
    print(f"chance, always naming the commonest of {len(classes)} classes: {record['chance']:.3f}")
    if args.json:
        write_record(record, args.json)


def speed(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Pictures a second."""
    check_at_least_one(args, "batch", "repeats")
    check_device(args.device)
    check_output("--json", args.json)
    hold("--json", args.json)
    tokenizer = load(args.tokenizer).to(args.device)
    text = same_text(tokenizer, args.text, args.vlm, args.batch)
    rows = speed_rows(tokenizer, args.batch, args.repeats, text and Text(*(part.to(args.device) for part in text)))
    print_rows(rows, list(rows[0]))
    if args.json:
        facts = {"weights": weights_digest(args.tokenizer), "device": args.device, "threads": torch.get_num_threads()}
        facts |= {"batch": args.batch, "image_size": tokenizer.config.image_size}
        head = {"command": shlex.join(["python", "-m", "trainers.codec", *words]), **facts, "versions": versions()}
        write_record({**head, "rows": rows}, args.json)


def pictures(args: argparse.Namespace, words: Sequence[str]) -> None:
    """A suite's pictures as files."""
    if args.limit is not None:
        check_at_least_one(args, "limit")
    suite = read_suite(args.suite, args.suite_option, args.split, args.limit)
    with progress(len(suite)) as advance:
        captioned = write_pictures(suite, args.target, advance)
    print(f"{args.target}: {len(suite)} pictures, {captioned} with a caption")


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
    if args.command not in ("card", "pictures"):
        named = args.tokenizer
        args.tokenizer = find_pruner(named) if isinstance(named, str) else [find_pruner(name) for name in named]
        args.vlm = find_vlm(args.vlm)
    {run.__name__: run for run in (compress, decompress, measure, probe, speed, pictures, card)}[args.command](
        args, words
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
