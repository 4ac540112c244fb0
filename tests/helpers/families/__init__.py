"""Tiny random models of every supported family, and batches as the family's processor would make them, straight as
tensors: no tokenizer, no image files, no network. test_families_processors.py holds them against the real processors.

    tiny = tiny_family("qwen3_vl")
    batch = tiny.batch([Sample(images=((48, 40),), words=5), Sample(words=3)])
    tiny.vlm(**batch)

Sizes of pictures are ``(height, width)`` in pixels. They matter where a family reads any resolution, and are ignored
where it reads one.
"""

import inspect
from functools import cache

import pytest
import torch

from prunezoo.host.families.base import TAKES_FEATURES

from .base import IMAGE, SIDE, VIDEO, Family, Sample
from .gemma import Gemma3, PaliGemma
from .llava import LlavaNext, LlavaOnevision, LlavaSiglip
from .qwen import Qwen2VL, Qwen3VL, Qwen25VL
from .shuffled import Idefics3, InternVL, SmolVLM

__all__ = [
    "CLIPS",
    "FAMILIES",
    "IMAGE",
    "LARGE",
    "MIXED",
    "ONE_EACH",
    "QWEN",
    "SIDE",
    "SMALL",
    "TALL",
    "VIDEO",
    "VIDEO_FAMILIES",
    "WIDE",
    "Sample",
    "here",
    "tiny_family",
]

FAMILIES: dict[str, Family] = {
    "llava": Family(),
    "llava_siglip": LlavaSiglip(),
    "llava_next": LlavaNext(),
    "llava_onevision": LlavaOnevision(),
    "qwen2_vl": Qwen2VL(),
    "qwen2_5_vl": Qwen25VL(),
    "qwen3_vl": Qwen3VL(),
    "internvl": InternVL(),
    "idefics3": Idefics3(),
    "smolvlm": SmolVLM(),
    "gemma3": Gemma3(),
    "paligemma": PaliGemma(),
}
VIDEO_FAMILIES = [name for name, family in FAMILIES.items() if family.videos]
QWEN = [name for name in FAMILIES if name.startswith("qwen")]

LARGE, WIDE, TALL, SMALL = (48, 40), (24, 48), (48, 24), (24, 24)
ONE_EACH = [Sample((size,), words) for size, words in ((LARGE, 5), (WIDE, 3), (TALL, 6), (SMALL, 4))]
MIXED = [Sample((LARGE,), 5), Sample((), 3), Sample((WIDE, SMALL), 6), Sample((TALL,), 4)]
CLIPS = [Sample((LARGE,), 5, (4,)), Sample((), 4, (4,)), Sample((), 3), Sample((SMALL,), 4)]


@cache
def tiny_family(name: str) -> Family:
    """One of FAMILIES, whose model has been seen to use its pictures; made once a session."""
    family = FAMILIES[name]
    sample = Sample(images=(LARGE,), words=4)
    batch, other = family.batch([sample]), family.batch([sample], seed=1)
    pixels = {key: value for key, value in other.items() if key.startswith("pixel")}
    words = batch["input_ids"] != IMAGE
    text = {key: batch[key][words][None] for key in ("input_ids", "attention_mask", "token_type_ids") if key in batch}
    with torch.no_grad():
        logits = family.vlm(**batch).logits[:, -1]
        changed, dropped = family.vlm(**{**batch, **pixels}).logits[:, -1], family.vlm(**text).logits[:, -1]
    # Without this every comparison of logits could hold by vacuity.
    assert (logits - changed).abs().max() > 0.05, "the picture does not reach the logits"
    assert (logits - dropped).abs().max() > 0.05, "dropping the picture changes nothing"
    return family


def here(name: str) -> Family:
    """A family, unless the release of `transformers` at hand is too old for it, which the matrix sees refused."""
    embeddings = "inputs_embeds" in inspect.signature(FAMILIES[name].vlm.prepare_inputs_for_generation).parameters
    if not TAKES_FEATURES and (name == "qwen3_vl" or not embeddings):
        pytest.skip(f"{name} needs transformers 5.19 or later")
    return tiny_family(name)
