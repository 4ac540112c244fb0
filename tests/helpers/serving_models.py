"""Tiny random models of the families that are served, on disk with their processors, as a server finds any model.

They are those of `families`, with heads as wide as vLLM's attention knows. A prompt is made of words and pictures.
"""

from pathlib import Path

import numpy as np
import torch
from families import FAMILIES
from families.base import WORD
from PIL import Image
from processors import PLAIN, QWEN, make, tokenizer

SIZES = {"llava_next": [(48, 48), (48, 24), (30, 48)], "llava_onevision": [(48, 48), (24, 48), (40, 30)]}
QWEN_SIZES = [(48, 40), (64, 32), (32, 48)]
"""Of pictures, (height, width): several grids, so that requests of several are encoded together."""


def write(name, folder):
    """A model and its processor, with ``transformers`` alone."""
    from transformers import AutoModelForImageTextToText

    family = FAMILIES[name]
    config = family.config()
    text = config.get_text_config()
    text.update({"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32})
    if "mrope_section" in text.rope_parameters:
        text.rope_parameters = {**text.rope_parameters, "mrope_section": [4, 6, 6]}
        width = "out_hidden_size" if hasattr(config.vision_config, "out_hidden_size") else "hidden_size"
        setattr(config.vision_config, width, text.hidden_size)
    torch.manual_seed(0)
    vlm = AutoModelForImageTextToText.from_config(config)
    for parameter in vlm.parameters():
        if parameter.dim() > 1:  # far from zero, so that what is kept shows in the answer
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    with torch.no_grad():
        vlm.lm_head.weight[:WORD] = 0  # it answers in words
    vlm.save_pretrained(folder)
    processor(name).save_pretrained(folder)


def processor(name):
    """Whole, also with the half that reads clips, as one finds it on the Hub."""
    made, _ = make(name)
    if name not in ("llava_onevision", "qwen2_vl", "qwen2_5_vl"):
        return made
    from transformers import (
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2_5_VLProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    if name == "llava_onevision":
        return LlavaOnevisionProcessor(
            made.image_processor, tokenizer(PLAIN, image_token="<image>"), LlavaOnevisionVideoProcessor(),
            num_image_tokens=16, vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_2",
        )  # fmt: skip
    kind = Qwen2VLProcessor if name == "qwen2_vl" else Qwen2_5_VLProcessor
    return kind(made.image_processor, tokenizer(QWEN), Qwen2VLVideoProcessor())


def prompts(name, count, images=1):
    """Prompts as text, each with its pictures."""
    _, placeholder = make(name)
    noise = np.random.default_rng(0)
    sizes = SIZES.get(name, QWEN_SIZES if name.startswith("qwen") else [(24, 24)])
    found = []
    for i in range(count):
        words = [f"w{word}" for word in noise.integers(WORD, 64, 3 + images)]
        for place in range(images):
            words.insert(2 * place + 1, placeholder)
        own = [sizes[(i + place) % len(sizes)] for place in range(images)]
        pictures = [Image.fromarray(noise.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in own]
        found.append((" ".join(["<s>", *words]), pictures))
    return found


def exists(folder):
    """Whether :func:`write` has been there."""
    return (Path(folder) / "processor_config.json").exists()
