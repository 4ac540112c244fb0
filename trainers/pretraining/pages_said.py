"""What a patch of a page says to the language model, and a language model that begins with looking words up.

A patch's image token is a sum: waves of its row and column, and a vector for each thing that it shows. The tower learns
to say these sums; the language model can meanwhile be trained on sums made from labels, with no picture and no tower.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from prunezoo.core.errors import PruneZooError
from trainers.data.pages import NUMBERS
from trainers.data.pages_render import CELLS, GRID, NAMES

from .build import PAGES, grid_waves

_SCALE = 0.06  # of each vector, as of the word embeddings
_MATCH, _FAST = 1.8, 0.3  # gain of prepared queries and keys, on RoPE's slow pairs and on its fast ones
_SLOW_FROM = 7  # of the pairs of a head: those from here on turn by less than a radian over a page
_FETCH = 0.1  # gain of what prepared heads carry


class PatchWords(nn.Module):
    """Vectors for what a patch shows; they never learn.

    Digits and cells are said in the language model's own embeddings, since these are what it answers with. Names are
    said turned by a fixed rotation: otherwise a word of the question would find itself before any patch. A bar's upper
    edge says its name plainly, with a mark of its own.

    Args:
        vlm: whose word embeddings these are.
        seed: of the rotations and marks.
    """

    def __init__(self, vlm: LlavaForConditionalGeneration, seed: int = 7) -> None:
        super().__init__()
        words = vlm.get_input_embeddings().weight.detach().float()
        width = words.shape[1]
        draw = torch.Generator().manual_seed(seed)

        def vectors(*words_of: str) -> Tensor:
            return words[[PAGES.word_ids[word] for word in words_of]]

        def turn() -> Tensor:
            return torch.linalg.qr(torch.randn(width, width, generator=draw))[0]

        def marks(count: int) -> Tensor:
            return _SCALE * torch.randn(count, width, generator=draw)

        self.turn: Tensor
        self.turn_waves: Tensor
        self.waves: Tensor
        self.register_buffer("turn", turn(), persistent=False)
        self.register_buffer("turn_waves", turn(), persistent=False)
        waves = _SCALE * 2**0.5 * grid_waves(width, GRID) @ self.turn_waves
        self.register_buffer("waves", waves, persistent=False)
        said = {
            "name": vectors(*NAMES) @ self.turn,
            "cell": vectors(*CELLS),
            "digit": vectors(*NUMBERS),
            "order": marks(3),
            "last": marks(1),
            "bar": vectors(*NAMES) + marks(1),
        }
        for slot, table in said.items():
            self.register_buffer(f"say_{slot}", table, persistent=False)

    def table(self, slot: str) -> Tensor:
        """Vectors (n, D) of the choices of a slot."""
        return getattr(self, f"say_{slot}")

    def forward(self, labels: dict[str, Tensor]) -> Tensor:
        """Sums (B, 256, D) for labels (B, 256) as :func:`patch_labels` gives them."""
        total = self.waves.expand(len(labels["name"]), -1, -1)
        for slot in ("name", "cell", "digit", "order", "last", "bar"):
            table = torch.cat([self.table(slot), self.waves.new_zeros(1, self.waves.shape[1])])
            total = total + table[labels[slot]]  # -1, nothing, is the zeros at the end
        return total


def shows_something(labels: dict[str, Tensor]) -> Tensor:
    """Patches (B, 256) that hold the centre of a name or digit, or the upper edge of a bar."""
    return (labels["name"] >= 0) | (labels["digit"] >= 0) | (labels["bar"] >= 0)


@torch.no_grad()
def prepare_look_up(vlm: LlavaForConditionalGeneration, words: PatchWords) -> None:
    """Let attention begin with what pages need, which is slow to be found by chance.

    In layers 0 and 1 a word of the question meets patches that say it, and brings row and column from there; in layers
    0 to 2 patches and words meet others of the same row, or of the same column.

    Raises:
        PruneZooError: the language model is too small for that.
    """
    layers: Any = vlm.model.language_model.layers
    if len(layers) < 3 or vlm.config.text_config.num_attention_heads < 4:
        raise PruneZooError("sizes of a model for pages: at least 3 layers of 4 heads")
    width = words.turn.shape[0]
    size = layers[0].self_attn.head_dim
    gain = torch.full((size // 2,), _FAST)
    gain[_SLOW_FROM:] = _MATCH
    gain = torch.cat([gain, gain])[:, None]
    half = words.turn_waves.split(width // 2)  # (D / 2, D) each: what reads the waves of row and of column
    axes = [_orthogonal(size, width // 2) @ part for part in half]

    def match(layer: int, head: int, query: Tensor, key: Tensor) -> None:
        rows = slice(head * size, (head + 1) * size)
        attention = layers[layer].self_attn
        attention.q_proj.weight[rows], attention.k_proj.weight[rows] = gain * query, gain * key

    def carry(layer: int, head: int, what: Tensor) -> None:
        rows = slice(head * size, (head + 1) * size)
        attention = layers[layer].self_attn
        attention.v_proj.weight[rows], attention.o_proj.weight[:, rows] = what, _FETCH * what.T

    for layer, heads in ((0, (0, 1)), (1, (0,))):
        for head in heads:
            key = _orthogonal(size, width)
            match(layer, head, key @ words.turn.T, key)
            carry(layer, head, axes[head])
    for layer, first in ((0, 2), (1, 1), (2, 0)):
        for head, axis in enumerate(axes, first):
            match(layer, head, axis, axis)


def _orthogonal(rows: int, columns: int) -> Tensor:
    """(rows, columns), rows orthonormal where there are no more than columns."""
    return torch.linalg.qr(torch.randn(max(rows, columns), max(rows, columns)))[0][:rows, :columns]
