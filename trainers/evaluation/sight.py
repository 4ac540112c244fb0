"""Where the full model may be no better than with zero tokens nothing can be retained: what is said in place of it."""

from collections.abc import Mapping
from typing import Any

from .record import MEAN, mean_row
from .scores import ALL_TOKENS, FULL, NO_TOKENS, NONE


def unseen(record: Mapping[str, Any]) -> list[str]:
    """The groups without retention: all, and `mean`, where nothing has any. Records of before say of none."""
    groups = [row["group"] for row in record.get("sight", ()) if row["ci"][0] <= 0]
    return [*record["groups"], MEAN] if MEAN in groups else groups


def is_blind(record: Mapping[str, Any]) -> bool:
    """Whether nothing in a record has a retention, so that nothing can be ranked."""
    return MEAN in unseen(record)


def sight_note(record: Mapping[str, Any]) -> str | None:
    """One sentence on what has no retention, and why; None where all has."""
    groups = unseen(record)
    if not groups:
        return None
    if MEAN not in groups:
        return (
            f"No retention in {', '.join(groups)}, which stay out of the mean: there the full model is not above zero "
            "tokens beyond the 95 % interval of the difference."
        )
    full, none = (100 * mean_row(record, *key)["accuracy"] for key in ((FULL, ALL_TOKENS), (NONE, NO_TOKENS)))
    if full == 0:
        return (
            "No retention and no ranking: with all its image tokens the model answers nothing right; see whether the "
            "suite and the chat template are right for it."
        )
    (gap,) = (row for row in record["sight"] if row["group"] == MEAN)
    low, high = gap["ci"]
    return (
        f"No retention and no ranking: the full model answers {full:.1f} % right and with zero tokens {none:.1f} %, a "
        f"difference of {gap['difference']:+.1f} points whose 95 % interval, {low:+.1f} to {high:+.1f}, reaches 0."
    )


def left_out_note(record: Mapping[str, Any]) -> str | None:
    """One sentence on the rivals that this model cannot have; None where it can have all."""
    parts = [f"{row['pruner']} ({row['why']})" for row in record.get("left_out", ())]
    return f"Left out, since this model cannot have them: {'; '.join(parts)}." if parts else None


def scorer_note(record: Mapping[str, Any]) -> str | None:
    """One sentence on how written answers were scored; None where right is what greedy decoding writes exactly."""
    scorer = record.get("scorer")
    return f"Accuracy is the mean score, by `{scorer}`, of the answers that the model writes." if scorer else None


def notes_of(record: Mapping[str, Any]) -> list[str]:
    """What stands beside the numbers of a record: these sentences, as far as there is something to say."""
    return [note for note in (sight_note(record), left_out_note(record), scorer_note(record)) if note]
