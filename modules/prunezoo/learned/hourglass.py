"""After the Hourglass Tokenizer (HoT): a clip keeps tokens of few frames, and what the deeper layers made of those
tells the hidden states of all.

Hourglass Tokenizer for Efficient Transformer-Based 3D Human Pose Estimation, Li et al., CVPR 2024,
https://arxiv.org/abs/2311.12028, code https://github.com/NationalGAILab/HoT.

From the authors' code: frames are the tokens; of each the mean over its parts stands for it, and representative frames
are the peaks of density times distance to a denser one (DPC-KNN, two neighbours), chosen without gradient; the layers
behind run on them alone; and cross-attention from a learned query a frame, zero at first, to the last states restores
those of all frames. Theirs restores a pose for every frame. A language model answers in words, so here the few tokens
are all that it reads, and the recovery head is what teaches them to hold what was dropped: it is trained to restore
the hidden states that the whole clip would have had, and its gradient comes back through the frozen layers. In use it
does not run; :meth:`Hourglass.recovered` is for who wants states of every frame. That a frame may give a share of its
tokens, and that what stays gathers from what goes, are ours.

| | authors' code | ours |
|---|---|---|
| where tokens go | in front of a layer of the network | in front of the language model, which is frozen |
| of such a frame | all of its tokens (joints) stay | `share` of them, chosen likewise, so that more frames stay |
| what stays | the tokens, and a learned position | the tokens, and what they gather from all: attention, 0 at first |
| position | learned, by rank | the language model's own, as they were |
| a query of the recovery | a learned vector of its frame | likewise, between two frames by time, and its place in it |
| recovery attends to | the same joint in all frames that stayed | all tokens that stayed |
| loss | error of the pose, of its speed | KL(full model ‖ fewer tokens), error of the restored hidden states |
| equal densities | noise of 1e-6 tells them apart | the first is the denser |

Letters: B images, N image tokens, K kept, n tokens and F frames of one image, D width of the language model, E hidden
width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.budgets import upload
from ..core.checks import require_no_nan
from ..core.clusters import density_peaks
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.plan import gather_rows, mask_to_index
from ..core.registry import register_pruner
from ..training_free._grid import share
from ._blocks import CrossAttention, SwiGLU, place_features


@dataclass(frozen=True)
class HourglassConfig(PrunerConfig):
    """Which tokens represent a clip, and sizes of what gathers and recovers."""

    width: int = 4096  # D, width of the language model's input embeddings
    hidden: int = 512  # E, width of the two attentions
    heads: int = 8  # of them, divides hidden
    octaves: int = 5  # of the sines and cosines of a token's place and time, see `ppm`
    share: float = 0.125  # of the tokens of a representative frame that stay, in (0, 1]; 1: whole frames, as in HoT
    neighbours: int = 2  # by which density is measured, itself among them, at least 1
    slots: int = 8  # learned queries of the recovery, evenly spaced in time

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("width", "hidden", "heads", "octaves", "neighbours", "slots"):
            if getattr(self, name) < 1:
                raise PruneZooError(f"hourglass: {name} must be at least 1, got {getattr(self, name)}")
        if self.hidden % self.heads:
            raise PruneZooError(f"hourglass: hidden={self.hidden} must be a multiple of heads={self.heads}")
        if not 0 < self.share <= 1:
            raise PruneZooError(f"hourglass: share must lie in (0, 1], got {self.share}")


@register_pruner("hourglass")
class Hourglass(Pruner):
    """Density peaks among frames and in them; what stays gathers from what goes, and a head that undoes it."""

    criteria = ("similarity",)
    needs = ("frame",)
    config_class = HourglassConfig
    config: HourglassConfig

    def __init__(self, config: HourglassConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        c = self.config
        place = 6 * c.octaves + 2
        self.enter, self.place = nn.Linear(c.width, c.hidden, bias=False), nn.Linear(place, c.hidden)
        self.gather, self.feed = CrossAttention(c.hidden, c.heads), SwiGLU(c.hidden)
        self.add = nn.Linear(c.hidden, c.width)
        nn.init.zeros_(self.add.weight)
        nn.init.zeros_(self.add.bias)
        self.recovery = Recovery(c, place)

    @classmethod
    def tiny_config(cls, feature_dim: int, text_dim: int) -> dict[str, Any]:
        """See the base class."""
        return {"width": feature_dim, "hidden": 16, "heads": 2}

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """The representative tokens of each clip, with what they gather; a still picture is one frame."""
        if (width := inputs.features.shape[-1]) != self.config.width:
            raise PruneZooError(
                f"this hourglass was built for tokens of width {self.config.width}, the model's have {width}: "
                f"build it with width={width}"
            )
        index, valid = mask_to_index(self.represent(inputs), inputs.most_asked)
        tokens = inputs.features.masked_fill(~inputs.valid[..., None], 0)
        x = self.enter(F.rms_norm(tokens, (width,))) + self.place(self.places(inputs))
        own, kept = gather_rows(tokens, index), gather_rows(x, index)
        known = kept + self.gather(kept, x, inputs.valid)
        made = own + self.add(known + self.feed(known)).to(own.dtype)
        require_no_nan(made, self.name, "made")
        whole = (keep == inputs.valid.sum(1))[:, None, None]
        return PruneOutput(index, valid, torch.where(whole, gather_rows(inputs.features, index), made))

    @torch.no_grad()
    def represent(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` bool, as many of each image as are asked for."""
        c, frames = self.config, inputs.signal("frame").long().clamp_min(0)
        return represent(inputs.features.float(), frames, inputs.valid, inputs.asked or (), c.share, c.neighbours)

    def places(self, inputs: PruneInputs) -> Tensor:
        """``(B, N, 6 * octaves + 2)``: where a token lies, as in `ppm`, and sines and cosines of when."""
        octaves = self.config.octaves
        turns = clip_times(inputs)[..., None] * torch.pi * 2.0 ** torch.arange(octaves, device=inputs.valid.device)
        features = torch.cat([place_features(inputs, octaves), turns.sin(), turns.cos()], -1)
        return features.to(self.place.weight.dtype)

    def recovered(self, inputs: PruneInputs, output: PruneOutput, states: Tensor) -> Tensor:
        """Hidden states of all tokens, out of those of the tokens that stayed.

        Args:
            inputs: The images.
            output: What :meth:`forward` left of them.
            states: ``(B, K, D)`` of the kept tokens, behind the decoder layer that the head was trained for.

        Returns:
            ``(B, N, D)``, in the type of the weights; arbitrary on padding.
        """
        places = self.places(inputs)
        return self.recovery(places, clip_times(inputs), states, gather_rows(places, output.index), output.valid)


class Recovery(nn.Module):
    """Cross-attention from learned queries in time to the states of the tokens that stayed.

    Args:
        config: Of the pruner.
        place: Numbers that tell where and when a token is.
    """

    def __init__(self, config: HourglassConfig, place: int) -> None:
        super().__init__()
        c = config
        self.width = c.width
        self.slots = nn.Parameter(torch.zeros(c.slots, c.hidden))
        self.enter, self.place = nn.Linear(c.width, c.hidden, bias=False), nn.Linear(place, c.hidden)
        self.look, self.feed = CrossAttention(c.hidden, c.heads), SwiGLU(c.hidden)
        self.out = nn.Linear(c.hidden, c.width)

    def forward(self, places: Tensor, times: Tensor, states: Tensor, at: Tensor, valid: Tensor) -> Tensor:
        """``(B, N, D)``.

        Args:
            places: ``(B, N, ·)`` of all tokens.
            times: ``(B, N)`` of them, in [0, 1].
            states: ``(B, K, D)`` of those that stayed.
            at: ``(B, K, ·)`` their places.
            valid: ``(B, K)`` bool, False for filler.
        """
        steps = times * (len(self.slots) - 1)
        near = (1 - (steps[..., None] - torch.arange(len(self.slots), device=steps.device)).abs()).clamp_min(0)
        query = near.to(self.slots.dtype) @ self.slots + self.place(places)
        states = states.to(self.slots.dtype).masked_fill(~valid[..., None], 0)
        seen = self.enter(F.rms_norm(states, (self.width,))) + self.place(at)
        query = query + self.look(query, seen, valid)
        return self.out(query + self.feed(query))


def clip_times(inputs: PruneInputs) -> Tensor:
    """``(B, N)`` float32 in [0, 1]: when each token is, from the first to the last frame of its clip; a picture's 0."""
    frames = inputs.signal("frame").long().clamp_min(0).masked_fill(~inputs.valid, 0).float()
    return frames / frames.amax(1, keepdim=True).clamp_min(1)


def represent(
    tokens: Tensor, frame: Tensor, valid: Tensor, counts: Sequence[int], of_frame: float, neighbours: int
) -> Tensor:
    """``(B, N)`` bool: so many tokens of each image, of as few frames as have them, where a frame gives a share of its
    own.

    Frames differ from image to image, so that the host asks the device twice: of which frame each token is, and which
    frames are the peaks; not image by image.

    Args:
        tokens: ``(B, N, D)`` float32.
        frame: ``(B, N)`` long, from 0; numbers may be left out.
        valid: ``(B, N)`` bool.
        counts: Of each image, at most its tokens.
        of_frame: Share in (0, 1] of its tokens that a representative frame gives; more where all frames give theirs.
        neighbours: By which density is measured.
    """
    numbers = frame.masked_fill(~valid, -1).cpu().numpy()
    clips = [[np.flatnonzero(row == number) for number in np.unique(row[row >= 0])] for row in numbers]
    every = [slots for clip in clips for slots in clip]
    rows = [row for row, clip in enumerate(clips) for _ in clip]
    if not every:
        return torch.zeros_like(valid)
    of_all, there = gathered(tokens, rows, every)
    means = of_all.masked_fill(~there[..., None], 0).sum(1) / there.sum(1)[:, None]
    most = max(map(len, clips))
    table = tokens.new_zeros(len(clips), most, tokens.shape[2])
    place = upload([place for clip in clips for place in range(len(clip))], tokens.device)
    table[upload(rows, tokens.device), place] = means
    lengths = upload([len(clip) for clip in clips], tokens.device)
    real = torch.arange(most, device=tokens.device) < lengths[:, None]
    order = density_peaks(table, real, lengths, most, neighbours)[0].cpu().numpy()

    few: list[np.ndarray] = []
    owners: list[int] = []
    quotas: list[int] = []
    for row, (clip, count) in enumerate(zip(clips, counts, strict=True)):
        ranked = order[row][: len(clip)]
        given = of_frame * np.cumsum([len(clip[number]) for number in ranked])
        chosen = sorted(ranked[: int((given < count - 1e-6).sum()) + 1].tolist())
        few += [clip[number] for number in chosen]
        owners += [row] * len(chosen)
        quotas += share(count, [len(clip[number]) for number in chosen])
    of_few, there = gathered(tokens, owners, few)
    wanted = upload(quotas, tokens.device)
    peaks, _ = density_peaks(of_few, there, wanted, max(quotas), neighbours)
    taken = torch.arange(peaks.shape[1], device=tokens.device) < wanted[:, None]
    best = slots_of(few, tokens.device).gather(1, peaks)
    image = upload(owners, tokens.device)[:, None].expand_as(best)
    kept = torch.zeros_like(valid, dtype=torch.uint8)
    return kept.index_put((image, best), taken.to(kept.dtype), accumulate=True) > 0


def gathered(tokens: Tensor, rows: Sequence[int], slots: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """``(R, S, D)``, tokens of each list of slots, of the image of that row, and ``(R, S)`` bool, False for filler."""
    sizes = upload([len(own) for own in slots], tokens.device)
    index = slots_of(slots, tokens.device)
    there = torch.arange(index.shape[1], device=tokens.device) < sizes[:, None]
    return tokens[upload(list(rows), tokens.device)[:, None], index], there


def slots_of(slots: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """``(R, S)`` long, filled up with 0."""
    index = np.zeros((len(slots), max(map(len, slots))), np.int64)
    for row, own in enumerate(slots):
        index[row, : len(own)] = own
    return upload(index.ravel().tolist(), device).view(index.shape)
