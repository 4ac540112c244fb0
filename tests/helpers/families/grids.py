"""Newer families that read any resolution, a grid an image: Qwen's, GLM's, and those that are fed like them."""

from typing import Any

import torch
import transformers as T
from torch import Tensor

from .base import END, GLOBAL, IMAGE, NEWLINE, SIDE, START, TEXT, VIDEO, Sample, Size, noise, qwen2
from .qwen import QWEN_TOKENS, Qwen2VL, Qwen3VL, Qwen25VL

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
QWEN_TOWER = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_heads": 2,
              "patch_size": 4, "num_position_embeddings": 36}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0, "rope_theta": 10000.0}


class Qwen3VLMoe(Qwen3VL):
    def create(self) -> Any:
        vlm = super().create()
        vlm.set_experts_implementation("eager")  # the fused one knows no double precision, which clips are tested in
        return vlm

    def config(self) -> Any:
        text = {**self.text(), "num_hidden_layers": 4, "head_dim": 8, **MOE}
        vision = {**QWEN_TOWER, "depth": 3, "deepstack_visual_indexes": [0, 1]}
        return T.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)


class Qwen35(Qwen3VL):
    """Layers with a state and with attention in turn; a clip's frames stand apart; no deepstack."""

    dtype = torch.float64

    def hybrid(self) -> dict[str, Any]:
        kinds = {"num_hidden_layers": len(HYBRID), "layer_types": list(HYBRID)}
        return {**TEXT, "head_dim": 8, **kinds, **LINEAR, "rope_parameters": dict(ROPE)}

    def config(self) -> Any:
        return T.Qwen3_5Config(text_config=self.hybrid(), vision_config=dict(QWEN_TOWER), **QWEN_TOKENS)


class Qwen35Moe(Qwen35):
    def create(self) -> Any:
        vlm = super().create()
        vlm.set_experts_implementation("eager")  # the fused one knows no double precision
        return vlm

    def config(self) -> Any:
        text = {**self.hybrid(), **MOE, "shared_expert_intermediate_size": 16}
        text.pop("intermediate_size")
        return T.Qwen3_5MoeConfig(text_config=text, vision_config=dict(QWEN_TOWER), **QWEN_TOKENS)


class Omni(Qwen25VL):
    """The thinker of Qwen2.5-Omni, without sound."""

    def config(self) -> Any:
        vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_heads": 2,
                  "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}  # fmt: skip
        audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16,
                 "output_dim": 32, "num_mel_bins": 16}  # fmt: skip
        config = T.Qwen2_5OmniThinkerConfig(
            text_config=self.text(), vision_config=vision, audio_config=audio, audio_token_index=9,
            image_token_index=IMAGE, video_token_index=VIDEO, audio_start_token_id=10, audio_end_token_id=11,
            user_token_id=12,
        )  # fmt: skip
        config.vision_start_token_id, config.vision_end_token_id = START, END
        return config

    def create(self) -> Any:
        return T.Qwen2_5OmniThinkerForConditionalGeneration(self.config())

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        batch = super().pixels(samples, random)
        if "second_per_grid_ts" in batch:
            batch["video_second_per_grid"] = batch.pop("second_per_grid_ts")
        return batch

    def token_types(self, ids: Tensor, prefix: Tensor) -> dict[str, Tensor]:
        return {}


class Glm4v(Qwen2VL):
    """Images only; positions in time, height and width."""

    videos = False
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": START,
              "image_end_token_id": END, "video_start_token_id": NEWLINE, "video_end_token_id": GLOBAL}  # fmt: skip
    tower = {"depth": 2, "hidden_size": 16, "num_heads": 2, "image_size": 24, "patch_size": 4, "out_hidden_size": 32,
             "intermediate_size": 24}  # fmt: skip

    def config(self) -> Any:
        return T.Glm4vConfig(text_config=self.text(), vision_config=dict(self.tower), **self.tokens)


class Glm46V(Glm4v):
    def config(self) -> Any:
        text = {**self.text(), "model_type": "glm4v_text"}
        vision = {**self.tower, "model_type": "glm4v_vision"}
        return T.Glm46VConfig(text_config=text, vision_config=vision, **self.tokens)


class Glm4vMoe(Glm4v):
    def config(self) -> Any:
        text = {**self.text(), "rope_parameters": dict(ROPE), "moe_intermediate_size": 16, "num_experts_per_tok": 2,
                "n_routed_experts": 4, "first_k_dense_replace": 1}  # fmt: skip
        return T.Glm4vMoeConfig(text_config=text, vision_config=dict(self.tower), **self.tokens)


class GlmOcr(Glm4v):
    def config(self) -> Any:
        text = {**self.text(), "head_dim": 8}
        return T.GlmOcrConfig(text_config=text, vision_config=dict(self.tower), **self.tokens)


class PaddleOcr(Qwen2VL):
    """Patches as small pictures."""

    videos = False

    def config(self) -> Any:
        vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "image_size": 24, "patch_size": 4}  # fmt: skip
        return T.PaddleOCRVLConfig(text_config={**self.text(), "head_dim": 8}, vision_config=vision, **QWEN_TOKENS)

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        batch = super().pixels(samples, random)
        if "pixel_values" in batch:
            batch["pixel_values"] = noise(random, len(batch["pixel_values"]), 3, self.patch, self.patch)
        return batch


class Ernie(Qwen2VL):
    """Steps of time of a clip joined two by two; experts by kind of token."""

    def config(self) -> Any:
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        text = {**TEXT, "rope_parameters": rope, "moe_intermediate_size": [16, 8], "moe_k": 2, "moe_num_experts": 4,
                "moe_num_shared_experts": 1}  # fmt: skip
        vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "intermediate_size": 24}
        return T.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision, **Glm4v.tokens)

    def clip_ids(self, frames: int) -> list[int]:
        rows, columns = self.merged((SIDE, SIDE))
        return [NEWLINE, *[VIDEO] * (frames // 2 * rows * columns), GLOBAL]

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        batch, width = super().pixels(samples, random), 3 * self.patch**2
        if "pixel_values" in batch:
            batch["pixel_values"] = noise(random, len(batch["pixel_values"]), width)
        if "video_grid_thw" in batch:
            batch["video_grid_thw"][:, 0] *= 2
            batch["pixel_values_videos"] = noise(random, int(batch["video_grid_thw"].prod(1).sum()), width)
        return batch

    def token_types(self, ids: Tensor, prefix: Tensor) -> dict[str, Tensor]:
        kinds = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
        around = ((ids == START) | (ids == END)).long() + 2 * ((ids == NEWLINE) | (ids == GLOBAL)).long()
        return {"mm_token_type_ids": kinds, "moe_mm_token_type_ids": kinds + around}


class Kimi(Qwen2VL):
    """Plain positions, patches as small pictures, a language model of DeepSeek-V3's make (MLA, experts)."""

    videos = False

    def config(self) -> Any:
        text = {**TEXT, "num_key_value_heads": 4, "model_type": "deepseek_v3", "q_lora_rank": 16, "kv_lora_rank": 16,
                "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4,
                "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1,
                "topk_group": 1, "n_shared_experts": 1}  # fmt: skip
        vision = {"patch_size": 4, "pos_emb_height": 6, "pos_emb_width": 6, "num_attention_heads": 2,
                  "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24}  # fmt: skip
        return T.Kimi_K25Config(text_config=text, vision_config=vision, projection_hidden_size=16, **QWEN_TOKENS,
                                tie_word_embeddings=False)  # fmt: skip

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        batch = super().pixels(samples, random)
        if "pixel_values" in batch:
            batch["pixel_values"] = noise(random, len(batch["pixel_values"]), 3, self.patch, self.patch)
        return batch

    def token_types(self, ids: Tensor, prefix: Tensor) -> dict[str, Tensor]:
        return {}


class VideoLlama3(Qwen2VL):
    """Each image says how many patches are joined; two tokens of a clip are left out before."""

    def config(self) -> Any:
        vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "patch_size": 4}  # fmt: skip
        return T.VideoLlama3Config(
            text_config=qwen2(), vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO
        )

    def clip_ids(self, frames: int) -> list[int]:
        rows, columns = self.merged((SIDE, SIDE))
        return [START, *[VIDEO] * (frames // 2 * rows * columns - 2), END]

    def token_types(self, ids: Tensor, prefix: Tensor) -> dict[str, Tensor]:
        return {}

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        batch, width = super().pixels(samples, random), 3 * self.patch**2
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if pixels in batch:
                batch[pixels] = noise(random, len(batch[pixels]), width)
                batch[f"{kind}_merge_sizes"] = torch.full((len(batch[f"{kind}_grid_thw"]),), 2)
        if "video_grid_thw" in batch:
            masks = [torch.ones(t * h * w // 4, dtype=torch.bool) for t, h, w in batch["video_grid_thw"].tolist()]
            for mask in masks:
                mask[[3, 7]] = False
            batch["video_compression_mask"] = torch.cat(masks)
        return batch


class Mistral3(Qwen2VL):
    """A break behind each row of tokens, an end behind the last: words to the model. A tower of Pixtral's make."""

    videos = False
    tower = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "image_size": 48, "patch_size": 4, "head_dim": 8}  # fmt: skip

    def language(self) -> Any:
        return T.MistralConfig(**TEXT, head_dim=8, sliding_window=None)

    def config(self) -> Any:
        return T.Mistral3Config(vision_config=dict(self.tower), text_config=self.language(), image_token_index=IMAGE,
                                spatial_merge_size=2)  # fmt: skip

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        rows, columns = self.merged(size)
        ids = [token for _ in range(rows) for token in (*[IMAGE] * columns, NEWLINE)]
        return [*ids[:-1], END]

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        sizes = [size for sample in samples for size in sample.images]
        if not sizes:
            return {}
        pixels = torch.zeros(len(sizes), 3, *(max(side) for side in zip(*sizes, strict=True)))
        for picture, (height, width) in zip(pixels, sizes, strict=True):
            picture[:, :height, :width] = noise(random, 3, height, width)
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}

    def token_types(self, ids: Tensor, prefix: Tensor) -> dict[str, Tensor]:
        return {}


class Ministral3(Mistral3):
    """Queries are scaled by their positions, from 16 on."""

    def language(self) -> Any:
        rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
                "beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
                "mscale_all_dim": 1.0}  # fmt: skip
        return T.Ministral3Config(**{**TEXT, "max_position_embeddings": 64}, head_dim=8, rope_parameters=rope)


class LightOnOcr(Mistral3):
    """Without breaks."""

    def config(self) -> Any:
        text = T.Qwen3Config(**TEXT, head_dim=8)
        return T.LightOnOcrConfig(vision_config=dict(self.tower), text_config=text, image_token_id=IMAGE,
                                  spatial_merge_size=2)  # fmt: skip

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        rows, columns = self.merged(size)
        return [IMAGE] * (rows * columns)
