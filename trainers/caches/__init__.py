"""What the frozen model said, kept on disk."""
