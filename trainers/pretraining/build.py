"""The embedded VLM before training: a LLaVA in transformers' own classes, its processor, and starts that learn fast."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as WordTokenizer
from tokenizers import models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trainers.data.scenes import WORDS
from trainers.data.scenes_dense import GRID, PATCH
from trainers.data.scenes_render import SIDE

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>")
WORD_IDS = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{{ '<user>' if message['role'] == 'user' else '<assistant>' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }} "
    "{% endif %}{% endfor %}{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the embedded VLM; widths of tower and language model in channels."""

    tower_width: int = 128
    tower_inner: int = 384
    tower_layers: int = 5
    width: int = 128
    inner: int = 320
    layers: int = 5
    heads: int = 4


def new_vlm(sizes: Sizes) -> LlavaForConditionalGeneration:
    """Build the VLM with random weights from torch's generator.

    Three starts make it learn in minutes what otherwise waits on a plateau: the tower's positions are sines and
    cosines of row and column, and queries and keys of every attention begin as one orthogonal map, so that patches look
    at their neighbours and words at patches like them (after mimetic initialisation, Trockman and Kolter,
    arXiv 2305.09828); the word embeddings are tied and of a size that the projector can reach.
    """
    vision = CLIPVisionConfig(
        hidden_size=sizes.tower_width, intermediate_size=sizes.tower_inner, num_hidden_layers=sizes.tower_layers,
        num_attention_heads=sizes.heads, image_size=SIDE, patch_size=PATCH, hidden_act="gelu",
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(WORD_IDS), hidden_size=sizes.width, intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads,
        tie_word_embeddings=True, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        pad_token_id=WORD_IDS["<pad>"], bos_token_id=WORD_IDS["<s>"], eos_token_id=WORD_IDS["</s>"],
    )  # fmt: skip
    vlm = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, image_token_id=WORD_IDS["<image>"], image_seq_length=GRID * GRID,
            vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=True,
        )
    )  # fmt: skip
    _start_tower(tower_of(vlm), sizes)
    _start_language(vlm, sizes)
    return vlm


def tower_of(vlm: LlavaForConditionalGeneration) -> Any:
    """The vision transformer itself (loosely typed, as all of transformers)."""
    tower = vlm.model.vision_tower
    return getattr(tower, "vision_model", tower)


def _start_tower(tower: Any, sizes: Sizes) -> None:
    for parameter_name, parameter in tower.named_parameters():
        if parameter.dim() > 1:
            last = parameter_name.endswith(("fc2.weight", "out_proj.weight"))
            nn.init.normal_(parameter, std=0.02 if last else 0.05)
    embeddings = tower.embeddings
    nn.init.normal_(embeddings.patch_embedding.weight, std=0.06)
    half = sizes.tower_width // 2  # positions fill one half of the channels, what the patch shows the other as well
    positions = torch.zeros(GRID * GRID + 1, sizes.tower_width)
    positions[0] = 0.1 * torch.randn(sizes.tower_width)
    positions[1:, :half] = 0.7 * _grid_waves(half)
    with torch.no_grad():
        embeddings.position_embedding.weight.copy_(positions)
    for layer in tower.encoder.layers:
        _same_query_and_key(layer.self_attn, 1.1)


def _start_language(vlm: LlavaForConditionalGeneration, sizes: Sizes) -> None:
    for name, parameter in vlm.model.language_model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.05)
    nn.init.normal_(vlm.get_input_embeddings().weight, std=0.06)
    for layer in vlm.model.language_model.layers:
        _same_query_and_key(layer.self_attn, 0.9)


def _grid_waves(channels: int) -> Tensor:
    """(144, channels): sines and cosines of row and column, from a quarter turn a patch to a 48th."""
    count = channels // 4
    speed = math.pi / 2 * (1 / GRID) ** (torch.arange(count) / (count - 1))
    row, column = torch.meshgrid(torch.arange(float(GRID)), torch.arange(float(GRID)), indexing="ij")
    angles = [axis.flatten()[:, None] * speed for axis in (row, column)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def _same_query_and_key(attention: Any, gain: float) -> None:
    query, key = attention.q_proj.weight, attention.k_proj.weight
    shared = gain * torch.linalg.qr(torch.randn(query.shape))[0]
    with torch.no_grad():
        query.copy_(shared + 0.02 * torch.randn(query.shape))
        key.copy_(shared + 0.02 * torch.randn(key.shape))


def new_processor(side: int = SIDE, patch: int = PATCH) -> LlavaProcessor:
    """Word-level tokenizer, PIL image processor for pictures of ``side`` pixels, and chat template."""
    words = WordTokenizer(models.WordLevel(WORD_IDS, unk_token="<unk>"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",  # noqa: S106
        extra_special_tokens={"image_token": "<image>", "user_token": "<user>", "assistant_token": "<assistant>"},
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    size = {"height": side, "width": side}
    pictures = CLIPImageProcessorPil(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        image_processor=pictures, tokenizer=tokenizer, patch_size=patch, vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip


def save_vlm(vlm: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write model (bf16 safetensors) and processor, so that transformers' Auto classes load the folder."""
    copy = LlavaForConditionalGeneration(vlm.config)
    copy.load_state_dict(vlm.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    new_processor().save_pretrained(folder)
