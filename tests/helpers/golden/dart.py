"""DART: 170 tokens of which 11 to 154 are the image's; random states and keys, in some cases with near duplicates."""

import numpy as np
import torch

from prunezoo import PruneInputs, build_pruner
from prunezoo.training_free.dart import largest, set_order

INPUTS = ("seed", "mode", "value", "pivot_image", "pivot_text")
AHEAD, IMAGE, LENGTH = 11, 144, 170
DUPLICATED = (3, 4, 5)  # seeds


def parts(values):
    """Of the image, and of the words around it."""
    image = slice(AHEAD, AHEAD + IMAGE)
    return values[:, image], torch.cat([values[:, : image.start], values[:, image.stop :]], 1)


def answer(case):
    random = np.random.default_rng(case["seed"])
    states = random.standard_normal((1, LENGTH, 48)).astype("float32")
    if case["seed"] in DUPLICATED:
        centres = random.standard_normal((30, 48)).astype("float32")
        states = (centres[np.arange(LENGTH) % 30][None] + np.float32(0.4) * states).astype("float32")
    keys = random.standard_normal((1, 4, LENGTH, 8)).astype("float32")
    (image, words), (image_keys, word_keys) = (
        parts(torch.from_numpy(part)) for part in (states, keys.transpose(0, 2, 1, 3))
    )
    valid = torch.ones(1, IMAGE, dtype=torch.bool)
    text_valid = torch.ones(1, LENGTH - IMAGE, dtype=torch.bool)
    behind = torch.arange(LENGTH - IMAGE)[None] >= AHEAD
    signals = {
        "layer_keys@previous": image_keys,
        "normed_states": image,
        "word_layer_keys@previous": word_keys,
        "word_normed_states": words,
        "word_behind": behind.float(),
    }
    inputs = PruneInputs(image, valid, torch.zeros(1, IMAGE, 3).long(), words, text_valid, signals)
    of_image, of_text = case.get("pivot_image", 4), case.get("pivot_text", 4)
    options = {"image_pivots": of_image, "text_pivots": of_text, "count": "floor"}
    wanted = case["value"] if case["mode"] == "max_num" else int(IMAGE * (1 - case["value"]))
    kept, by_norm = (build_pruner("dart", order=order, **options)(inputs, wanted).index[0] for order in ("set", "norm"))

    tokens, there = largest(image_keys, valid, torch.tensor([of_image]), of_image)
    asking, real = largest(word_keys, behind, torch.tensor([of_text]), of_text)
    numbers = torch.cat([tokens + AHEAD, asking + IMAGE], 1)
    order = set_order(numbers, torch.cat([there, real], 1))
    return {
        "pivots_in_order_used": numbers.gather(1, order)[0].tolist(),
        "each": (len(kept) - of_image) // (of_image + of_text),
        "count": len(kept),
        "kept": kept.tolist(),
        "same_if_pivots_go_by_norm": torch.equal(kept, by_norm),
    }
