"""Losses as pure functions, each with its source.

Letters: B samples or pictures, C channels, L sequence length, V vocabulary, S answer slots of the whole batch, N image
tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from trainers.data.conversation import IGNORED

TINY = 1e-12


def answer_slots(logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The places that predict a labelled token.

    Args:
        logits: (B, L, V); place j predicts token j + 1.
        labels: (B, L), -100 where nothing is asked.

    Returns:
        logits (S, V) in float32, the tokens to predict (S,), and the sample (S,) that each belongs to.

    Raises:
        PruneZooError: The batch has no labels.
    """
    if labels is None:
        raise PruneZooError("training and measuring need labels: collate with answers=True")
    asked = labels[:, 1:] != IGNORED
    return logits[:, :-1][asked].float(), labels[:, 1:][asked], asked.nonzero()[:, 0]


def row_means(slots: Tensor, row: Tensor, rows: int) -> Tensor:
    """The mean over the answer slots of each row, (rows,); 0 where it has none.

    Args:
        slots: (S,) what is averaged.
        row: (S,) long, that each slot belongs to.
        rows: How many there are.
    """
    return slots.new_zeros(rows).index_add_(0, row, slots) / torch.bincount(row, minlength=rows).clamp_min(1)


def slot_states(out: Any, layers: Sequence[int]) -> Tensor:
    """Hidden states at the answer slots, (S, H, D).

    Args:
        out: What the host's forward passes return, with labels, and hidden states if any are asked for.
        layers: H of them, 0 for the embeddings, i for those behind decoder layer i.
    """
    asked = out.labels[:, 1:] != IGNORED
    if not layers:
        return out.logits.new_zeros(int(asked.sum()), 0, 0)
    if max(layers) >= len(out.hidden_states):
        raise PruneZooError(f"hidden_layers={list(layers)}: the model has layers 0 to {len(out.hidden_states) - 1}")
    return torch.stack([out.hidden_states[layer][:, :-1][asked] for layer in layers], dim=1)


def distillation_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) in nats per answer slot, times temperature² (Hinton et al., arXiv 1503.02531).

    Args:
        student: (S, V) logits.
        teacher: (S, V) logits, taken as constant.
        temperature: Above 1 it weighs the teacher's lesser choices more.
    """
    student = F.log_softmax(student / temperature, dim=-1)
    teacher = F.log_softmax(teacher.detach() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def top_kl(student: Tensor, top: Tensor, log_prob: Tensor, tail: Tensor) -> Tensor:
    """KL(teacher ‖ student) in nats per answer slot, where all but the teacher's likeliest tokens count as one.

    Never more than :func:`distillation_kl`, and equal to it where the teacher's other tokens have no mass.

    Args:
        student: (S, V) logits.
        top: (S, K) the teacher's likeliest tokens.
        log_prob: (S, K) their log-probabilities.
        tail: (S,) log of the mass of all other tokens.
    """
    top, log_prob = top.long(), log_prob.float()
    ours = F.log_softmax(student, dim=-1)
    if top.shape[-1] == student.shape[-1]:
        return (log_prob.exp() * (log_prob - ours.gather(-1, top))).sum(-1).mean()
    rest = ours.scatter(-1, top, -torch.inf).logsumexp(-1)
    kept = (log_prob.exp() * (log_prob - ours.gather(-1, top))).sum(-1)
    return (kept + tail.exp() * (tail - rest)).mean()


def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of hidden states over the teacher's mean square, mean over layers (TinyBERT, arXiv 1909.10351).

    The division is ours: it puts layers, whose states differ by orders of magnitude, on one scale.

    Args:
        student: (S, H, D), H layers.
        teacher: (S, H, D), taken as constant.
    """
    teacher = teacher.detach().float()
    error = (student.float() - teacher).square().mean((0, 2))
    return (error / teacher.square().mean((0, 2)).clamp_min(TINY)).mean()


def unexplained(made: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
    """Squared error of restored states over their spread around their mean: 1 where only the mean state is known.

    HoT (arXiv 2311.12028) takes the error of the poses that it restores; the division is ours.

    Args:
        made: (B, N, D).
        wanted: (B, N, D), taken as constant.
        valid: (B, N) bool; what is not counts nothing.
    """
    real, wanted = valid[..., None].float(), wanted.detach().float()
    mean = (wanted * real).sum((0, 1)) / real.sum().clamp_min(1)
    error, spread = (((value - wanted).square() * real).sum() for value in (made.float(), mean))
    return error / spread.clamp_min(TINY)


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log p(reference token) in nats per answer slot; logits (S, V), tokens (S,)."""
    return F.cross_entropy(logits, tokens)


def guide_mse(scores: Tensor, guide: Tensor, valid: Tensor) -> Tensor:
    """Mean squared error between scores and guide, CoViPAL's first stage (arXiv 2508.17243).

    The paper's normalisation of the guide is not known; here both sides are standardised within the sample, since
    raw attention sums differ by orders of magnitude between samples and only the order of the scores is used.

    Args:
        scores: (B, N), any scale.
        guide: (B, N), at least 0, higher = keep.
        valid: (B, N) bool.
    """
    error = (_standardise(scores, valid) - _standardise(guide, valid)).square()
    return (error * valid).sum() / valid.sum()


def guide_kl(scores: Tensor, guide: Tensor, valid: Tensor, cut: float = 0.5) -> Tensor:
    """KL(guide ‖ softmax(scores)) in nats per sample (explainability maps, arXiv 2506.01097).

    As in the paper the guide loses the lowest share ``cut`` of its tokens and is divided by its sum; a softmax over it
    would be almost uniform.

    Args:
        scores: (B, N), read as logits over the image tokens.
        guide: (B, N), at least 0; a sample without any positive value counts nothing.
        valid: (B, N) bool.
        cut: Share of tokens in [0, 1) whose guide is set to zero.
    """
    guide = guide.float().masked_fill(~valid, 0.0)
    if cut:
        floor = guide.masked_fill(~valid, torch.nan).nanquantile(cut, dim=-1, keepdim=True)
        guide = guide * (guide >= floor)
    target = guide / guide.sum(-1, keepdim=True).clamp_min(TINY)
    log_share = F.log_softmax(scores.float().masked_fill(~valid, -torch.inf), dim=-1).masked_fill(~valid, 0.0)
    return (torch.xlogy(target, target) - target * log_share).sum(-1).mean()


def map_loss(maps: Tensor, teacher: Tensor, valid: Tensor, temperature: float = 2.0) -> Tensor:
    """Mean over images, maps and heads of KL(teacher ‖ student) and of the squared error of logits (LRS-VQA's RFM).

    As in their code (arXiv 2503.07588) both terms divide logits by the temperature, count alike, and the KL is not
    multiplied by its square. Ours: the squared error is of logits less their mean, which no softmax sees.

    Args:
        maps: (B, R, H, N), attention logits.
        teacher: (B, R, H, N), likewise, taken as constant.
        valid: (B, N) bool.
        temperature: Above 0.
    """
    seen, count = valid[:, None, None], valid.sum(-1).clamp_min(1)[:, None, None]

    def centred(logits: Tensor) -> Tensor:
        logits = (logits.float() / temperature).masked_fill(~seen, 0.0)
        return (logits - logits.sum(-1, keepdim=True) / count[..., None]).masked_fill(~seen, 0.0)

    ours, theirs = centred(maps), centred(teacher.detach())
    logs = [part.masked_fill(~seen, -torch.inf).log_softmax(-1).masked_fill(~seen, 0.0) for part in (ours, theirs)]
    kl = (logs[1].exp() * (logs[1] - logs[0])).masked_fill(~seen, 0.0).sum(-1)
    return (kl + (ours - theirs).square().sum(-1) / count).mean() / 2


def topk_hinge(scores: Tensor, guide: Tensor, valid: Tensor, keep: Tensor, margin: float = 1.0) -> Tensor:
    """Ranking hinge: each of the guide's best tokens should score a margin above each of the others.

    The pairwise form of the ranking SVM (Joachims, KDD 2002), over the pairs that the top-K cut decides on; a pair
    weighs as much as its guides differ, so that a tie at the cut costs nothing.

    Args:
        scores: (B, N), any scale.
        guide: (B, N), at least 0, higher = keep.
        valid: (B, N) bool.
        keep: (B,) tokens that the cut lets through.
        margin: In units of the score.
    """
    guide = guide.float().masked_fill(~valid, -1.0)
    rank = guide.argsort(dim=-1, descending=True).argsort(dim=-1)
    best = (rank < keep[:, None]) & valid
    pairs = best[:, :, None] & (valid & ~best)[:, None, :]
    weight = (guide[:, :, None] - guide[:, None, :]) * pairs
    hinge = F.relu(margin - (scores[:, :, None] - scores[:, None, :]).float())
    return (weight * hinge).sum() / weight.sum().clamp_min(TINY)


def laplacian_l1(images: Tensor, targets: Tensor, levels: int = 4) -> Tensor:
    """Mean L1 distance of Laplacian pyramids, summed over the levels (Bojanowski et al., arXiv 1707.05776).

    It weighs edges of every size as much as areas. Halving is by means, doubling by repetition.

    Args:
        images: (B, C, H, W), sides divisible by 2^levels.
        targets: Likewise.
        levels: Bands that are compared, besides the small picture that is left.
    """
    rest, total = images - targets, images.new_zeros(())  # the pyramid is linear: one for the difference will do
    for _ in range(levels):
        smaller = F.avg_pool2d(rest, 2)
        total = total + (rest - F.interpolate(smaller, scale_factor=2.0)).abs().mean()
        rest = smaller
    return total + rest.abs().mean()


def _standardise(values: Tensor, valid: Tensor) -> Tensor:
    """Zero mean and unit variance over the valid tokens of each sample; (B, N), float32."""
    weight = valid.float() / valid.sum(-1, keepdim=True).clamp_min(1)
    centred = values.float().masked_fill(~valid, 0.0)
    centred = centred - (centred * weight).sum(-1, keepdim=True)
    variance = (centred.square() * weight).sum(-1, keepdim=True)
    return centred * (variance + TINY).rsqrt()
