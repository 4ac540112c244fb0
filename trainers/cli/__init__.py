"""What the commands have in common: names, errors, options."""
