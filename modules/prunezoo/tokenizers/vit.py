"""The two ViTs of TiTok (arXiv 2406.07550): one reads patches into a row of tokens, the other paints from the row.

Further tokens, as of a text, may stand beside. Names of the modules are those of the published weights.

Letters: B pictures, N tokens, P patches, W width, C width of a token in the row, X further tokens, S side in pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .start import NOISE, enter_what, grid_places, make_layers, token_places


@dataclass(frozen=True)
class Sizes:
    """Of one ViT."""

    grid: int  # patches along a side
    patch: int  # side of a patch, pixels
    tokens: int  # N
    width: int  # W
    layers: int
    heads: int
    code_width: int  # C
    spread: bool  # the tokens' places start spread evenly over the picture


class Further(nn.Module):
    """What stands beside the picture in a ViT: vectors of any width and number, and which of them are padding."""

    def __init__(self, inputs: int, places: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        enter_what(self.embed.weight, inputs**-0.5)
        marks = NOISE * torch.randn(places, width)
        marks[:, 0] = 1.0  # as `mark_places` marks what gives: else nothing looks here, and nothing is learnt from here
        self.places = nn.Parameter(marks)

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, X, inputs), brought to unit variance, to (B, X, W)."""
        vectors = nn.functional.layer_norm(vectors, vectors.shape[-1:])
        return self.embed(vectors.to(self.embed.weight.dtype)) + self.places[: vectors.shape[1]]


class Encoder(nn.Module):
    """ViT over class token, patches and queries; gives what becomes of the queries."""

    def __init__(self, sizes: Sizes, legacy_reshape: bool = False) -> None:
        super().__init__()
        s = sizes
        self.legacy_reshape = legacy_reshape
        self.patch_embed = nn.Conv2d(3, s.width, s.patch, s.patch)
        self.class_embedding = nn.Parameter(NOISE * torch.randn(1, s.width))
        self.positional_embedding = nn.Parameter(grid_places(s.grid, s.width, gives=True))
        places = token_places(s.tokens, s.grid, s.width, gives=False, spread=s.spread)
        self.latent_token_positional_embedding = nn.Parameter(places)
        self.ln_pre, self.ln_post = nn.LayerNorm(s.width), nn.LayerNorm(s.width)
        self.transformer = make_layers(s.layers, s.width, s.heads)
        self.conv_out = nn.Linear(s.width, s.code_width)
        with torch.no_grad():
            weight = self.patch_embed.weight
            enter_what(weight, 0.1)
            self.patch_embed.bias = nn.Parameter(-0.5 * weight.sum((1, 2, 3)))  # grey gives nothing
            self.conv_out.weight[:, : s.width // 2] *= 0.1
            self.conv_out.bias[0] = 1.0  # so that the angle tells how much there is, and not only of what

    def forward(
        self, images: Tensor, queries: Tensor, beside: Tensor | None = None, valid: Tensor | None = None
    ) -> Tensor:
        """Pictures (B, 3, S, S) and queries (N, W): latents (B, N, C).

        Args:
            images: In [0, 1].
            queries: One row for all.
            beside: (B, X, W) that is read too.
            valid: (B, X) bool; False is padding.
        """
        rows = images.shape[0]
        seen = self.see(images)
        asked = (queries + self.latent_token_positional_embedding).expand(rows, -1, -1)
        x = self.ln_pre(torch.cat([seen, asked], dim=1))
        x = run(self.transformer, x, beside, valid)
        latents = self.ln_post(x[:, seen.shape[1] :])
        if self.legacy_reshape:
            # (B, N, W) read as if it were (B, W, N), in the code that trained the published weights
            latents = latents.reshape(rows, latents.shape[2], latents.shape[1]).transpose(1, 2)
        return self.conv_out(latents)

    def see(self, images: Tensor) -> Tensor:
        """Class token and patches at their places, (B, 1 + P, W)."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        seen = torch.cat([self.class_embedding.expand(len(images), 1, -1), patches], dim=1)
        return seen + self.positional_embedding

    def bare(self, images: Tensor) -> Tensor:
        """The transformer over class token and patches alone, (B, 1 + P, W)."""
        return self.ln_post(run(self.transformer, self.ln_pre(self.see(images))))


class Decoder(nn.Module):
    """ViT over class token, mask tokens and a prefix of the row; gives what becomes of the mask tokens.

    Args:
        sizes: Of it.
        logits: None: pixels come out; else so many logits a patch.
    """

    def __init__(self, sizes: Sizes, logits: int | None = None) -> None:
        super().__init__()
        s = self.sizes = sizes
        self.logits = logits
        self.decoder_embed = nn.Linear(s.code_width, s.width)
        enter_what(self.decoder_embed.weight, 1.0)
        self.class_embedding = nn.Parameter(NOISE * torch.randn(1, s.width))
        self.positional_embedding = nn.Parameter(grid_places(s.grid, s.width, gives=False))
        self.mask_token = nn.Parameter(NOISE * torch.randn(1, 1, s.width))
        places = token_places(s.tokens, s.grid, s.width, gives=True, spread=s.spread)
        self.latent_token_positional_embedding = nn.Parameter(places)
        self.ln_pre, self.ln_post = nn.LayerNorm(s.width), nn.LayerNorm(s.width)
        self.transformer = make_layers(s.layers, s.width, s.heads)
        if logits is not None:
            self.ffn = nn.Sequential(nn.Linear(s.width, 2 * s.width), nn.Tanh(), nn.Linear(2 * s.width, logits))
        else:
            pixels = nn.Linear(s.width, 3 * s.patch**2)
            with torch.no_grad():  # nearly grey at first, or the first steps unlearn the codes to be rid of the noise
                pixels.weight *= 0.1
                pixels.bias.zero_()
            self.ffn = nn.Sequential(pixels)
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
            nn.init.dirac_(self.conv_out.weight)
            self.conv_out.bias = nn.Parameter(torch.full((3,), 0.5))

    def forward(self, row: Tensor, beside: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """The row's head (B, k, C): pixels (B, 3, S, S) or logits (B, logits, grid, grid).

        Args:
            row: k up to N.
            beside: (B, X, W) that is read too.
            valid: (B, X) bool; False is padding.
        """
        s, rows = self.sizes, row.shape[0]
        read = self.decoder_embed(row) + self.latent_token_positional_embedding[: row.shape[1]]
        blank = torch.cat([self.class_embedding[None], self.mask_token.expand(-1, s.grid**2, -1)], dim=1)
        x = self.ln_pre(torch.cat([(blank + self.positional_embedding).expand(rows, -1, -1), read], dim=1))
        x = run(self.transformer, x, beside, valid)
        x = self.ffn(self.ln_post(x[:, 1 : 1 + s.grid**2]))
        if self.logits is not None:
            return x.transpose(1, 2).unflatten(2, (s.grid, s.grid))
        return self.conv_out(lay_patches(x, s.grid, s.patch))


def run(layers: nn.ModuleList, x: Tensor, beside: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Layers over x (B, L, W), with (B, X, W) behind it as far as it is valid; what becomes of x."""
    length, padding = x.shape[1], None
    if beside is not None:
        x = torch.cat([x, beside], dim=1)
        if valid is not None:
            padding = nn.functional.pad(~valid, (length, 0))
    for layer in layers:
        x = layer(x, src_key_padding_mask=padding)
    return x[:, :length]


def lay_patches(x: Tensor, grid: int, patch: int) -> Tensor:
    """Patches (B, grid², 3 patch²) as pictures (B, 3, grid · patch, grid · patch)."""
    x = x.view(len(x), grid, grid, patch, patch, 3).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(len(x), 3, grid * patch, grid * patch)
