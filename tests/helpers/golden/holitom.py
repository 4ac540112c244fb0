"""HoliTom: 12 frames of 49 tokens of which a third move, with two changes of scene; attention of each frame."""

from math import ceil

import numpy as np
import torch

from prunezoo import PruneInputs, build_pruner
from prunezoo.core.clusters import density_peaks
from prunezoo.training_free.holitom import cluster, cut_windows, saved

INPUTS = ("seed",)
FRAMES, TOKENS = 12, 49


def made(seed):
    random = np.random.default_rng(seed)
    frames = [random.standard_normal((TOKENS, 16)).astype("float32")]
    step = np.where(np.arange(TOKENS) % 3 == 0, 0.9, 0.15)[:, None]
    for number in range(1, FRAMES):
        noise = random.standard_normal((TOKENS, 16))
        frames.append((noise if number in (4, 9) else frames[-1] + step * noise).astype("float32"))
    attention = torch.from_numpy(random.standard_normal((FRAMES, TOKENS)).astype("float32")).softmax(-1)
    return torch.from_numpy(np.stack(frames)), attention


def answer(case):
    """Of one frame a quarter stay: 13 by attention, rounded up, or 12 as centres; in ascending order."""
    frames, attention = made(case["seed"])
    alike, answers = torch.cosine_similarity(frames[1:], frames[:-1], dim=-1).numpy(), {}
    for tau in (0.8, 0.65):
        for longest in (1024, 3):
            windows = cut_windows(alike > tau, longest)
            answers[f"windows tau={tau} max={longest}"] = [list(window) for window in windows]
            answers[f"saved tau={tau} max={longest}"] = float(sum(saved(alike > tau, window) for window in windows))
    valid, merge = torch.ones(2, TOKENS, dtype=torch.bool), build_pruner("holitom").merge
    signals = {"frame": torch.zeros(2, TOKENS).long(), "received_attention": attention[[0, 5]]}
    moving = PruneInputs(frames[[0, 5]], valid, torch.zeros(2, TOKENS, 3).long(), signals=signals)
    answers["dynamic D=0 positions of frame 0 and 5"] = merge(moving, ceil(TOKENS / 4)).index.tolist()
    count = torch.tensor([round(TOKENS / 4)])
    peaks, _ = density_peaks(frames[:1], valid[:1], count, int(count), 7)
    answers["dpc centres of frame 0 in order of score"] = peaks[0].tolist()
    centres, _, merged = cluster(frames[0], int(count), 7, 0.6)
    order = centres.argsort()
    answers["static positions"] = centres[order].tolist()
    answers["static features first 3"] = merged[order[:3]].tolist()
    return answers
