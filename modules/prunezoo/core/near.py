"""What somebody may have meant who mistyped a name."""

import difflib
from collections.abc import Iterable


def near(name: object, known: Iterable[str]) -> str:
    """The end of a message about a name that is none: ``; did you mean 'ppm'?``, or ``; there are: …``."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; there are: {', '.join(known) or 'none'}"
