"""Reads the published weights of One-D-Piece and of TiTok's later code: their names and shapes to ours.

`turing-motors/One-D-Piece-{S,B,L}-256` hold the paper's layout: 1 x 1 convolutions where linear maps are here, logits
over MaskGIT-VQGAN codes, that VQGAN's decoder, and latents that were reshaped where they should have been transposed
(``legacy_reshape``). TiTok's later code transposes, paints pixels at once (``head="pixels"``), tells codes apart by
distance (``unit_codes=False``, its ``use_l2_norm``) and has decoders wider than encoders. Both are read; everything
else is refused, as its variational and its text-aware tokenizers. Sizes are read off the shapes.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import PruneZooError
from ..core.files import read_tensors
from .one_d_piece import OneDPiece

HEAD_WIDTH = 64  # channels of an attention head, in all published sizes
RENAMED = (  # theirs, as a regular expression, and ours
    (r"\.ln_1\.", ".norm1."),
    (r"\.ln_2\.", ".norm2."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".linear1."),
    (r"\.mlp\.c_proj\.", ".linear2."),
    (r"^quantize\.embedding\.weight$", "quantize.codebook"),
    (r"^pixel_quantize\.embedding\.weight$", "pixel_codes"),
)
LINEAR = re.compile(r"(encoder\.conv_out|decoder\.ffn\.\d)\.weight")  # theirs are 1 x 1 convolutions


def read_official(path: str | Path, legacy_reshape: bool | None = None, unit_codes: bool | None = None) -> OneDPiece:
    """A tokenizer, in eval mode, from a safetensors file in the published layout; see :func:`from_official`.

    Raises:
        PruneZooError: It cannot be read, or is not of that layout.
    """
    return from_official(read_tensors(Path(path)), legacy_reshape, unit_codes, where=f"{path}: ")


def from_official(
    state: Mapping[str, Tensor],
    legacy_reshape: bool | None = None,
    unit_codes: bool | None = None,
    where: str = "",
    heads: int | None = None,
) -> OneDPiece:
    """A tokenizer, in eval mode, from tensors in the published layout.

    Args:
        state: By their names.
        legacy_reshape: How the latents were reshaped, which the tensors do not say. None: as in the code that belongs
            to the head, so True with logits over codes and False with pixels.
        unit_codes: Whether latents and codes are brought to length 1, ``use_l2_norm`` of the published config, which
            the tensors do not say either. None: likewise True with logits over codes and False with pixels.
        where: What errors begin with.
        heads: Attention heads of both parts; None: of 64 channels each, as in all published sizes.

    Raises:
        PruneZooError: A tensor is missing, of a shape that does not fit, or unknown.
    """

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise PruneZooError(f"{where}tensor '{name}' is missing; this is not One-D-Piece's published layout")
        return state[name].shape

    width, _, patch, _ = shape("encoder.patch_embed.weight")
    codes, code_width = shape("quantize.embedding.weight")
    grid = round((shape("encoder.positional_embedding")[0] - 1) ** 0.5)
    decoder_width, _ = shape("decoder.decoder_embed.weight")
    head = "codes" if "pixel_quantize.embedding.weight" in state else "pixels"
    tokenizer = OneDPiece(
        image_size=grid * patch,
        patch=patch,
        tokens=shape("latent_tokens")[0],
        width=width,
        encoder_layers=count_layers(state, "encoder"),
        decoder_layers=count_layers(state, "decoder"),
        heads=heads or max(width // HEAD_WIDTH, 1),
        decoder_width=decoder_width,
        decoder_heads=heads or max(decoder_width // HEAD_WIDTH, 1),
        codes=codes,
        code_width=code_width,
        unit_codes=head == "codes" if unit_codes is None else unit_codes,
        head=head,
        legacy_reshape=head == "codes" if legacy_reshape is None else legacy_reshape,
    )
    expected = tokenizer.state_dict()
    converted = {name: expected[name] for name in ("quantize.sums", "quantize.uses")}  # of training; not published
    for theirs, tensor in state.items():
        ours = theirs
        for pattern, name in RENAMED:
            ours = re.sub(pattern, name, ours)
        converted[ours] = tensor.flatten(1) if LINEAR.fullmatch(theirs) else tensor
        if ours == "quantize.codebook":
            converted[ours] = F.normalize(tensor.float(), dim=-1) if tokenizer.config.unit_codes else tensor.float()
        if ours not in expected:
            raise PruneZooError(f"{where}unexpected tensor '{theirs}'; this is not One-D-Piece's published layout")
        if converted[ours].shape != expected[ours].shape:
            raise PruneZooError(
                f"{where}tensor '{theirs}' has shape {tuple(tensor.shape)}, which does not fit the others"
            )
    for name in sorted(expected.keys() - converted.keys()):
        raise PruneZooError(f"{where}no tensor for '{name}'; the file is not whole")
    tokenizer.load_state_dict(converted)
    return tokenizer.eval()


def count_layers(state: Mapping[str, Tensor], part: str) -> int:
    """Transformer layers of the encoder or decoder."""
    numbers = [int(m[1]) for name in state if (m := re.match(rf"{part}\.transformer\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1
