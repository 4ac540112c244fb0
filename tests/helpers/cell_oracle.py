"""What the vision stage by cells must equal: the bare model, nothing of which gets shorter.

In each block the patches of cells that have gone are hidden from others, and which cells go is worked out here, from
dense attention, with loops.
"""

from contextlib import contextmanager

import torch
from families import IMAGE, VIDEO
from input_oracle import blind_tower, by_run, is_packed, tower_of

from prunezoo.core.contract import Pruner

WHY = {
    "llava_next": "LLaVA-NeXT puts its crops together to one grid, which must be whole",
    "llava_onevision": "LLaVA-OneVision puts its crops together to one grid, which must be whole",
    "qwen2_vl": "Qwen2-VL merges two by two neighbouring patches behind it",
    "qwen2_5_vl": "Qwen2.5-VL merges two by two neighbouring patches behind it, and most blocks attend within windows",
    "qwen3_vl": "Qwen3-VL merges two by two neighbouring patches behind it",
    "internvl": "InternVL joins neighbouring patches behind it by a pixel shuffle",
    "idefics3": "Idefics3 joins neighbouring patches behind it by a pixel shuffle",
    "smolvlm": "SmolVLM joins neighbouring patches behind it by a pixel shuffle",
    "gemma3": "Gemma 3 pools patches behind it",
    "qwen3_vl_moe": "Qwen3-VL-MoE merges two by two neighbouring patches behind it",
    "qwen3_5": "Qwen3.5 merges two by two neighbouring patches behind it",
    "qwen3_5_moe": "Qwen3.5-MoE merges two by two neighbouring patches behind it",
}
"""What is done to patches behind each of these towers."""


class Watched(Pruner):
    """Keeps the cells that receive most in each block: inside of it."""

    name = "watched"
    stage = "vision"
    needs = ("received_attention",)

    def stages(self, depth):
        return tuple(range(depth))

    def score(self, inputs):
        assert inputs.drop_only
        return inputs.signal("received_attention")


class WatchedBehind(Watched):
    """Behind each block but the last."""

    name = "watched_behind"
    after_block = True

    def stages(self, depth):
        return tuple(range(depth - 1))


class Stopping(WatchedBehind):
    """What goes is put out as it was."""

    name = "stopping"
    restore = True


class Chooser:
    """Decides as these pruners should."""

    def __init__(self, tiny, batch, samples, encoded, pruner, keep, depth):
        """For a batch as it is ``encoded``; ``keep (R,)`` tokens of each image."""
        ids = batch["input_ids"]
        numbers = torch.arange(ids.numel()).view_as(ids)
        self.columns = by_run(tiny, batch, numbers, samples, -1)
        self.runs = [torch.ones_like(own, dtype=torch.bool) for own in self.columns]
        self.images = [
            (encoded.sample[row] * ids.shape[1] + encoded.slots[row][valid]).tolist()
            for row, valid in enumerate(encoded.inputs.valid)
        ]
        available = torch.tensor([len(own) for own in self.images])
        steps = pruner.schedule(keep, available, depth)
        self.steps = dict(zip(pruner.stages(depth), (step.tolist() for step in steps), strict=True))
        self.left = {}

    def begins(self, run):
        """Which images a run is of, all their columns alive."""
        shown = set(self.columns[run].flatten().tolist())
        for row, own in enumerate(self.images):
            if own[0] in shown:
                self.left[row] = list(own)
        return shown

    def __call__(self, run, block, received, alive):
        """See `blind_tower`."""
        if block == 0:
            self.begins(run)
        columns = self.columns[run].flatten().tolist()
        patches = {}
        for patch, column in enumerate(columns):
            patches.setdefault(column, []).append(patch)
        values, after = received.flatten(), alive.clone().flatten()
        for row, own in self.left.items():
            if own[0] not in patches or block not in self.steps:
                continue
            scores = {column: float(values[patches[column]].mean()) for column in own}
            best = sorted(own, key=lambda column: -scores[column])[: self.steps[block][row]]
            for column in set(own) - set(best):
                after[patches[column]] = False
            self.left[row] = [column for column in own if column in best]
        return after.view_as(alive)

    def dropped(self, encoded, ids):
        """``(B, L)`` bool, newlines of rows without a patch too."""
        gone = (ids == IMAGE) | (ids == VIDEO)
        for own in self.left.values():
            gone.view(-1)[own] = False
        if encoded.newlines is not None:
            for row, (slots, valid) in enumerate(zip(encoded.newlines.slots, encoded.newlines.valid, strict=True)):
                for line, slot in enumerate(slots[valid].tolist()):
                    tokens = (encoded.newlines.ends[row] == line) & encoded.inputs.valid[row]
                    base = encoded.sample[row] * ids.shape[1]
                    if any(int(base + column) in self.left[row] for column in encoded.slots[row][tokens]):
                        gone[encoded.sample[row], slot] = False
        return gone


@contextmanager
def by_cells(vlm, chooser, stop=False):
    """Within the block the tower hides what the chooser says, and, with ``stop``, what has gone stays as it was."""
    tower, alive, before = tower_of(vlm), [], []

    def watch(run, block, received, now):
        after = chooser(run, block, received, now)
        alive[:] = [now]
        return after

    def freeze(_module, _args, output):
        # Put on in front of the hooks with which transformers records what the projector reads.
        prefix = 0 if is_packed(vlm) else output.shape[1] - alive[0].shape[-1]
        states = output if is_packed(vlm) else output[:, prefix:]
        if not bool(alive[0].all()):
            states = torch.where(alive[0][..., None], states, before[0])
        before[:] = [states]
        return states if is_packed(vlm) else torch.cat([output[:, :prefix], states], 1)

    blocks = tower.blocks if is_packed(vlm) else getattr(tower.encoder, "layers", None) or tower.encoder.layer
    with blind_tower(vlm, chooser.runs, watch=watch):
        handles = [block.register_forward_hook(freeze, prepend=True) for block in blocks] if stop else []
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
