"""LLaVA, LLaVA-NeXT and LLaVA-OneVision."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from ...core.errors import PruneZooError
from ..parts.tower import Tower
from .base import Family, Kind, Order
from .cells import grid
from .gaps import Short

STRATEGY = {"clip_vision_model": "default", "siglip_vision_model": "full"}  # what leaves the patches and only these


class LlavaFamily(Family):
    """LLaVA: one square grid of patches an image; a CLIP or SigLIP tower."""

    title = "LLaVA"
    joined: ClassVar[str | None] = None  # what is done to patches between tower and language model

    def check(self) -> None:
        """Only towers and strategies that give the patches of a square, without CLS."""
        tower, strategy = self.config.vision_config.model_type, self.config.vision_feature_select_strategy
        if STRATEGY.get(tower) != strategy:
            known = ", ".join(f"{name} with '{own}'" for name, own in STRATEGY.items())
            raise PruneZooError(
                f"{self.title} with tower '{tower}' and vision_feature_select_strategy='{strategy}' is not supported; "
                f"supported: {known}"
            )

    @property
    def side(self) -> int:
        """Patches along a tile."""
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """One tile an image."""
        if batch.get("image_sizes") is not None:
            raise PruneZooError("'image_sizes' in the call is not supported for LLaVA: its images are squares")
        return [grid(self.side, self.side).flatten(0, 1)] * len(batch["pixel_values"])

    def tower(self) -> Tower:
        """CLIP or SigLIP."""
        has_cls = self.config.vision_config.model_type == "clip_vision_model"
        return Tower(self.vlm.model.vision_tower, self.config.vision_feature_layer, has_cls, self.joined)

    def short(self) -> Short:
        """Behind the projector, patch by patch."""
        return Short(self.tower(), (self.vlm.model.multi_modal_projector,))


class LlavaNextFamily(LlavaFamily):
    """LLaVA-NeXT: a thumbnail, tile 0, and the crops put together to one unpadded grid, tile 1, newlines in it."""

    title = "LLaVA-NeXT"
    joined = "LLaVA-NeXT puts its crops together to one grid, which must be whole"
    encoder_keys = {"image": ("pixel_values", "image_sizes")}

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """The thumbnail, then each row of the grid with its newline."""
        if batch.get("image_sizes") is None:
            raise PruneZooError(f"{self.title} needs the processor's image_sizes beside pixel_values")
        alone = self.tiled(batch)
        sizes = batch["image_sizes"].tolist()
        return [
            self.tiled_cells(size) if tiled else self.untiled_cells() for size, tiled in zip(sizes, alone, strict=True)
        ]

    def tiled(self, batch: Mapping[str, Any]) -> list[bool]:
        """Which images have crops besides the thumbnail."""
        return [True] * len(batch["image_sizes"])

    def tiled_cells(self, size: list[int]) -> Tensor:
        """For an image of ``size`` (height, width) in pixels."""
        rows, columns = self.grid_shape(*self.unpadded(size))
        cells = grid(rows, columns, tile=1)
        ends = cells[:, :1].clone()
        ends[..., 2] = -1
        return torch.cat([grid(self.side, self.side).flatten(0, 1), torch.cat([cells, ends], dim=1).flatten(0, 1)])

    def unpadded(self, size: list[int]) -> tuple[int, int]:
        """Rows and columns of the patches that are of the picture, in the grid of its crops."""
        tiles = get_anyres_image_grid_shape(
            size, self.config.image_grid_pinpoints, self.config.vision_config.image_size
        )
        _, rows, columns = unpad_image(torch.empty(1, *(t * self.side for t in tiles)), size).shape
        return rows, columns

    def untiled_cells(self) -> Tensor:
        """The thumbnail alone, and one newline that ends it."""
        return torch.cat([grid(self.side, self.side).flatten(0, 1), torch.tensor([[0, -1, -1]])])

    def grid_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns that the language model reads of the unpadded grid."""
        return rows, columns

    def deal(self, kind: Kind, batch: Mapping[str, Any], values: Tensor, order: Order = "tower") -> Tensor:
        """Put together to grids as features are."""
        newline = values.new_zeros(values.shape[2])
        return torch.cat(self.pack(values.split(self.tile_counts(batch)), batch["image_sizes"], newline))[:, None]

    def tile_counts(self, batch: Mapping[str, Any]) -> list[int]:
        """Pictures that the tower sees of each image: the thumbnail and its crops."""
        points, side = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        sizes = zip(batch["image_sizes"].tolist(), self.tiled(batch), strict=True)
        return [1 + tiled * math.prod(get_anyres_image_grid_shape(size, points, side)) for size, tiled in sizes]

    def pictures(self, kind: Kind, batch: Mapping[str, Any]) -> Tensor:
        """Without those that fill up a batch, which the model takes out."""
        pixels = zip(batch["pixel_values"], self.tile_counts(batch), strict=True)
        return torch.cat([own[:count] for own, count in pixels])

    def pack(self, values: Sequence[Tensor], sizes: Tensor, newline: Tensor) -> list[Tensor]:
        """The model's own way from the tiles of each image, ``(tiles, N, C)``, to its tokens ``(n, C)``."""
        strategy = self.config.vision_feature_select_strategy
        return self.vlm.model.pack_image_features(values, sizes, strategy, image_newline=newline)[0]


class LlavaOnevisionFamily(LlavaNextFamily):
    """LLaVA-OneVision: as LLaVA-NeXT, but large grids are made smaller, several images in a prompt have a thumbnail
    only, and a clip is pooled frames, each a tile, with one newline behind the last.
    """

    title = "LLaVA-OneVision"
    joined = "LLaVA-OneVision puts its crops together to one grid, which must be whole"
    encoder_keys = {
        "image": ("pixel_values", "image_sizes", "batch_num_images"),
        "video": ("pixel_values_videos", "image_sizes_videos"),
    }
    as_tensor = ("video",)

    def pooled(self, kind: Kind, output: Any) -> Any:
        """Older releases put the newline behind a clip only after their encoder."""
        pooled = output.pooler_output
        if kind == "image" or pooled.shape[1] % math.ceil(self.side / 2) ** 2:
            return pooled
        return torch.cat([pooled, self.vlm.model.image_newline.expand(len(pooled), 1, -1).to(pooled)], dim=1)

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """Images as above; clips frame by frame."""
        if kind == "image":
            return super().cells(kind, batch)
        clips, frames = batch["pixel_values_videos"].shape[:2]
        side = math.ceil(self.side / 2)
        parts = [grid(side, side, frame).flatten(0, 1) for frame in range(frames)]
        return [torch.cat([*parts, torch.tensor([[-1, -1, -1]])])] * clips

    def tiled(self, batch: Mapping[str, Any]) -> list[bool]:
        """Those that are alone in their prompt."""
        numbers = batch.get("batch_num_images")
        if numbers is None:
            return super().tiled(batch)
        return [number == 1 for number in torch.as_tensor(numbers).tolist() for _ in range(number)]

    def grid_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """At most so many tiles' worth as the configuration says, give or take."""
        most = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * self.side**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

    def pack(self, values: Sequence[Tensor], sizes: Tensor, newline: Tensor) -> list[Tensor]:
        """Likewise."""
        ratio = self.config.vision_aspect_ratio
        return self.vlm.model.pack_image_features(values, sizes, image_newline=newline, vision_aspect_ratio=ratio)[0]

    def deal(self, kind: Kind, batch: Mapping[str, Any], values: Tensor, order: Order = "tower") -> Tensor:
        """Images as above; clips pooled as features are, with a newline behind."""
        if not values.is_floating_point() and self.interpolates(kind, batch):
            raise PruneZooError(
                f"{self.title} makes the tokens of clips and of large pictures by interpolation, so no patch is theirs "
                "alone: use a signal without maps, as 'received_attention', or smaller pictures"
            )
        if kind == "image":
            return super().deal(kind, batch, values)
        clips = len(batch["pixel_values_videos"])
        pooled = self.vlm.model.apply_pooling(values).reshape(clips, -1, values.shape[2])
        return pad(pooled, (0, 0, 0, 1)).flatten(0, 1)[:, None]

    def check_gaps(self, kind: Kind, batch: Mapping[str, Any]) -> None:
        """Whole cells only."""
        if self.interpolates(kind, batch):
            raise PruneZooError(
                f"{self.title} makes the tokens of clips and of large pictures by interpolation, so a cell that is "
                "left out before the tower would leak into others: use a pruner of the prompt stage, or smaller "
                "pictures"
            )

    def interpolates(self, kind: Kind, batch: Mapping[str, Any]) -> bool:
        """Whether any token is made of neighbouring patches by interpolation."""
        if kind == "video":
            return True
        shapes = [self.unpadded(size) for size in batch["image_sizes"].tolist()]
        return any(
            tiled and self.grid_shape(*shape) != shape for shape, tiled in zip(shapes, self.tiled(batch), strict=True)
        )
