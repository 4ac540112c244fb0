"""CoreMatching against what the authors' own function chose, and on a model against its neurons seen by hooks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_llava import LONG, TWO, make_image

from prunezoo import PruneInputs, PruneZooError, build_pruner, encode
from prunezoo.host import run_pruned

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "corematching.json").read_text())


@pytest.mark.parametrize("expected", GOLDEN["outputs"], ids=lambda case: f"seed{case['seed']}")
def test_the_authors_function_keeps_the_same_tokens(expected):
    random = np.random.default_rng(expected["seed"])
    neurons = random.standard_normal((1, 621, 256)).astype("float32")
    bias = random.standard_normal((1, 621, 1)).astype("float32")
    neurons = torch.from_numpy((neurons + 0.7 * bias).astype("float32"))
    image, words = neurons[:, 5:581], torch.cat([neurons[:, :5], neurons[:, 581:]], 1)
    valid = torch.ones(1, 576, dtype=torch.bool)
    text, text_valid = torch.zeros(1, 45, 1), torch.ones(1, 45, dtype=torch.bool)
    signals = {"mlp_activations@previous": image, "word_mlp_activations@previous": words}
    inputs = PruneInputs(torch.zeros(1, 576, 1), valid, torch.zeros(1, 576, 3).long(), text, text_valid, signals)
    output = build_pruner("corematching")(inputs, expected["kept_count"])
    assert output.scores[0, :20].tolist() == expected["score_first20"]
    assert (
        output.index[0].tolist() == expected["kept"]
        and output.scores[0, output.index[0]].min() > expected["elbow_value"]
    )


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
