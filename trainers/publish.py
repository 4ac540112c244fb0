"""Publish a pruner or tokenizer on the Hugging Face Hub: `python -m trainers.publish CHECKPOINT_DIR ORG/NAME`.

Only what loads strictly and was measured with these very weights is uploaded, with its card rendered anew, and only the
files that belong to it: in one commit, which gets the next tag (`v1`, `v2`, …). The same content is not uploaded twice.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from prunezoo.core.hub import read_method
from prunezoo.core.upload import upload
from trainers.cli.errors import command
from trainers.cli.names import find_pruner
from trainers.cli.terminal import Terminal
from trainers.publishing.package import check, show


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Publish, or with --dry-run only say what would be published."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.publish", description="Publish a pruner or tokenizer on the Hub."
    )
    p.add_argument("folder", type=Path, help="its folder, or the short name of one that ships")
    p.add_argument("repo", help="ORG/NAME on the Hub")
    p.add_argument("--dry-run", action="store_true", help="check, and show what would be uploaded")
    p.add_argument("--private", action="store_true", help="make a new repository private")
    args = p.parse_args(argv)
    package = check(Path(find_pruner(str(args.folder))), args.repo)
    console = Terminal()
    show(package, console)
    if args.dry_run:
        console.print("dry run: nothing was uploaded")
    else:
        method = package.module.name
        published = upload(package.repo, lambda _: package.files, method, read_method, args.private)
        word = "published" if published.is_new else "unchanged, nothing was uploaded"
        console.print(f"{word}: {published.address} (revision {published.tag})", soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
