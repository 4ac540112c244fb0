"""The one exception that users see."""


class PruneZooError(ValueError):
    """A mistake that the caller can mend: one line that names the file, the key or the value, and the remedy."""
