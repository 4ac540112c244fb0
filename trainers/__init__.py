"""Training, measuring and publishing of pruners; run from a clone, not part of the wheel."""
