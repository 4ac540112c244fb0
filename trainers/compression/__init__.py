"""What `python -m trainers.codec` measures with: metrics, rival codecs, timing and figures."""
