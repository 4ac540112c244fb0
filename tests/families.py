"""Tiny random models of every supported family, and batches as the family's processor would make them, straight as
tensors: no tokenizer, no image files, no network. test_families_processors.py holds them against the real processors.

    tiny = tiny_family("qwen3_vl")
    batch = tiny.batch([Sample(images=((48, 40),), words=5), Sample(words=3)])
    tiny.vlm(**batch)

Sizes of pictures are ``(height, width)`` in pixels. They matter where a family reads any resolution, and are ignored
where it reads one.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    GemmaConfig,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PaliGemmaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)

PAD, BOS, EOS, IMAGE, VIDEO, START, END, NEWLINE, GLOBAL = range(9)
CELL = 9  # of <row_1_col_1>; three by three of them
WORD = 20  # the first word
VOCABULARY = 64
SIDE = 24  # of a tile, in pixels
PINPOINTS = [[24, 24], [24, 48], [48, 24], [48, 48]]

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


class Family:
    """LLaVA: one square tile a picture, 16 tokens."""

    side = 4  # tokens along a tile
    videos = False

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
        vlm = AutoModelForImageTextToText.from_config(self.config()).eval()
        for parameter in vlm.parameters():
            if parameter.dim() > 1:  # far from zero, so that what changes inside shows at the logits
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        vlm.generation_config.eos_token_id = None  # it always writes as many tokens as it is asked for
        vlm.generation_config.pad_token_id = PAD
        vlm.generation_config.suppress_tokens = [IMAGE, VIDEO]  # a model that was trained never writes them
        return vlm.requires_grad_(False)

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
        return {key: value.to(device) for key, value in batch.items()}


def noise(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=random)


class LlavaSiglip(Family):
    def config(self) -> Any:
        return LlavaConfig(
            vision_config=siglip(6),
            text_config=qwen2(),
            image_token_id=IMAGE,
            image_seq_length=16,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )


class LlavaNext(Family):
    """A thumbnail, then the unpadded grid of tiles with a newline token after each of its rows."""

    most = 0  # tiles beyond which the grid is made smaller; 0: never

    def config(self) -> Any:
        vision = CLIPVisionConfig(**VISION, patch_size=6, projection_dim=16)
        return LlavaNextConfig(
            vision_config=vision,
            text_config=llama(),
            image_token_index=IMAGE,
            image_grid_pinpoints=PINPOINTS,
            image_seq_length=16,
        )

    def tiles(self, size: Size) -> Size:
        """Rows and columns of tiles: the pinpoint that fits best."""

        def fit(point: list[int]) -> tuple[int, int]:
            scale = min(point[0] / size[0], point[1] / size[1])
            used = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
            return used, -(point[0] * point[1] - used)

        height, width = max(PINPOINTS, key=fit)
        return height // SIDE, width // SIDE

    def count(self, size: Size, several: bool) -> int:
        """Tiles, with the thumbnail."""
        rows, columns = self.tiles(size)
        return 1 + rows * columns

    def grid(self, size: Size) -> Size:
        """Rows and columns of tokens, without the padding."""
        rows, columns = (tiles * self.side for tiles in self.tiles(size))
        if size[1] / size[0] > columns / rows:
            rows -= (rows - int(round(size[0] * columns / size[1], 7))) // 2 * 2
        else:
            columns -= (columns - int(round(size[1] * rows / size[0], 7))) // 2 * 2
        ratio = (rows * columns / (self.most * self.side**2)) ** 0.5 if self.most else 0
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        rows, columns = self.grid(size)
        return [IMAGE] * (self.side**2 + rows * (columns + 1))

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        sizes = [size for sample in samples for size in sample.images]
        if not sizes:
            return {}
        counts = [self.count(size, len(sample.images) > 1) for sample in samples for size in sample.images]
        pixels = torch.zeros(len(sizes), max(counts), 3, SIDE, SIDE)
        for image, count in zip(pixels, counts, strict=True):
            image[:count] = noise(random, count, 3, SIDE, SIDE)
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


class LlavaOnevision(LlavaNext):
    """As LLaVA-NeXT; several pictures in one prompt are one tile and one newline each; a clip is pooled frames."""

    most = 2
    videos = True

    def config(self) -> Any:
        return LlavaOnevisionConfig(
            vision_config=siglip(6),
            text_config=qwen2(),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=PINPOINTS,
            vision_aspect_ratio=f"anyres_max_{self.most}",
        )

    def count(self, size: Size, several: bool) -> int:
        return 1 if several else super().count(size, several)

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        return [IMAGE] * (self.side**2 + 1) if several else super().image_ids(size)

    def clip_ids(self, frames: int) -> list[int]:
        return [VIDEO] * (frames * (self.side // 2) ** 2 + 1)

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        batch = super().pixels(samples, random)
        if batch:
            batch["batch_num_images"] = torch.tensor([len(sample.images) for sample in samples if sample.images])
        clips = [frames for sample in samples for frames in sample.clips]
        if clips:
            batch["pixel_values_videos"] = noise(random, len(clips), clips[0], 3, SIDE, SIDE)
        return batch


class Qwen2VL(Family):
    """Any resolution, patches of 4 pixels merged two by two."""

    videos = True
    patch = 4

    def text(self) -> dict[str, Any]:
        return {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}

    def config(self) -> Any:
        vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
        return Qwen2VLConfig(text_config=self.text(), vision_config=vision, **QWEN_TOKENS)

    def merged(self, size: Size) -> Size:
        """Rows and columns of tokens."""
        return size[0] // self.patch // 2, size[1] // self.patch // 2

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        rows, columns = self.merged(size)
        return [START, *[IMAGE] * (rows * columns), END]

    def clip_ids(self, frames: int) -> list[int]:
        rows, columns = self.merged((SIDE, SIDE))
        return [START, *[VIDEO] * (frames // 2 * rows * columns), END]

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        width = 3 * 2 * self.patch**2
        batch = {}
        images = [(1, h // self.patch, w // self.patch) for sample in samples for h, w in sample.images]
        if images:
            batch["image_grid_thw"] = torch.tensor(images)
            batch["pixel_values"] = noise(random, int(batch["image_grid_thw"].prod(1).sum()), width)
        clips = [(n // 2, SIDE // self.patch, SIDE // self.patch) for sample in samples for n in sample.clips]
        if clips:
            batch["video_grid_thw"] = torch.tensor(clips)
            batch["pixel_values_videos"] = noise(random, int(batch["video_grid_thw"].prod(1).sum()), width)
        return batch

    def token_types(self, ids: Tensor, prefix: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START,
               "vision_end_token_id": END}  # fmt: skip


class Qwen25VL(Qwen2VL):
    def config(self) -> Any:
        vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_heads": 2,
                  "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}  # fmt: skip
        return Qwen2_5_VLConfig(text_config=self.text(), vision_config=vision, **QWEN_TOKENS)

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        batch = super().pixels(samples, random)
        if "video_grid_thw" in batch:
            batch["second_per_grid_ts"] = torch.full((len(batch["video_grid_thw"]),), 0.5)
        return batch


class Qwen3VL(Qwen2VL):
    """Two levels of deepstack; the frames of a clip stand apart, each behind its time."""

    def config(self) -> Any:
        vision = {"depth": 3, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_heads": 2,
                  "patch_size": 4, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]}  # fmt: skip
        text = {**self.text(), "num_hidden_layers": 4, "head_dim": 8}
        return Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)

    def clip_ids(self, frames: int) -> list[int]:
        rows, columns = self.merged((SIDE, SIDE))
        step = [START, *[VIDEO] * (rows * columns), END]
        return [token for time in range(frames // 2) for token in (WORD + time, *step)]


class InternVL(Family):
    """Tiles of 9 tokens, and a thumbnail where there is more than one tile; one run of placeholders a picture."""

    side = 3

    def config(self) -> Any:
        vision = {**VISION, "image_size": [SIDE, SIDE], "patch_size": [4, 4]}
        return InternVLConfig(vision_config=vision, text_config=qwen2(), image_token_id=IMAGE, image_seq_length=9)

    def tiles(self, size: Size) -> int:
        count = -(-size[0] // SIDE) * -(-size[1] // SIDE)
        return count + (count > 1)

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        return [START, *[IMAGE] * (self.side**2 * self.tiles(size)), END]

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        count = sum(self.tiles(size) for sample in samples for size in sample.images)
        return {"pixel_values": noise(random, count, 3, SIDE, SIDE)} if count else {}


class Idefics3(Family):
    """Tiles of 9 tokens with a tag before each and a line break after each row, then the whole picture."""

    side = 3

    def config(self) -> Any:
        return self.configure(Idefics3Config)

    def configure(self, kind: Any) -> Any:
        return kind(vision_config={**VISION, "patch_size": 4}, text_config=llama(), image_token_id=IMAGE,
                    scale_factor=2, pad_token_id=PAD)  # fmt: skip

    def tiles(self, size: Size) -> Size:
        """Rows and columns of tiles besides the whole picture; none where it is small."""
        rows, columns = -(-size[0] // SIDE), -(-size[1] // SIDE)
        return (0, 0) if rows * columns == 1 else (rows, columns)

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        rows, columns = self.tiles(size)
        tile = [IMAGE] * self.side**2
        ids = []
        for row in range(rows):
            for column in range(columns):
                ids += [START, CELL + 3 * row + column, *tile]
            ids.append(NEWLINE)
        return [*ids, *[NEWLINE][: rows], START, GLOBAL, *tile, START]  # fmt: skip

    def pixels(self, samples: list[Sample], random: torch.Generator) -> dict[str, Tensor]:
        counts = [sum(r * c + 1 for r, c in map(self.tiles, sample.images)) for sample in samples]
        if not max(counts):
            return {}
        pixels = torch.zeros(len(samples), max(counts), 3, SIDE, SIDE)
        mask = torch.zeros(len(samples), max(counts), SIDE, SIDE, dtype=torch.long)
        for row, count in enumerate(counts):
            pixels[row, :count] = noise(random, count, 3, SIDE, SIDE)
            mask[row, :count] = 1
        return {"pixel_values": pixels, "pixel_attention_mask": mask}


class SmolVLM(Idefics3):
    def config(self) -> Any:
        return self.configure(SmolVLMConfig)


class Gemma3(Family):
    """9 tokens a picture that see one another; sliding and full layers in turn."""

    side = 3
    window = 512

    def config(self) -> Any:
        text = {
            **TEXT,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": self.window,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
        return Gemma3Config(text_config=text, vision_config=siglip(4).to_dict(), mm_tokens_per_image=9,
                            boi_token_index=START, eoi_token_index=END, image_token_index=IMAGE)  # fmt: skip

    def image_ids(self, size: Size, several: bool = False) -> list[int]:
        return [NEWLINE, START, *super().image_ids(size, several), END, NEWLINE]

    def token_types(self, ids: Tensor, prefix: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": (ids == IMAGE).long()}


class PaliGemma(Family):
    """16 tokens a picture, all before the text; the prompt sees itself in both directions."""

    def config(self) -> Any:
        return PaliGemmaConfig(vision_config=siglip(6).to_dict() | {"projection_dim": 32},
                               text_config=GemmaConfig(**TEXT, head_dim=8), image_token_index=IMAGE,
                               projection_dim=32, hidden_size=32)  # fmt: skip

    def prompt(self, sample: Sample, words: list[int]) -> list[int]:
        return [token for size in sample.images for token in self.image_ids(size)] + [BOS, *words, NEWLINE]

    def token_types(self, ids: Tensor, prefix: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": (~prefix).long()}


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


@cache
def tiny_family(name: str) -> Family:
    """One of FAMILIES, whose model has been seen to use its pictures; made once a session."""
    family = FAMILIES[name]
    sample = Sample(images=((48, 40),), words=4)
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
