"""The recipe that trained the embedded frozen VLM, checkpoints/tiny-llava."""
