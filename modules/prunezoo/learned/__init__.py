"""Methods with trained weights, one file each."""
