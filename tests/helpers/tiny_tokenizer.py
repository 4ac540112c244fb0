"""A One-D-Piece that is made in a moment, and pictures for it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from prunezoo import OneDPiece
from prunezoo.tokenizers.base import Text, Tokenizer, tokenizer_class

TINY: dict = {"image_size": 32, "patch": 8, "tokens": 24, "width": 32, "heads": 2}
TINY |= {"encoder_layers": 1, "decoder_layers": 1, "codes": 64, "code_width": 4, "head": "pixels"}


def tiny(seed: int = 0, **overrides) -> OneDPiece:
    torch.manual_seed(seed)
    return OneDPiece(**{**TINY, **overrides}).eval()


def picture(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    grid = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)


def pictures() -> torch.Tensor:
    """``(3, 3, 32, 32)`` in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(picture(i))).permute(2, 0, 1) / 255 for i in range(3)])


def save_photographs(folder: Path) -> Path:
    """Sixty pictures in three folders."""
    for number in range(60):
        (folder / str(number % 3)).mkdir(parents=True, exist_ok=True)
        picture(number, 48, 40).save(folder / str(number % 3) / f"{number}.png")
    return folder


VIT = {"image_size": 32, "patch": 8, "tokens": 6, "width": 32, "encoder_layers": 1, "decoder_layers": 1}
FAMILY: dict[str, dict] = {
    "one_d_piece": TINY,
    "instella": {**VIT, "token_bits": 5, "heads": 1, "merge_after": 0, "decoder_width": 32, "decoder_heads": 1}
    | {"split_after": 1, "decoder_layers": 2},
    "textok": {**VIT, "heads": 2, "latent_width": 3, "latent_bits": 4, "text_width": 12, "text_tokens": 5},
    "tokenflow": {"image_size": 32, "patch": 4, "scales": (1, 3, 8), "codes": 32, "meaning_width": 6, "pixel_width": 4}
    | {"width": 32, "layers": 1, "heads": 2, "decoder_layers": 1, "tower_width": 12, "channels": (32, 32, 32)},
}
"""A small config of every tokenizer."""


def member(name: str, seed: int = 0, **overrides) -> Tokenizer:
    """A small tokenizer of that kind, in eval mode."""
    torch.manual_seed(seed)
    return tokenizer_class(name)(**{**FAMILY[name], **overrides}).eval()


def text_for(tokenizer: Tokenizer, count: int, seed: int = 0) -> Text | None:
    """A text of two, three, … words for each picture, where the tokenizer reads one."""
    if not tokenizer.reads_text:
        return None
    generator = torch.Generator().manual_seed(seed)
    words = 2 + torch.arange(count)
    valid = torch.arange(count + 1) < words[:, None]
    return Text(torch.randn(count, count + 1, tokenizer.config.to_dict()["text_width"], generator=generator), valid)
