"""Newer families of LLaVA's kin, those whose shipped towers need `timm`, and those whose tokens are made by index."""

from typing import Any

import torch
import transformers as T
from torch import Tensor

from .base import (  # fmt: skip
    END,
    GLOBAL,
    IMAGE,
    NEWLINE,
    SIDE,
    START,
    TEXT,
    VIDEO,
    VISION,
    Family,
    Sample,
    Size,
    llama,
    noise,
    qwen2,
)
from .llava import PINPOINTS, LlavaNext


def clip_tower(**others: Any) -> Any:
    return T.CLIPVisionConfig(**{**VISION, "patch_size": 6, "projection_dim": 16, **others})


def clips_of(samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
    """The frames of all clips, where there are any."""
    clips = [frames for sample in samples for frames in sample.clips]
    return {"pixel_values_videos": noise(random, len(clips), clips[0], 3, SIDE, SIDE)} if clips else {}


class VipLlava(Family):
    """States of several blocks joined."""

    def config(self) -> Any:
        return T.VipLlavaConfig(vision_config=clip_tower(), text_config=llama(), image_token_index=IMAGE,
                                image_seq_length=16, vision_feature_layers=[-1, -2, 1])  # fmt: skip


class LlavaNextVideo(LlavaNext):
    """Clips of pooled frames."""

    videos = True

    def config(self) -> Any:
        return T.LlavaNextVideoConfig(vision_config=clip_tower(), text_config=llama(), image_token_index=IMAGE,
                                      video_token_index=VIDEO, image_grid_pinpoints=PINPOINTS,
                                      image_seq_length=16)  # fmt: skip

    def clip_ids(self, frames: int) -> list[int]:
        return [VIDEO] * (frames * (self.side // 2) ** 2)

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        return super().pixels(samples, random) | clips_of(samples, random)


class VideoLlava(Family):
    """Frames with their CLS."""

    videos = True

    def config(self) -> Any:
        return T.VideoLlavaConfig(vision_config=clip_tower(), text_config=llama(), image_token_index=IMAGE,
                                  video_token_index=VIDEO)  # fmt: skip

    def create(self) -> Any:
        return T.VideoLlavaForConditionalGeneration(self.config())

    def clip_ids(self, frames: int) -> list[int]:
        return [VIDEO] * (frames * (self.side**2 + 1))

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        return super().pixels(samples, random) | clips_of(samples, random)


class Granite4Vision(LlavaNext):
    """As LLaVA-NeXT at half the resolution; features that enter in front of several layers."""

    side = 2

    def config(self) -> Any:
        text = {**TEXT, "num_hidden_layers": 8, "embedding_multiplier": 2.0, "attention_multiplier": 0.3}
        former = {"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 24,
                  "cross_attention_frequency": 1, "use_qformer_text_input": False, "vocab_size": 16,
                  "max_position_embeddings": 16}  # fmt: skip
        return T.Granite4VisionConfig(vision_config=clip_tower(hidden_size=64), text_config=text,
                                      image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS, downsample_rate="1/2",
                                      deepstack_layer_map=[[-1, 0], [-2, 1]], spatial_vision_layer=-1,
                                      spatial_target_layers=[2, 3, 4, 5], qformer_config=former)  # fmt: skip


class FastVlm(Family):
    """9 tokens a picture, of convolutions: ConvNeXt stands in for the shipped tower, which needs `timm`."""

    side = 3

    def config(self) -> Any:
        vision = T.ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], num_stages=4, patch_size=1,
                                  image_size=SIDE)  # fmt: skip
        vision.hidden_size = 16
        return T.FastVlmConfig(vision_config=vision, text_config=qwen2(), image_token_id=IMAGE, image_seq_length=9)


class PerceptionLm(Family):
    """Two tiles of 9 tokens, pooled two by two: CLIP stands in for the shipped tower, which needs `timm`."""

    side, videos = 3, True

    def config(self) -> Any:
        vision = clip_tower(patch_size=4)
        vision.model_args = {"embed_dim": 16}
        return T.PerceptionLMConfig(vision_config=vision, text_config=llama(), image_token_id=IMAGE,
                                    video_token_id=VIDEO, projector_pooling_ratio=2)  # fmt: skip

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        return [IMAGE] * (2 * self.side**2)

    def clip_ids(self, frames: int) -> list[int]:
        return [VIDEO] * (frames * self.side**2)

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        count = sum(len(sample.images) for sample in samples)
        batch = {"pixel_values": noise(random, count, 2, 3, SIDE, SIDE)} if count else {}
        return batch | clips_of(samples, random)


class Molmo2(Family):
    """The whole picture, then its crops put together, rows with ends that are words; tokens pool patches by index."""

    def config(self) -> Any:
        heads = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
                 "intermediate_size": 24}  # fmt: skip
        vision = {**heads, "num_hidden_layers": 3, "image_size": [SIDE, SIDE], "patch_size": 4}
        adapter = {**heads, "vision_feature_layer": [-1, -2], "text_hidden_size": 32}
        text = {**TEXT, "head_dim": 8, "additional_vocab_size": 8}
        return T.Molmo2Config(vision_config=vision, adapter_config=adapter, text_config=text, image_patch_id=IMAGE,
                              image_start_token_id=START, image_end_token_id=END, low_res_image_start_token_id=GLOBAL,
                              frame_start_token_id=9, frame_end_token_id=10)  # fmt: skip

    def grids(self, size: Size) -> tuple[int, int, int, int]:
        """Rows and columns of tokens of the whole picture, and of its crops."""
        return 3, 3, size[0] // 8, size[1] // 8

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        a, b, c, d = self.grids(size)
        whole, crops = ([*[IMAGE] * columns, NEWLINE] * rows for rows, columns in ((a, b), (c, d)))
        return [GLOBAL, *whole, END, START, *crops, END]

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        sizes = [size for sample in samples for size in sample.images]
        if not sizes:
            return {}
        pixels, pooling, grids = [], [], [self.grids(size) for size in sizes]
        counts: list[int] = []
        for a, b, c, d in grids:
            begin, crops = 36 * sum(counts), 1 + -(-c // 3) * -(-d // 3)
            pixels.append(noise(random, crops, 36, 48))
            for tokens in (a * b, c * d):
                first = begin + 4 * torch.arange(tokens) % (36 * crops - 4)
                pooling.append(first[:, None] + torch.arange(4))
            counts.append(crops)
        return {"pixel_values": torch.cat(pixels), "image_token_pooling": torch.cat(pooling),
                "image_grids": torch.tensor(grids), "image_num_crops": torch.tensor(counts)}  # fmt: skip

    def token_types(self, ids: Tensor, prefix: Tensor) -> dict[str, Tensor]:
        image = torch.isin(ids, torch.tensor([IMAGE, START, END, NEWLINE, GLOBAL]))
        return {"mm_token_type_ids": image.long()}


class DeepseekOcr2(Family):
    """257 tokens for a whole picture, 144 for each of its two crops, where it is no square."""

    def config(self) -> Any:
        sam = {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
               "image_size": 1024, "patch_size": 16, "window_size": 4, "global_attn_indexes": [1],
               "downsample_channels": [8, 16], "mlp_dim": 16}  # fmt: skip
        encoder = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                   "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
        text = {**TEXT, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                "n_shared_experts": 1, "mlp_layer_types": ["dense", "sparse", "sparse"]}  # fmt: skip
        return T.DeepseekOcr2Config(vision_config={"sam_config": sam, "encoder_config": encoder}, text_config=text,
                                    image_token_id=IMAGE)  # fmt: skip

    def crops(self, size: Size) -> int:
        return 2 if size[0] != size[1] else 0

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        return [IMAGE] * (144 * self.crops(size) + 257)

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        crops = [self.crops(size) for sample in samples for size in sample.images]
        if not crops:
            return {}
        batch = {"pixel_values": noise(random, len(crops), 3, 1024, 1024), "num_local_patches": torch.tensor(crops)}
        if sum(crops):
            batch["pixel_values_local"] = noise(random, sum(crops), 3, 768, 768)
        return batch
