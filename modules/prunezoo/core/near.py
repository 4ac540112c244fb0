"""What somebody may have meant who mistyped a name."""

import difflib
from collections.abc import Iterable


def near(name: object, known: Iterable[str], listed: bool = True) -> str:
    """The end of a message about a name that is none: ``; did you mean 'ppm'?``, or ``; there are: …``.

    Args:
        name: What was given.
        known: What there is.
        listed: False where the list would be too long for a line; the message then says itself where they are.
    """
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; there are: {', '.join(known) or 'none'}" if listed else ""
