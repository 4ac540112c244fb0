"""The batches of `families.py` against what the families' own processors make.

SmolVLM's cannot be made without a package for spelling out numbers; its layout is that of Idefics3.
"""

import numpy as np
import pytest
import torch
from families import FAMILIES, Sample
from families.base import PAD, WORD
from PIL import Image
from processors import make

SAMPLES = [Sample(((48, 48), (24, 24)), 4), Sample(((48, 24),), 3), Sample((), 2)]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "smolvlm"])
def test_batches_are_those_of_the_processor(name):
    processor, placeholder = make(name)
    family = FAMILIES[name]
    texts, pictures, rows = [], [], []
    samples = SAMPLES[:2] if name == "paligemma" else SAMPLES  # it reads no prompt without a picture
    for sample in samples:
        words = list(range(WORD, WORD + sample.words))
        rows.append(family.prompt(sample, words))
        parts = [f"w{word}" for word in words]
        for place in range(len(sample.images)):
            parts.insert(0 if name == "paligemma" else 2 * place + 1, placeholder)
        texts.append(" ".join(parts if name == "paligemma" else ["<s>", *parts]))
        noise = np.random.default_rng(0)
        pictures.append([Image.fromarray(noise.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sample.images])
    given = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    made = family.batch(samples)
    for row, (ids, mask) in enumerate(zip(given["input_ids"], given["attention_mask"], strict=True)):
        assert ids[mask.bool()].tolist() == rows[row]
    assert given["input_ids"].shape == made["input_ids"].shape
    assert set(given) - {"labels"} == set(made)  # PaliGemma's gives labels where nobody asked for any
    for key, value in made.items():
        assert value.shape == given[key].shape and value.dtype == given[key].dtype, key
        if not key.startswith(("pixel_values", "input_ids")):
            assert torch.equal(value, given[key]), key
    assert processor.tokenizer.pad_token_id == PAD
