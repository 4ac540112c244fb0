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
    AttentionInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trainers.data import pages, pages_render, scenes, scenes_dense, scenes_render

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{{ '<user>' if message['role'] == 'user' else '<assistant>' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }} "
    "{% endif %}{% endfor %}{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class World:
    """What a frozen model knows: the words of a suite, and the side of its pictures and patches in pixels."""

    words: tuple[str, ...]
    side: int
    patch: int

    @property
    def word_ids(self) -> dict[str, int]:
        """Token id of each special token and word."""
        return {word: index for index, word in enumerate((*SPECIAL, *self.words))}

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.side // self.patch


SCENES = World(scenes.WORDS, scenes_render.SIDE, scenes_dense.PATCH)
PAGES = World(pages.WORDS, pages_render.SIDE, pages_render.PATCH)
WORD_IDS = SCENES.word_ids


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


def new_vlm(sizes: Sizes, world: World = SCENES) -> LlavaForConditionalGeneration:
    """Build the VLM with random weights from torch's generator.

    Three starts make it learn in minutes what otherwise waits on a plateau: the tower's positions are sines and
    cosines of row and column, and queries and keys of every attention begin as one orthogonal map, so that patches look
    at their neighbours and words at patches like them (after mimetic initialisation, Trockman and Kolter,
    arXiv 2305.09828); the word embeddings are tied and of a size that the projector can reach.
    """
    vision = CLIPVisionConfig(
        hidden_size=sizes.tower_width, intermediate_size=sizes.tower_inner, num_hidden_layers=sizes.tower_layers,
        num_attention_heads=sizes.heads, image_size=world.side, patch_size=world.patch, hidden_act="gelu",
    )  # fmt: skip
    ids = world.word_ids
    text = LlamaConfig(
        vocab_size=len(ids), hidden_size=sizes.width, intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads,
        tie_word_embeddings=True, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        pad_token_id=ids["<pad>"], bos_token_id=ids["<s>"], eos_token_id=ids["</s>"],
    )  # fmt: skip
    vlm = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, image_token_id=ids["<image>"], image_seq_length=world.grid**2,
            vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=True,
        )
    )  # fmt: skip
    _start_tower(tower_of(vlm), sizes, world.grid)
    _start_language(vlm, sizes)
    return vlm


def tower_of(vlm: LlavaForConditionalGeneration) -> Any:
    """The vision transformer itself (loosely typed, as all of transformers)."""
    tower = vlm.model.vision_tower
    return getattr(tower, "vision_model", tower)


def _start_tower(tower: Any, sizes: Sizes, grid: int) -> None:
    for parameter_name, parameter in tower.named_parameters():
        if parameter.dim() > 1:
            last = parameter_name.endswith(("fc2.weight", "out_proj.weight"))
            nn.init.normal_(parameter, std=0.02 if last else 0.05)
    embeddings = tower.embeddings
    nn.init.normal_(embeddings.patch_embedding.weight, std=0.06)
    half = sizes.tower_width // 2  # positions fill one half of the channels, what the patch shows the other as well
    positions = torch.zeros(grid**2 + 1, sizes.tower_width)
    positions[0] = 0.1 * torch.randn(sizes.tower_width)
    positions[1:, :half] = 0.7 * grid_waves(half, grid)
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


def grid_waves(channels: int, grid: int) -> Tensor:
    """(grid², channels): sines and cosines of row and column, from a quarter turn a patch to 1/grid of that."""
    count = channels // 4
    speed = math.pi / 2 * (1 / grid) ** (torch.arange(count) / (count - 1))
    row, column = torch.meshgrid(torch.arange(float(grid)), torch.arange(float(grid)), indexing="ij")
    angles = [axis.flatten()[:, None] * speed for axis in (row, column)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def _same_query_and_key(attention: Any, gain: float) -> None:
    query, key = attention.q_proj.weight, attention.k_proj.weight
    shared = gain * torch.linalg.qr(torch.randn(query.shape))[0]
    with torch.no_grad():
        query.copy_(shared + 0.02 * torch.randn(query.shape))
        key.copy_(shared + 0.02 * torch.randn(key.shape))


def new_processor(world: World = SCENES) -> LlavaProcessor:
    """Word-level tokenizer, PIL image processor and chat template."""
    words = WordTokenizer(models.WordLevel(world.word_ids, unk_token="<unk>"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",  # noqa: S106
        extra_special_tokens={"image_token": "<image>", "user_token": "<user>", "assistant_token": "<assistant>"},
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    size = {"height": world.side, "width": world.side}
    pictures = CLIPImageProcessorPil(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        image_processor=pictures, tokenizer=tokenizer, patch_size=world.patch, vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip


def save_vlm(vlm: LlavaForConditionalGeneration, folder: Path, world: World = SCENES) -> None:
    """Write model (bf16 safetensors) and processor, so that transformers' Auto classes load the folder."""
    copy = LlavaForConditionalGeneration(vlm.config)
    copy.load_state_dict(vlm.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    new_processor(world).save_pretrained(folder)


def plain_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Attention as two products of matrices, (B, H, T, d) to (B, T, H, d).

    On a CPU without AMX, in bfloat16, a step takes half the time that torch's fused kernels take, most of it backward.
    """
    weights = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        weights = weights + attention_mask
    return (weights.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("plain", plain_attention)
