"""Methods without weights, one file each: rivals and baselines."""
