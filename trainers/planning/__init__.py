"""What a training will need, in numbers, before it starts."""
