"""Where tokens go: in the tower, in front of the language model, between its layers."""
