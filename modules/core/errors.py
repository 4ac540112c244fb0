"""The one exception that users see."""

LONGEST = 1000


class PruneZooError(ValueError):
    """A mistake that the caller can mend: one line that names the file, the key or the value, and the remedy.

    What a message quotes may come out of a stranger's file: it is brought to one line of printable characters.
    """

    def __init__(self, message: object) -> None:
        line = " ".join("".join(c if c.isprintable() else " " for c in str(message)).split())
        super().__init__(line if len(line) <= LONGEST else f"{line[:LONGEST]}…")
