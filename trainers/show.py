"""Look at what a pruner keeps: `python -m trainers.show IMAGE "question"` answers with all tokens and with few.

    python -m trainers.show scenes:3                                 the picture and question 3 of a suite's test split
    python -m trainers.show photo.jpg "what is it?" --vlm V --pruner P --keep 64 1/9
    python -m trainers.show --serve --beside divprune                the same in a browser, on this machine only
    python -m trainers.show --space runs/space --beside divprune     a folder that is that page as a Space of the Hub

The picture of what is kept is written to `--out`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from prunezoo.core.errors import PruneZooError
from trainers.cli.errors import check_output, command
from trainers.cli.names import find_pruner, find_vlm
from trainers.cli.options import add_option
from trainers.cli.terminal import Terminal
from trainers.evaluation.budgets import parse_budgets
from trainers.evaluation.loading import load_vlm
from trainers.evaluation.look import look, print_example, read_item
from trainers.evaluation.methods import build_method
from trainers.evaluation.sheet import draw_sheet
from trainers.publishing.space import write_space

KEEPS = ("1/3", "1/9", "1/18")


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
    p.add_argument("--beside", metavar="P", help="on that page, the pruner that is shown next to the first")
    p.add_argument("--port", type=int, default=7860, help="of that page")
    p.add_argument("--address", default="127.0.0.1", help="of that page; 0.0.0.0: every one that this machine has")
    p.add_argument(
        "--allow-host",
        nargs="+",
        default=[],
        metavar="NAME",
        help="further names by which the page may be asked for, behind a proxy or tunnel; by default localhost only",
    )
    p.add_argument("--space", type=Path, metavar="DIR", help="write a folder that is that page as a Space of the Hub")
    return p


def check(args: argparse.Namespace) -> None:
    """Refuse, before anything is loaded, what cannot be shown or written."""
    if not 0 <= args.port < 2**16:
        raise PruneZooError(f"--port {args.port}: a port is a number from 0 to 65535")
    page = args.serve or args.space is not None
    if not page and args.picture is None:
        raise PruneZooError("which picture? python -m trainers.show scenes:3, or --serve for a page")
    check_output("--space", args.space, folder=True)
    check_output("--out", args.out)
    if args.out.suffix.lower() not in Image.registered_extensions():
        raise PruneZooError(f"--out {args.out}: not the name of a picture; name it .png, .jpg or .webp")
    if args.beside is not None and not page:
        raise PruneZooError(f"--beside {args.beside}: for the page of --serve; here name several after --pruner")
    parse_budgets(args.keep)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Show, or serve until Ctrl-C."""
    args = parser().parse_args(argv)
    check(args)
    item = None if args.serve or args.space else read_item(args.picture, args.question)
    names = [find_pruner(name) for name in args.pruner]
    beside = None if args.beside is None else find_pruner(args.beside)
    names += [beside] if beside is not None and beside not in names else []
    console = Terminal()
    if args.space is not None:
        write_space(args.space, find_vlm(args.vlm), names, beside)
        console.print(f"space: {args.space}; hf upload ORG/NAME {args.space} . --repo-type space", highlight=False)
        return 0
    vlm, processor = load_vlm(find_vlm(args.vlm))
    methods = [build_method(name) for name in names]
    if item is None:
        from trainers.evaluation.web import Page, application, listen, server_of  # only a page needs a server

        page = application(Page(vlm, processor, methods, beside), args.allow_host)
        with listen(args.port, args.address) as socket:
            console.print(f"http://{args.address}:{socket.getsockname()[1]}/  (Ctrl-C ends it)", highlight=False)
            try:
                server_of(page).run(sockets=[socket])
            except KeyboardInterrupt:
                return 0
        return 0
    example = look(vlm, processor, item, methods, args.keep)
    print_example(example, console)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet([example], *(method.name for method in methods)).save(args.out)
    console.print(f"picture: {args.out}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
