"""Whether records were measured on the same suite, of the same version, scored alike: no table mixes others."""

from collections.abc import Mapping, Sequence
from typing import Any

from prunezoo.core.errors import PruneZooError

SUITE = ("suite", "suite_version", "scorer")
"""What a record says of it."""


def suite_of(record: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """What a record was measured on: suite, its version and its scorer. Older records say nothing of the last two."""
    return record["suite"], record.get("suite_version", "1"), record.get("scorer")


def check_same_suite(records: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to put records of different suites, versions or scorers into one table.

    Raises:
        PruneZooError: the commands of two that differ, and in what.
    """
    for record in records[1:]:
        for what, own, first in zip(SUITE, suite_of(record), suite_of(records[0]), strict=True):
            if own != first:
                raise PruneZooError(
                    f"{record['command']}: {what} is {own}, that of {records[0]['command']} is {first}: they do not "
                    "compare; measure it anew"
                )
