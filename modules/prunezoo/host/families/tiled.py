"""InternVL, Idefics3 and SmolVLM: an image is cut into square tiles, which the prompt says how to put together."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...core.errors import PruneZooError
from ..parts.tower import InternVLTower, Tower
from .base import Family, Kind, Order
from .cells import blocks, runs, tiles
from .gaps import Short, before_joining


class InternVLFamily(Family):
    """InternVL: the tiles of an image are one unbroken run of placeholders, the thumbnail last. Frames are images."""

    title = "InternVL"
    as_tensor = ("image",)

    def check(self) -> None:
        """Patches without CLS."""
        strategy = self.config.vision_feature_select_strategy
        if strategy != "default":
            raise PruneZooError(
                f"InternVL with vision_feature_select_strategy='{strategy}' is not supported; supported: 'default'"
            )

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """A run is an image."""
        vision = self.config.vision_config
        side = int(vision.image_size[0] // vision.patch_size[0] * self.config.downsample_ratio)
        mask = batch["input_ids"] == self.config.image_token_id
        return [_tiles(self.title, length, side) for _, _, length in runs(mask)]

    def deal(self, kind: Kind, batch: Mapping[str, Any], values: Tensor, order: Order = "tower") -> Tensor:
        """The patches that the shuffle joins."""
        return blocks(values, round(1 / self.config.downsample_ratio))

    def short(self) -> Short:
        """Before the shuffle, which needs the square."""
        return before_joining(self.tower())

    def tower(self) -> Tower:
        """InternVL's own."""
        joined = "InternVL joins neighbouring patches behind it by a pixel shuffle"
        return InternVLTower(self.vlm.model.vision_tower, self.config.vision_feature_layer, joined=joined)


class QianfanOcrFamily(InternVLFamily):
    """Qianfan-OCR: as InternVL, over Qwen3."""

    title = "Qianfan-OCR"

    def tower(self) -> Tower:
        """Of another make."""
        return Family.tower(self)


class Idefics3Family(Family):
    """Idefics3: the tiles of an image stand apart, each behind a tag, the whole picture last. Frames are images."""

    title = "Idefics3"
    encoder_keys = {"image": ("pixel_values", "pixel_attention_mask")}
    as_tensor = ("image",)

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """Every image ends with the whole picture, so the tag before the last run of all is that of whole pictures."""
        side = batch["pixel_values"].shape[-1] // self.config.vision_config.patch_size // self.config.scale_factor
        ids = batch["input_ids"]
        found = runs(ids == self.config.image_token_id)
        tags = [int(ids.numpy()[row, start - 1]) if start else -1 for row, start, _ in found]
        cells, length = [], 0
        for place, (row, _, own) in enumerate(found):
            length += own
            last = place + 1 == len(found) or found[place + 1][0] != row
            if last or tags[place] == tags[-1]:
                cells.append(_tiles(self.title, length, side))
                length = 0
        return cells

    def deal(self, kind: Kind, batch: Mapping[str, Any], values: Tensor, order: Order = "tower") -> Tensor:
        """The patches that the shuffle joins."""
        return blocks(values, self.config.scale_factor)

    def pictures(self, kind: Kind, batch: Mapping[str, Any]) -> Tensor:
        """Without those that fill up a batch, which the model takes out."""
        pictures = batch["pixel_values"].flatten(0, 1)
        return pictures[(pictures != 0).flatten(1).any(1)]

    def short(self) -> Short:
        """Before the shuffle, which needs the square."""
        return before_joining(self.tower())

    def tower(self) -> Tower:
        """Of SigLIP's make."""
        joined = f"{self.title} joins neighbouring patches behind it by a pixel shuffle"
        return Tower(self.vlm.model.vision_model, -1, has_cls=False, joined=joined)


class SmolVLMFamily(Idefics3Family):
    """SmolVLM: as Idefics3."""

    title = "SmolVLM"


def _tiles(title: str, tokens: int, side: int) -> Tensor:
    if tokens % side**2:
        raise PruneZooError(
            f"{title}: an image has {tokens} placeholders, no multiple of the {side**2} of a tile: use one processor "
            "for text and images"
        )
    return tiles(tokens // side**2, side)
