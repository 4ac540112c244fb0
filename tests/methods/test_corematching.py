"""CoreMatching on a model, against its neurons seen by hooks; golden figures are in test_golden.py."""

import pytest
import torch
from tiny_llava import LONG, TWO, make_image

from prunezoo import PruneZooError, build_pruner, encode
from prunezoo.host import run_pruned


@torch.no_grad()
def test_on_a_model_it_keeps_what_its_neurons_say(deep_llava):
    """A ragged batch: the word that asks is counted from the end of each prompt."""
    batch = deep_llava.batch([LONG, TWO], [[make_image(0)], [make_image(5), make_image(6)]])
    pruner, seen = build_pruner("corematching", layer=2), []
    mlp = deep_llava.vlm.model.language_model.layers[1].mlp
    handle = mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0] > 0))
    deep_llava.vlm(**batch)
    handle.remove()
    encoded = encode(deep_llava.vlm, batch)
    scores = []
    for sample, slots in zip(encoded.sample.tolist(), encoded.slots, strict=True):
        words = encoded.mask[sample] & (batch["input_ids"][sample] != deep_llava.vlm.config.image_token_id)
        asks = seen[0][sample, words.nonzero()[-5, 0]]
        scores.append((seen[0][sample, slots] & asks).sum(-1))
    output = run_pruned(deep_llava.vlm, encoded, pruner, 9).output
    assert torch.equal(output.scores, torch.stack(scores).float()) and output.scores.std() > 0


def test_bad_fields_are_refused():
    for field in ("layer", "word"):
        with pytest.raises(PruneZooError, match=f"{field}=0"):
            build_pruner("corematching", **{field: 0})
