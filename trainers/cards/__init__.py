"""Model cards, rendered from measured records."""
