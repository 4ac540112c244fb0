"""The one exception that users see."""

LONGEST = 1000


class PruneZooError(ValueError):
    """A mistake that the caller can mend: one line that names the file, the key or the value, and the remedy.

    What a message quotes may come out of a stranger's file: it is brought to one line of printable characters. An error
    out of a loader's worker is made anew by torch, with the worker's whole traceback for a message, of which the last
    line is the error's own.
    """

    def __init__(self, message: object) -> None:
        text = str(message)
        if text.startswith("Caught ") and " in DataLoader worker " in text:
            text = text.strip().splitlines()[-1].partition(": ")[2]
        line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        super().__init__(line if len(line) <= LONGEST else f"{line[:LONGEST]}…")
