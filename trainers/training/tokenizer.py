"""Train a tokenizer on pictures, in two stages within one run, as One-D-Piece does (arXiv 2501.10064).

First everything learns: either the codes that a frozen pixel tokenizer gives the picture (the paper's), or the pixels
at once (the small recipe). Then encoder, queries and codebook stand still and the decoder learns to paint. In both a
random length is drawn each step, and the decoder reads no more of the row than that. `tokenizer_guided.py` trains
those that read texts, or learn a frozen model's meaning.

Left out of the paper's second stage: its ConvNeXt feature loss, for which weights would have to be downloaded, and its
adversarial loss. In their place stands the L1 distance of Laplacian pyramids (Bojanowski et al., arXiv 1707.05776).

Letters: B pictures, N tokens.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchmetrics import Metric

from prunezoo.core.errors import PruneZooError
from prunezoo.tokenizers.base import Painted, Text, Tokenizer
from prunezoo.tokenizers.maskgit_vqgan import PixelTokenizer
from prunezoo.tokenizers.one_d_piece import OneDPiece

from .losses import laplacian_l1
from .optimizer import adamw_cosine

Distance = Literal["l2", "l1", "smooth_l1"]
DISTANCES: dict[Distance, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": partial(F.smooth_l1_loss, beta=0.1),
}


class TokenizerModule(L.LightningModule):
    """The tokenizer and its two stages.

    Args:
        tokenizer: What is trained.
        first: What the first stage learns: `pixels`, or the `codes` of a frozen pixel tokenizer.
        pixel_tokenizer: Safetensors file of that pixel tokenizer, a MaskGIT-VQGAN; `trainers.upkeep.unpickle` writes
            it from the published weights.
        first_share: Share in [0, 1] of the training that is the first stage.
        tail_drop: Draw a length each step, from 1 to N, all alike; False, for comparison: always the whole row.
        drop_rate: Share in [0, 1] of the steps in which it is drawn; in the others it is the whole row.
        distance: Of the pixels: `l2`, squared; `l1`; or `smooth_l1`, squared below 0.1 and linear above.
        mirror: Whether half of the pictures are mirrored; not where a text says what is left and right.
        perceptual_weight: Weight of the Laplacian pyramids' distance beside that of the pixels.
        lr: Peak learning rate.
        warm_up: Share of the steps in which it rises from 0; from there it falls by a cosine.
        floor: Share of it that is left at the end, in [0, 1].
        betas: AdamW's.
        weight_decay: Of the matrices; vectors have none.
        measure: Lengths that validation paints.
    """

    teacher: PixelTokenizer | None

    def __init__(
        self,
        tokenizer: Tokenizer,
        first: Literal["pixels", "codes"] = "pixels",
        pixel_tokenizer: str | None = None,
        first_share: float = 0.8,
        tail_drop: bool = True,
        perceptual_weight: float = 0.1,
        lr: float = 1e-3,
        warm_up: float = 0.05,
        floor: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        measure: tuple[int, ...] = (1, 4, 16, 64, 256),
        drop_rate: float = 1.0,
        distance: Distance = "l2",
        mirror: bool = True,
    ) -> None:
        super().__init__()
        head = tokenizer.config.head if isinstance(tokenizer, OneDPiece) else "pixels"
        if (first == "codes") != (head == "codes"):
            raise PruneZooError(f"first='{first}' does not fit a tokenizer with head='{head}': make them equal")
        if not 0.0 <= first_share <= 1.0 or not 0.0 <= warm_up < 1.0:
            raise PruneZooError(f"first_share={first_share} must lie in [0, 1], warm_up={warm_up} in [0, 1)")
        if not 0.0 <= drop_rate <= 1.0:
            raise PruneZooError(f"drop_rate={drop_rate} must lie in [0, 1]")
        self.tokenizer = tokenizer
        self.drop_rate, self.distance, self.mirror = drop_rate, distance, mirror
        self.first, self.first_share, self.tail_drop = first, first_share, tail_drop
        self.perceptual_weight = perceptual_weight
        self.lr, self.warm_up, self.floor, self.betas, self.weight_decay = lr, warm_up, floor, betas, weight_decay
        self.measure = tuple(tokenizer.check_length(length) for length in measure)
        self.quality = Quality(len(self.measure))
        self.used: Tensor
        self.register_buffer("used", torch.zeros(1 << tokenizer.config.bits, dtype=torch.bool), persistent=False)
        self.__dict__["teacher"] = None  # not a submodule: in no checkpoint and no optimizer
        if isinstance(tokenizer, OneDPiece) and first == "codes":
            if pixel_tokenizer is None:
                raise PruneZooError("first='codes' needs pixel_tokenizer: a file that `trainers.upkeep.unpickle` wrote")
            teacher = self.__dict__["teacher"] = load_pixel_tokenizer(pixel_tokenizer)
            tokenizer.pixel_codes.data.copy_(teacher.quantize.embedding.weight)
            tokenizer.pixel_decoder.load_state_dict(teacher.decoder.state_dict())

    def setup(self, stage: str) -> None:
        """Move the pixel tokenizer to where training happens."""
        self.total_steps = self.trainer.estimated_stepping_batches
        if stage == "fit" and not math.isfinite(self.total_steps):
            raise PruneZooError("the schedule needs an end: set trainer.max_steps or trainer.max_epochs")
        if self.teacher is not None:
            self.teacher.to(self.trainer.strategy.root_device)

    @property
    def second_stage(self) -> bool:
        """Whether only the decoder still learns."""
        return self.global_step >= self.first_share * self.total_steps

    def read(self, batch: Any) -> tuple[Tensor, Text | None]:
        """Pictures (B, 3, S, S), and what is said of them."""
        return batch, None

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """One step of either stage, each picture mirrored or not."""
        images, text = self.read(batch)
        if self.mirror:
            images = torch.where(torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5, images.flip(-1), images)
        length = self.draw()
        terms: dict[str, Tensor] = {}
        if self.second_stage:
            codes = self.tokenizer.encode(images, text)[:, : self.tokenizer.numbers(length)]
            terms.update(self.pixel_terms(self.tokenizer.paint(codes, text), images))
        else:
            made = self.tokenizer(images, length, text)
            terms["commitment"] = made.loss
            if self.teacher is not None:
                terms["codes"] = F.cross_entropy(made.output.float(), self.teacher.encode(images))
            else:
                terms.update(self.pixel_terms(made.output, images))
            terms.update(self.other_terms(made, images))
        loss = torch.stack(list(terms.values())).sum()
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()}, batch_size=len(images))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(images))
        return loss

    def draw(self) -> int:
        """The length of this step."""
        whole = self.tokenizer.config.tokens
        drops = self.tail_drop and (self.drop_rate == 1.0 or float(torch.rand(())) < self.drop_rate)
        return draw_length(whole) if drops else whole

    def other_terms(self, made: Painted, images: Tensor) -> dict[str, Tensor]:
        """What else the first stage learns; nothing here."""
        return {}

    def pixel_terms(self, painted: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Distance of the pixels, and of Laplacian pyramids."""
        painted = painted.float()
        terms = {"pixels": DISTANCES[self.distance](painted, images)}
        if self.perceptual_weight:
            terms["perceptual"] = self.perceptual_weight * laplacian_l1(painted, images)
        return terms

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Paint from prefixes of each row."""
        images, text = self.read(batch)
        codes = self.tokenizer.encode(images, text)
        self.used[codes.unique()] = True
        painted = [self.tokenizer.decode(codes[:, : self.tokenizer.numbers(k)], text) for k in self.measure]
        error = torch.stack([(some - images).square().mean((1, 2, 3)) for some in painted], dim=1)
        self.quality.update(-10 * error.clamp_min(1e-10).log10())

    def on_validation_epoch_end(self) -> None:
        """Log the mean PSNR at each length, and the share of the codes in use."""
        quality = self.quality.compute()
        self.quality.reset()
        values = {f"val/psnr_{k}": value for k, value in zip(self.measure, quality, strict=True)}
        used = self.used.float().mean()
        self.used.zero_()
        values["val/score"] = quality.mean()
        self.log_dict({**values, "val/codes_used": used}, sync_dist=True)
        shown = ", ".join(f"{float(values[f'val/psnr_{k}']):.2f} at {k}" for k in self.measure)
        rank_zero_info(f"step {self.global_step}: PSNR {shown} tokens; {100 * float(used):.0f} % of the codes in use")

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine, over both stages."""
        weights = self.tokenizer.parameters()
        return adamw_cosine(weights, self.lr, self.weight_decay, self.warm_up, self.total_steps, self.betas, self.floor)


class Quality(Metric):
    """Mean over pictures of some figures of each, (figures,)."""

    full_state_update = False

    def __init__(self, figures: int) -> None:
        super().__init__()
        self.total: Tensor
        self.count: Tensor
        self.add_state("total", torch.zeros(figures), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add (B, figures)."""
        self.total += values.sum(0)
        self.count += len(values)

    def compute(self) -> Tensor:
        """The means, (figures,)."""
        return self.total / self.count


def draw_length(tokens: int) -> int:
    """A length from 1 to ``tokens``, all alike; one for the whole batch, as in the paper."""
    return int(torch.randint(1, tokens + 1, ()))


def load_pixel_tokenizer(path: str) -> PixelTokenizer:
    """The frozen MaskGIT-VQGAN in a safetensors file."""
    if not Path(path).is_file():
        raise PruneZooError(f"pixel_tokenizer: {path} is not a file; `python -m trainers.upkeep.unpickle` writes it")
    tokenizer = PixelTokenizer()
    try:
        tokenizer.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError) as error:
        raise PruneZooError(f"{path} is not a pixel tokenizer ({str(error).splitlines()[0]})") from error
    return tokenizer.eval().requires_grad_(False)
