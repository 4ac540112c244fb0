"""Which items of a training split are worth training on: `trainers.select` asks, and writes a list of them.

`clusters.py` groups items that are alike; `random_choice.py`, `prototype.py` and `density.py` choose; `chosen.py` is
the list that a recipe takes as `data.only`. What items are like is said by `trainers/caches/embeddings.py`.
"""
