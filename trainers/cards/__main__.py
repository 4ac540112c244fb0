"""Render model cards from run record and measured evaluation; no number is written by hand.

    python -m trainers.cards checkpoints/ppm-tiny --json evaluation.json

writes `README.md` (the card) and `metrics.json` (the numbers behind it) into the folder and, for what ships in
`checkpoints/`, a copy of the card into `hub_cards/`. For the frozen model's own folder it is the instrument's card.
Without `--json` the card is rendered anew from the folder's own `metrics.json`; with `--league` from its record in
`hub_cards/league/` and those of its rivals, so that only it has to be measured. `--picture` draws what is kept.
"""

import argparse
import sys
from collections.abc import Sequence

from prunezoo.core.errors import PruneZooError
from trainers.cli.errors import command
from trainers.cli.names import find_folder
from trainers.cli.options import add_option
from trainers.evaluation.league import beside_rivals
from trainers.evaluation.record import read_record
from trainers.evaluation.sight import sight_note

from .cards import card_examples, write_card
from .parts import METRICS_FILE


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the card of a checkpoint folder."""
    p = argparse.ArgumentParser(prog="python -m trainers.cards", description="Write a pruner's model card.")
    p.add_argument("folder", help="the pruner's folder, or the name of a shipped one")
    add_option(p, "json", help="what `trainers.evaluate --json` wrote; by default the folder's own")
    p.add_argument("--league", action="store_true", help="of a shipped pruner: by the records of the league")
    p.add_argument("--picture", action="store_true", help="draw the picture of kept tokens anew")
    args = p.parse_args(argv)
    folder = find_folder(args.folder)
    if args.league and args.json:
        raise PruneZooError("--league and --json: give one of them")
    record = beside_rivals(folder.name) if args.league else read_record(args.json or folder / METRICS_FILE)
    examples = card_examples(folder, record) if args.picture else ()
    for path in write_card(folder, record, examples):
        print(path)
    note = sight_note(record)
    if note:
        print(f"warning: {note}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
