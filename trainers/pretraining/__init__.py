"""The recipes that trained the embedded frozen VLMs, checkpoints/tiny-llava and checkpoints/small-llava."""
