"""VidCom²: clips whose frames differ by a vector; the count is the authors', which is not exact."""

import numpy as np
import torch

from prunezoo.training_free.vidcom2 import choose, frame_shares, likeness, published_counts

INPUTS = ("seed", "frames", "per_frame", "ratio")


def answer(case):
    random, frames, size = np.random.default_rng(case["seed"]), case["frames"], case["per_frame"]
    x = random.standard_normal((frames, size, 32)).astype("float32")
    c = random.standard_normal((frames, 1, 32)).astype("float32")
    x = (x * np.float32(0.6) + c).astype("float32").reshape(-1, 32)
    frame = torch.arange(frames).repeat_interleave(size)
    like_clip, like_frame = likeness(torch.from_numpy(x), frame)
    counts = published_counts(frame_shares(like_clip, frame, case["ratio"]), frame.bincount())
    kept = choose(like_clip + like_frame, frame, counts).nonzero()[:, 0].tolist()
    return {"counts": counts.tolist(), "count": len(kept), "kept": kept}
