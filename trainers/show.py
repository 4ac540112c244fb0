"""Look at what a pruner keeps: `python -m trainers.show IMAGE "question"` answers with all tokens and with few.

    python -m trainers.show scenes:3                                 the picture and question 3 of a suite's test split
    python -m trainers.show photo.jpg "what is it?" --vlm V --pruner P --keep 64 1/9
    python -m trainers.show --serve                                  the same in a browser, on this machine only

The picture of what is kept is written to `--out`.
"""

import argparse
import base64
import binascii
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.table import Table

from prunezoo.core.errors import PruneZooError
from trainers.cli.errors import check_output, command, one_line
from trainers.cli.names import find_pruner, find_vlm
from trainers.cli.options import add_option
from trainers.data.suite import Item, list_suites, load_suite
from trainers.evaluation.budgets import parse_budgets
from trainers.evaluation.examples import Example, answer_of, show_examples
from trainers.evaluation.loading import load_vlm
from trainers.evaluation.methods import Method, build_method
from trainers.evaluation.pictures import data_uri
from trainers.evaluation.report import page_templates
from trainers.evaluation.sheet import draw_sheet
from trainers.evaluation.tables import display_name

MOST_BYTES = 20 << 20
"""Of a picture that the page sends."""
KEEPS = ("1/3", "1/9", "1/18")


def read_item(picture: str, question: str | None) -> Item:
    """A picture and a question about it.

    Args:
        picture: a file, or `SUITE:NUMBER` for an item of a suite's test split, which brings its own question.
        question: what to ask; None: the item's own.

    Raises:
        PruneZooError: no picture, or a file without a question.
    """
    suite, colon, number = picture.partition(":")
    if colon and suite in list_suites():
        if not number.isdigit():
            raise PruneZooError(f"{picture}: an item of a suite is written {suite}:3")
        items = load_suite(suite, "test")
        if int(number) >= len(items):
            raise PruneZooError(f"{picture}: the suite has items 0 to {len(items) - 1}")
        item = items[int(number)]
        return item if question is None else replace(item, turns=((question, ""),), relevant=None)
    if question is None and number.isdigit():
        raise PruneZooError(f"{picture}: no suite is called '{suite}'; there are: {', '.join(list_suites())}")
    if question is None:
        raise PruneZooError(f'{picture}: what is the question? python -m trainers.show {picture} "what is it?"')
    try:
        with Image.open(picture) as image:
            return Item(picture, image.convert("RGB"), ((question, ""),), "")
    except FileNotFoundError:
        raise PruneZooError(f"{picture}: no such file; an item of a suite is written scenes:3") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise PruneZooError(f"{picture}: not a picture that can be read ({one_line(error)})") from None


def look(vlm: Any, processor: Any, item: Item, methods: Sequence[Method], keeps: Sequence[str]) -> Example:
    """What each method keeps of a picture at each budget, and the answers, judged by the full model's if by no other.

    Raises:
        PruneZooError: a budget that is none, or a model or pruner that does not go with the other.
    """
    if not item.answer:
        item = replace(item, turns=(*item.turns[:-1], (item.question, answer_of(vlm, processor, item))))
    return show_examples(vlm, processor, [item], methods, parse_budgets(keeps))[0]


def print_example(example: Example, console: Console) -> None:
    """Print the answers."""
    tokens = example.grid[0] * example.grid[1]
    for asked, said in example.item.turns[:-1]:
        console.print(f"{asked} {said}", style="dim", highlight=False)
    console.print(f"[bold]{example.item.question}[/]", highlight=False)
    table = Table("pruner", "keep", "tokens", "answer")
    table.add_row("all tokens", "", str(tokens), example.answer)
    for shown in example.shown:
        style = "green" if shown.right else "red"
        table.add_row(display_name(shown.pruner), shown.keep, str(len(shown.kept)), f"[{style}]{shown.answer}[/]")
    console.print(table)


class Server(HTTPServer):
    """The page, with a frozen model and pruners behind it; one question at a time.

    Args:
        port: where to listen, on 127.0.0.1; 0: any that is free.
        vlm: the model.
        processor: its processor.
        methods: what can be chosen.
    """

    def __init__(self, port: int, vlm: Any, processor: Any, methods: Sequence[Method]) -> None:
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise PruneZooError(f"--port {port}: {error.strerror}; take another, or 0 for any that is free") from None
        self.vlm, self.processor = vlm, processor
        self.methods = {display_name(method.name): method for method in methods}
        self.sample = load_suite("scenes", "test")[0]

    def page(self) -> str:
        """The page."""
        return (
            page_templates()
            .get_template("show.html.j2")
            .render(
                vlm=self.vlm.name_or_path,
                pruners=list(self.methods),
                sample={"picture": data_uri(self.sample.image), "question": self.sample.question},
            )
        )

    def answer(self, asked: Any) -> dict[str, Any]:
        """What the page asked for: `{picture, question, pruner, keep}`, the picture as a data URI.

        Raises:
            PruneZooError: something of it cannot be read.
        """
        keys = ("picture", "question", "pruner", "keep")
        if not isinstance(asked, dict) or not all(isinstance(asked.get(key), str) for key in keys):
            raise PruneZooError(f"a question has {', '.join(keys)}, all texts")
        if asked["pruner"] not in self.methods:
            raise PruneZooError(f"no pruner '{asked['pruner']}' here; there are: {', '.join(self.methods)}")
        if not asked["question"].strip():
            raise PruneZooError("what is the question?")
        try:
            data = base64.b64decode(asked["picture"].partition(",")[2], validate=True)
            image = Image.open(io.BytesIO(data)).convert("RGB")
        except (binascii.Error, UnidentifiedImageError, OSError, Image.DecompressionBombError):
            raise PruneZooError("that is not a picture that can be read") from None
        method = self.methods[asked["pruner"]]
        item = Item("asked", image, ((asked["question"].strip(), ""),), "")
        example = look(self.vlm, self.processor, item, [method], [asked["keep"]])
        (shown,) = example.shown
        kept = [int(row * example.grid[1] + column) for row, column in shown.kept]
        facts = {"grid": example.grid, "kept": kept, "anchors": shown.anchors, "tokens": len(kept)}
        return {**facts, "answer": shown.answer, "full": example.answer, "same": shown.right}


class Handler(BaseHTTPRequestHandler):
    """GET / is the page, POST /answer a question."""

    server: Server

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """The page, and nothing else."""
        if self.path == "/":
            self.reply(200, "text/html; charset=utf-8", self.server.page().encode())
        else:
            self.reply(404, "text/plain", b"there is one page: /")

    def do_POST(self) -> None:
        """Answer; what cannot be answered comes back as `{error}` in one line."""
        size = int(self.headers.get("Content-Length") or 0)
        # a page of another origin cannot send JSON here without being asked first, which this server never allows
        if self.path != "/answer" or size > MOST_BYTES or self.headers.get("Content-Type") != "application/json":
            self.reply(400, "application/json", b'{"error": "not a question, or a picture of more than 20 MiB"}')
            return
        try:
            status, answer = 200, self.server.answer(json.loads(self.rfile.read(size)))
        except (PruneZooError, ValueError) as error:
            status, answer = 400, {"error": one_line(error)}
        self.reply(status, "application/json", json.dumps(answer).encode())

    def reply(self, status: int, kind: str, body: bytes) -> None:
        """Send."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.show", description="Show what pruners keep of a picture, and the answers that follow."
    )
    p.add_argument("picture", nargs="?", metavar="IMAGE", help="a file, or scenes:3 for an item of a suite")
    p.add_argument("question", nargs="?", metavar="QUESTION", help="by default the item's own")
    for name, default in {"vlm": "tiny-llava", "pruner": ["ppm"], "keep": list(KEEPS)}.items():
        add_option(p, name, default=default)
    p.add_argument("--out", type=Path, default=Path("runs/show.png"), help="the picture that is written")
    p.add_argument("--serve", action="store_true", help="a page on this machine instead")
    p.add_argument("--port", type=int, default=7860, help="of that page")
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Show, or serve until Ctrl-C."""
    args = parser().parse_args(argv)
    if not 0 <= args.port < 2**16:
        raise PruneZooError(f"--port {args.port}: a port is a number from 0 to 65535")
    if not args.serve and args.picture is None:
        raise PruneZooError("which picture? python -m trainers.show scenes:3, or --serve for a page")
    check_output("--out", args.out)
    if args.out.suffix.lower() not in Image.registered_extensions():
        raise PruneZooError(f"--out {args.out}: not the name of a picture; name it .png, .jpg or .webp")
    item = None if args.serve else read_item(args.picture, args.question)
    parse_budgets(args.keep)  # before anything is loaded
    names = [find_pruner(name) for name in args.pruner]
    vlm, processor = load_vlm(find_vlm(args.vlm))
    methods = [build_method(name) for name in names]
    console = Console()
    if item is None:
        with Server(args.port, vlm, processor, methods) as server:
            console.print(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C ends it)", highlight=False)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                return 0
    else:
        example = look(vlm, processor, item, methods, args.keep)
        print_example(example, console)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet([example], *(method.name for method in methods)).save(args.out)
        console.print(f"picture: {args.out}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
