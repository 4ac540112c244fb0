"""Methods that make new tokens, one file each."""
