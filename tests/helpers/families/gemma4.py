"""Gemma 4, in its four makes, and Gemma 3n."""

from typing import Any
from unittest import mock

import torch
import transformers as T
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .base import END, IMAGE, SIDE, START, TEXT, VIDEO, VOCABULARY, WORD, Family, Sample, Size

TURNS = ["sliding_attention", "full_attention"]
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": 9, "boi_token_id": START,
          "eoi_token_id": END, "boa_token_id": 10, "eoa_token_index": 11}  # fmt: skip
MOST = 144  # patches of a picture, to which others are padded


class Gemma4(Family):
    """Any resolution; patches of 4 pixels pooled two by two; inputs of each layer made of ids; clips."""

    patch, pooled, videos = 4, 2, True
    dtype = torch.float64
    window = 512
    turns, shared, by_layer = 2, 0, 8
    blocks: str | None = None  # "vision": the tokens of a picture see one another

    def text(self) -> dict[str, Any]:
        return {
            **TEXT,
            "num_hidden_layers": 2 * self.turns,
            "head_dim": 8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": self.by_layer,
            "vocab_size_per_layer_input": VOCABULARY,
            "sliding_window": self.window,
            "layer_types": TURNS * self.turns,
            "num_kv_shared_layers": self.shared,
            "use_bidirectional_attention": self.blocks,
        }

    def config(self) -> Any:
        vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "num_key_value_heads": 2, "head_dim": 8, "patch_size": self.patch,
                  "pooling_kernel_size": self.pooled, "position_embedding_size": 64}  # fmt: skip
        return T.Gemma4Config(text_config=self.text(), vision_config=vision, audio_config=None, **TOKENS)

    def merged(self, size: Size) -> Size:
        step = self.patch * self.pooled
        return size[0] // step, size[1] // step

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        rows, columns = self.merged(size)
        return [START, *[IMAGE] * (rows * columns), END]

    def clip_ids(self, frames: int) -> list[int]:
        rows, columns = self.merged((SIDE, SIDE))
        step = [START, *[VIDEO] * (rows * columns), END]
        return [token for time in range(frames) for token in (WORD + time, *step)]

    def pack(self, sizes: list[Size], random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Patches of pictures, padded, and where each is from, x first."""
        width = 3 * self.patch**2
        pixels, places = torch.zeros(len(sizes), MOST, width), torch.full((len(sizes), MOST, 2), -1)
        for own, place, size in zip(pixels, places, sizes, strict=True):
            rows, columns = (side // self.patch for side in size)
            own[: rows * columns] = torch.rand(rows * columns, width, generator=random)
            row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            place[: rows * columns] = torch.stack([column, row], -1).flatten(0, 1)
        return pixels, places

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        batch = {}
        sizes = [size for sample in samples for size in sample.images]
        if sizes:
            batch["pixel_values"], batch["image_position_ids"] = self.pack(sizes, random)
        clips = [frames for sample in samples for frames in sample.clips]
        if clips:
            frames = self.pack([(SIDE, SIDE)] * sum(clips), random)
            batch["pixel_values_videos"], batch["video_position_ids"] = frames
            batch["num_frames_per_video"] = torch.tensor(clips)
        return batch

    def token_types(self, ids: Tensor, prefix: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


class Gemma4Blocks(Gemma4):
    """As the 26B and the 31B: no inputs by layer, pictures that see themselves in sliding layers."""

    dtype = torch.float32
    blocks, by_layer = "vision", 0


class Gemma4Shared(Gemma4):
    """As E2B and E4B: the last layers attend to the keys of earlier ones."""

    turns, shared = 3, 2


class Gemma4Unified(Gemma4):
    """As the 12B: no tower, patches joined by the processor, pictures that see themselves in all layers."""

    patch, pooled = 8, 1
    dtype = torch.float32
    blocks = "vision"

    def config(self) -> Any:
        text = {key: value for key, value in self.text().items() if "per_layer_input" not in key}
        vision = {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 16, "mm_posemb_size": 64,
                  "output_proj_dims": 16}  # fmt: skip
        return T.Gemma4UnifiedConfig(text_config=text, vision_config=vision, audio_config=None, **TOKENS)


class OneConvolution(torch.nn.Module):
    """Stands in for a tower of `timm`, which is not installed with the tests."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 16, 8, 8)

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        return BaseModelOutputWithPooling(last_hidden_state=self.patches(pixel_values))


class Gemma3n(Family):
    """9 tokens a picture; several streams of hidden states."""

    side = 3

    def config(self) -> Any:
        text = {**TEXT, "num_hidden_layers": 4, "head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size": 80,
                "vocab_size_per_layer_input": VOCABULARY, "sliding_window": 512, "layer_types": TURNS * 2,
                "num_kv_shared_layers": 0, "altup_num_inputs": 2, "laurel_rank": 4,
                "activation_sparsity_pattern": [0.0] * 4}  # fmt: skip
        vision = {"hidden_size": 16, "vocab_size": 8, "vocab_offset": 64}
        audio = {"vocab_size": 8, "vocab_offset": 72, "hidden_size": 16, "conf_num_hidden_layers": 1,
                 "conf_num_attention_heads": 2, "input_feat_size": 16, "sscp_conv_channel_size": [4, 4]}  # fmt: skip
        config = T.Gemma3nConfig(text_config=text, vision_config=vision, audio_config=audio,
                                 vision_soft_tokens_per_image=9, audio_token_id=73, boi_token_id=START,
                                 eoi_token_id=64, boa_token_id=10, eoa_token_id=72)  # fmt: skip
        config.image_token_id = IMAGE
        return config

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        return [START, *[IMAGE] * self.side**2, 64]

    def create(self) -> Any:
        make = T.AutoModel.from_config

        def other(config: Any, *args: Any, **options: Any) -> Any:
            vision = "gemma3n_vision" in config.model_type
            return OneConvolution() if vision else make(config, *args, **options)

        with mock.patch("transformers.models.gemma3n.modeling_gemma3n.AutoModel.from_config", other):
            return T.Gemma3nForConditionalGeneration(self.config())
