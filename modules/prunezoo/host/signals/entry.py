"""What enters a decoder layer. Letters: B rows of the batch, L tokens, R images, D width."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..parts.decoder import Decoder, Rotary

ROWS = 256  # of an attention map at a time


@dataclass(frozen=True)
class Entry:
    """What enters a decoder layer."""

    hidden: Tensor  # (B, L, D)
    rotary: Rotary
    mask: Tensor | None  # (B, L) bool, False for padding; or what the layer is given, see `Decoder.attention_rows`
    memo: dict[str, Any] = field(default_factory=dict)  # what several signals of the layer are made from

    def of_images(self, sample: Tensor) -> "Entry":
        """The same with a row for each image, of which ``sample (R,)`` is the row of the batch."""
        size, mask = len(self.hidden), self.mask
        cos, sin = (part.expand(*part.shape[:-3], size, -1, -1).index_select(-3, sample) for part in self.rotary)
        mask = None if mask is None else mask.expand(size, *mask.shape[1:])[sample]
        return Entry(self.hidden[sample], (cos, sin), mask)

    def attended(self, decoder: Decoder, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`Decoder.attend` gives, computed once."""
        if "attended" not in self.memo:
            self.memo["attended"] = decoder.attend(layer, self.hidden, self.rotary, self.mask)
        return self.memo["attended"]
