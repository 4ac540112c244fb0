"""What can be read of a frozen model, for pruners that ask for it."""
