"""Many choices for the same batch, read at once: the images are encoded once, the words before them are read once.

Letters: G choices of each sample, B samples, R images, N image tokens of an image, L prompt tokens, S tokens left.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.contract import PruneOutput
from ..core.errors import PruneZooError
from ..core.plan import mask_to_index
from .encoded import Encoded, Newlines
from .parts.model import VLM, empty_cache
from .stages.prompt import HostOutput, pruned_forward, shorten_prompt


def group_forward(vlm: VLM, encoded: Encoded, keep: Tensor, **options: Any) -> HostOutput:
    """Run the model on G really shorter prompts of each sample, in one batch.

    What all choices of a sample share is not computed again: tower and projector (``encoded``), and the cache of the
    words in front of the first image, which a batch padded on the right has in common columns.

    Args:
        vlm: The model that made ``encoded``.
        encoded: From :func:`encode`.
        keep: ``(G, R, N)`` bool, the tokens that each choice keeps of each image.
        options: Passed to the model.

    Returns:
        Logits and labels of B * G rows: those of sample 0's choices first, then sample 1's. Original positions.
    """
    draws = len(keep)
    many, source = repeat_samples(encoded, draws)
    index, valid = mask_to_index(keep.flatten(0, 1)[source])
    output = PruneOutput(index, valid)
    shared = shared_prefix(encoded)
    if shared:
        columns = torch.arange(many.mask.shape[1], device=many.mask.device).expand_as(many.mask)
        rest = {**many.batch, "attention_mask": many.mask & (columns >= shared), "position_ids": columns}
        short, plan = shorten_prompt(vlm, replace(many, batch=rest), output)
        if not plan.identity:
            cache = empty_cache(vlm)
            vlm(input_ids=encoded.batch["input_ids"][:, :shared], past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(draws)
            seen = torch.ones(len(many.mask), shared, dtype=torch.long, device=many.mask.device)
            inputs = short.model_inputs(vlm)
            inputs["attention_mask"] = torch.cat([seen, inputs["attention_mask"]], dim=1)
            out = vlm(**inputs, past_key_values=cache, **options)
            return HostOutput(out.logits, short.labels)
    return pruned_forward(vlm, many, output, **options)


def repeat_samples(encoded: Encoded, copies: int) -> tuple[Encoded, Tensor]:
    """The batch with each sample ``copies`` times, one after the other.

    Returns:
        The batch of B * copies samples, and ``(copies * R,)`` long: where in ``copies`` stacked batches each of its
        images comes from, so that ``stacked.flatten(0, 1)[source]`` puts rows ``(copies, R, ...)`` in their order.
    """
    stacked = [(number, copy) for copy in range(copies) for number in range(len(encoded.rows))]
    placed = sorted(stacked, key=lambda pair: encoded.rows[pair[0]] * copies + pair[1])  # as `source`, on the host
    order = [number for number, _ in placed]
    copy = torch.arange(copies, device=encoded.sample.device)[:, None]
    sample = (encoded.sample * copies + copy).flatten()  # of the stacked rows
    source = sample.argsort(stable=True)
    image = source % max(len(encoded.sample), 1)

    def rows(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[image]

    old, lines = encoded.inputs, encoded.newlines
    inputs = replace(
        old,
        features=old.features[image],
        valid=old.valid[image],
        cells=old.cells[image],
        text=rows(old.text),
        text_valid=rows(old.text_valid),
        text_roles=rows(old.text_roles),
        signals={name: signal[image] for name, signal in old.signals.items()},
        sizes=rows(old.sizes),
        sample=sample[source],
        known=tuple(old.counts[number] for number in order),
        host_cells=None,
    )
    newlines = None
    if lines is not None:
        counts = tuple(lines.counts[number] for number in order)
        newlines = Newlines(lines.features[image], lines.slots[image], lines.valid[image], lines.ends[image], counts)
    deep = tuple(level[image] for level in encoded.deep)
    batch = dict(encoded.batch)
    for name, value in encoded.batch.items():
        if isinstance(value, Tensor):
            if len(value) != len(encoded.mask):
                raise PruneZooError(f"'{name}' has no row for each sample: take one image a sample, or pruned_forward")
            batch[name] = value.repeat_interleave(copies, 0)
    labels = None if encoded.labels is None else encoded.labels.repeat_interleave(copies, 0)
    columns, real = (part.repeat_interleave(copies, 0) for part in encoded.words)
    many = replace(
        encoded, inputs=inputs, batch=batch, labels=labels, sample=sample[source], slots=encoded.slots[image],
        newlines=newlines, source=None, deep=deep, words=(columns, real),
        kinds=tuple(encoded.kinds[number] for number in order),
        rows=tuple(encoded.rows[number] * copies + copy for number, copy in placed),
        real=tuple(count for count in encoded.real for _ in range(copies)),
    )  # fmt: skip
    return many, source


def shared_prefix(encoded: Encoded) -> int:
    """Columns at the left that hold a real token of every sample, none of them an image's, and ask for no answer.

    None where the model reads more than ids and mask (token types, positions of its own): what those say of a prefix
    by itself is the family's business.
    """
    if not len(encoded.sample) or not encoded.batch.keys() <= {"input_ids", "attention_mask"}:
        return 0
    first = torch.where(encoded.inputs.valid, encoded.slots, encoded.mask.shape[1]).min()
    common = encoded.mask.all(0)
    if encoded.labels is not None:
        common &= (encoded.labels < 0).all(0)
    blocked = (~common).nonzero()
    return min(int(first), int(blocked[0, 0]) if len(blocked) else int(first))
