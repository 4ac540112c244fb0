"""The contract of a pruner, and the algebra and files around it. Nothing in here knows a vision-language model."""
