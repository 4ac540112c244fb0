"""TexTok: latents that carry only what a text beside the picture does not say.

Language-Guided Image Tokenization for Generation, Zha et al., 2024, https://arxiv.org/abs/2412.05796.

From the paper: the encoder reads patches, learned queries and the text's embeddings; what becomes of the queries is
mapped to eight numbers each. The decoder reads these, the same text and mask tokens, and paints. The text is needed
again where a picture is painted: it is part of the code.

Reconstructed: there is no released code, and the weights of the losses are not known. The adversarial loss and the
perceptual network are left out. Ours: the text is a frozen language model's own input embeddings in place of T5's
states, so words get learned places; the ViTs start as One-D-Piece's do. The paper's latents are real numbers, which
fit into no file; here each lies between -1 and 1 and is rounded to 2^bits evenly spaced values, with the gradient
straight through, and any prefix of a row that was trained with tail drop is a picture. Texts that are longer than the
config says are cut.

Letters: B pictures, N tokens, C numbers of a token, T words, D width of their embeddings, W width of the ViTs, S side
of the picture in pixels.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import PruneZooError
from .base import Painted, Text, Tokenizer, TokenizerConfig
from .start import NOISE
from .vit import Decoder, Encoder, Further, Sizes

READERS = {"both": (True, True), "encoder": (True, False), "decoder": (False, True), "none": (False, False)}


@dataclass(frozen=True)
class TexTokConfig(TokenizerConfig):
    """Sizes; by default the published ViT-B, beside a text of T5-XL's width."""

    tokens: int = 32  # N
    latent_width: int = 8  # C
    latent_bits: int = 8  # of each number in a file; ours
    width: int = 768  # W
    encoder_layers: int = 12
    decoder_layers: int = 12
    heads: int = 12  # divides width
    text_width: int = 2048  # D
    text_tokens: int = 128  # words of a text that are read
    text: str = "both"  # who reads the text: both, encoder, decoder, none

    def __post_init__(self) -> None:
        names = ("tokens", "latent_width", "latent_bits", "width", "encoder_layers", "decoder_layers", "heads")
        self.check_least("textok", *names, "text_width", "text_tokens")
        if self.width % 4 or self.width % self.heads:
            raise PruneZooError(f"textok: width={self.width} must be a multiple of 4 and of heads={self.heads}")
        for name, most in (("tokens", 256), ("latent_bits", 16), ("latent_width", 1024), ("text_tokens", 4096)):
            if getattr(self, name) > most:
                raise PruneZooError(f"textok: {name}={getattr(self, name)} must be at most {most}")
        self.check_choices("textok", text=READERS)

    @property
    def bits(self) -> int:
        """Of each of the numbers of a token."""
        return self.latent_bits


class TexTok(Tokenizer):
    """Pictures and texts to rows of tokens, and prefixes of such rows and texts to pictures."""

    name = "textok"
    config_class = TexTokConfig
    config: TexTokConfig

    def __init__(self, config: TexTokConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        c = self.config
        sizes = Sizes(c.grid, c.patch, c.tokens, c.width, c.encoder_layers, c.heads, c.latent_width, spread=True)
        self.encoder = Encoder(sizes)
        self.latent_tokens = nn.Parameter(NOISE * torch.randn(c.tokens, c.width))
        self.decoder = Decoder(replace(sizes, layers=c.decoder_layers))
        self.texts = nn.ModuleDict(
            {
                part: Further(c.text_width, c.text_tokens, c.width)
                for part, reads in zip(("encoder", "decoder"), READERS[c.text], strict=True)
                if reads
            }
        )

    @property
    def reads_text(self) -> bool:
        """Whether a text is given wherever pictures or codes are; False for the ablation without."""
        return self.config.text != "none"

    def forward(self, images: Tensor, length: int, text: Text | None = None) -> Painted:
        """See :meth:`Tokenizer.forward`; the loss is 0."""
        latents = self.latents(images, text)
        codes = self.round(latents)
        rounded = latents + (self.values(codes) - latents).detach()
        output = self.read(rounded[:, : self.check_length(length)], text)
        return Painted(output, codes.flatten(1), latents.new_zeros(()))

    def codes_of(self, images: Tensor, text: Text | None = None) -> Tensor:
        """Rounded numbers ``(B, N C)`` long, token by token."""
        return self.round(self.latents(images, text)).flatten(1)

    def paint(self, codes: Tensor, text: Text | None = None) -> Tensor:
        """Pixels ``(B, 3, S, S)`` from rounded numbers ``(B, k C)``."""
        return self.read(self.vectors(codes), text)

    def vectors(self, codes: Tensor) -> Tensor:
        """Numbers from -1 to 1, ``(B, k, C)`` from rounded ones ``(B, k C)``."""
        return self.values(codes.unflatten(1, (-1, self.config.latent_width)))

    def latents(self, images: Tensor, text: Text | None) -> Tensor:
        """The real numbers ``(B, N, C)``, float32, between -1 and 1."""
        return self.encoder(images, self.latent_tokens, *self.beside("encoder", text)).float().tanh()

    def read(self, latents: Tensor, text: Text | None) -> Tensor:
        """Pixels ``(B, 3, S, S)`` from the first k tokens' numbers ``(B, k, C)``."""
        return self.decoder(latents.to(self.latent_tokens.dtype), *self.beside("decoder", text))

    def round(self, latents: Tensor) -> Tensor:
        """Numbers between -1 and 1 as whole ones from 0 to 2^bits - 1."""
        return ((latents + 1) / 2 * ((1 << self.config.bits) - 1)).round().long()

    def values(self, codes: Tensor) -> Tensor:
        """The reverse of :meth:`round`, float32."""
        return codes.float() * (2 / ((1 << self.config.bits) - 1)) - 1

    def beside(self, part: str, text: Text | None) -> tuple[Tensor | None, Tensor | None]:
        """What encoder or decoder reads of the text: (B, T, W), and what of it is no padding."""
        if text is None or part not in self.texts:
            return None, None
        words = slice(self.config.text_tokens)
        return self.texts[part](text.embeddings[:, words]), text.valid[:, words]

    def bare(self, images: Tensor) -> Tensor:
        """See :meth:`Tokenizer.bare`."""
        return self.encoder.bare(images.to(self.key_weight.dtype))

    @property
    def key_weight(self) -> Tensor:
        """The map into the row."""
        return self.encoder.conv_out.weight

    def numbers(self, length: int) -> int:
        """The numbers of so many tokens."""
        return length * self.config.latent_width

    def check_text(self, text: Text | None, pictures: int) -> None:
        """See :meth:`Tokenizer.check_text`; and it must be of the width that this was built for."""
        super().check_text(text, pictures)
        if text is None:
            return
        wanted = (pictures, text.valid.shape[-1], self.config.text_width)
        if text.embeddings.shape != wanted or text.valid.shape != wanted[:2]:
            raise PruneZooError(
                f"a text must be (B, T, {self.config.text_width}) with valid (B, T) for {pictures} pictures, got "
                f"{tuple(text.embeddings.shape)} and {tuple(text.valid.shape)}: take the language model of its training"
            )
