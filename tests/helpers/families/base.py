"""What the builders share, and LLaVA, which the others change: ids of special tokens, prompts, small configurations."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

PAD, BOS, EOS, IMAGE, VIDEO, START, END, NEWLINE, GLOBAL = range(9)
CELL = 9  # of <row_1_col_1>; three by three of them
WORD = 20  # the first word
VOCABULARY = 64
SIDE = 24  # of a tile, in pixels

Size = tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """A prompt: its pictures, its clips, and how many words it has besides."""

    images: tuple[Size, ...] = ()
    words: int = 5
    clips: tuple[int, ...] = ()  # frames of each; two frames make one step of time in Qwen-VL


TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
          "image_size": SIDE}  # fmt: skip


def llama() -> LlamaConfig:
    return LlamaConfig(**TEXT)


def qwen2() -> Qwen2Config:
    return Qwen2Config(**TEXT)


def siglip(patch: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(**VISION, patch_size=patch, vision_use_head=False)


def noise(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=random)


class Family:
    """LLaVA: one square tile a picture, 16 tokens."""

    side = 4  # tokens along a tile
    videos = False
    dtype = torch.float32  # double precision where rounding alone is more than the tests allow

    def config(self) -> Any:
        vision = CLIPVisionConfig(**VISION, patch_size=6, projection_dim=16)
        return LlavaConfig(vision_config=vision, text_config=llama(), image_token_id=IMAGE, image_seq_length=16)

    @cache  # noqa: B019  one instance a family
    def make(self) -> Any:
        """The model; shared, so leave it as it is."""
        return self.build()

    def build(self, seed: int = 0) -> Any:
        """A model of one's own."""
        torch.manual_seed(seed)
        vlm = self.create().eval()
        for parameter in vlm.parameters():
            if parameter.dim() > 1:  # far from zero, so that what changes inside shows at the logits
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        vlm.generation_config.eos_token_id = None  # it always writes as many tokens as it is asked for
        vlm.generation_config.pad_token_id = PAD
        vlm.generation_config.suppress_tokens = [IMAGE, VIDEO]  # a model that was trained never writes them
        return vlm.to(self.dtype).requires_grad_(False)

    def create(self) -> Any:
        """A model as `transformers` makes it."""
        return AutoModelForImageTextToText.from_config(self.config())

    @property
    def vlm(self) -> Any:
        return self.make()

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        """The prompt's ids for one picture; ``several``: it is not the only one of its prompt."""
        return [IMAGE] * self.side**2

    def clip_ids(self, frames: int) -> list[int]:
        """The prompt's ids for one clip."""
        raise NotImplementedError

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        """What the processor adds for the pictures (and clips)."""
        count = sum(len(sample.images) for sample in samples)
        return {"pixel_values": noise(random, count, 3, SIDE, SIDE)} if count else {}

    def prompt(self, sample: Sample, words: list[int]) -> list[int]:
        """Begin, then a word before each picture, then the rest."""
        ids, rest = [BOS], list(words)
        images = [self.image_ids(size, len(sample.images) > 1) for size in sample.images]
        for part in [*images, *map(self.clip_ids, sample.clips)]:
            ids += [*rest[:1], *part]
            rest = rest[1:]
        return ids + rest

    def token_types(self, ids: Tensor, prefix: Tensor) -> dict[str, Tensor]:
        """Inputs that say what a token is, if the family has them."""
        return {}

    def batch(
        self, samples: list[Sample], side: str = "left", labels: bool = False, seed: int = 0, device: str = "cpu"
    ) -> dict[str, Tensor]:
        """Inputs of the model.

        Args:
            samples: The rows.
            side: Of the padding.
            labels: Add labels; the last two words of each row are its answer.
            seed: Of pixels and words.
            device: Where to put them.
        """
        random = torch.Generator().manual_seed(seed)
        rows = []
        for sample in samples:
            words = torch.randint(WORD, VOCABULARY, (sample.words,), generator=random).tolist()
            rows.append(self.prompt(sample, words))
        length = max(map(len, rows))
        ids, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.long)
        answer = torch.zeros(len(rows), length, dtype=torch.bool)
        for row, own in enumerate(rows):
            start = length - len(own) if side == "left" else 0
            ids[row, start : start + len(own)] = torch.tensor(own)
            mask[row, start : start + len(own)] = 1
            answer[row, start + len(own) - 2 : start + len(own)] = True
        batch = {"input_ids": ids, "attention_mask": mask, **self.pixels(samples, random)}
        batch |= self.token_types(ids, ~answer if labels else torch.ones_like(answer))
        if labels:
            batch["labels"] = ids.masked_fill(~answer, -100)
        floats = {key: value.to(self.dtype) for key, value in batch.items() if value.is_floating_point()}
        return {key: value.to(device) for key, value in {**batch, **floats}.items()}
