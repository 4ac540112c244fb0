"""The cards of all shipped pruners, rendered anew from their records: after what several of them tell has changed.

python -m trainers.upkeep.cards     such as the times, which `make speed` measures
"""

import argparse
from collections.abc import Sequence

from trainers.cards.cards import SHIPPED, write_card
from trainers.cards.parts import METRICS_FILE
from trainers.cli.errors import command
from trainers.evaluation.record import read_record
from trainers.evaluation.summary import read_zoo


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the cards."""
    argparse.ArgumentParser(prog="python -m trainers.upkeep.cards", description="Render all shipped cards.").parse_args(
        argv
    )
    for name in read_zoo().shipped:
        folder = SHIPPED / name
        write_card(folder, read_record(folder / METRICS_FILE))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
