"""The parts of a vision-language model: tower, decoder, adapters."""
