"""One forward of the layer stage: ragged counts at several stages, labels, merged tokens, what the statistics tell."""

import itertools

import pytest
import torch
from layer_oracle import Watch, masked
from layer_pruners import RAGGED, Scripted, close, scripted
from tiny_llava import LONG, NONE, SHORT, TWO, make_image

from prunezoo import attach, encode, full_forward
from prunezoo.core.contract import PruneOutput
from prunezoo.host import run_pruned


def last_real(encoded):
    """``(B,)`` the last column of each row that is no padding."""
    return encoded.mask.shape[1] - 1 - encoded.mask.flip(1).int().argmax(1)


@pytest.mark.parametrize("layers", [(0,), (1,), (2,), (3,), (0, 2), (1, 3), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_stages_with_ragged_counts_equal_nested_oracles(deep_llava, side, layers):
    images = [[make_image(0)], [make_image(5), make_image(6)], [], [make_image(1)]]
    batch = deep_llava.batch([LONG, TWO, NONE, SHORT], images, padding_side=side)
    pruner, rows = scripted(*layers), torch.arange(4)
    with torch.no_grad():
        encoded = encode(deep_llava.vlm, batch)
        with Watch(pruner) as watch:
            run = run_pruned(deep_llava.vlm, encoded, pruner, RAGGED, output_hidden_states=True)
        gone, _ = watch.gone(encoded)
        with masked(deep_llava.vlm, gone):
            expected = full_forward(deep_llava.vlm, encoded).logits[rows, last_real(encoded)]
        bare = full_forward(deep_llava.vlm, encoded).logits[rows, last_real(encoded)]
    close(run.host.logits[:, -1], expected)
    assert sorted(gone) == list(layers) and (run.host.logits[:2, -1] - bare[:2]).abs().amax(1).min() > 1e-3
    assert torch.equal(run.output.count, RAGGED)
    # The work is really less: what leaves each layer has the length of its longest row.
    lengths = [state.shape[1] for state in run.host.hidden_states]
    for layer, length in enumerate(lengths[1:]):
        away = gone[max((k for k in gone if k <= layer), default=-1)] if layer >= layers[0] else None
        width = encoded.mask.shape[1] if away is None else int((encoded.mask & ~away).sum(1).max())
        assert length == width
    counts = [[len(out.index[0][out.valid[0]]) for _, out in watch.calls][i] for i in range(len(layers))]
    whole = [36, *counts]
    spans = [b - a for a, b in itertools.pairwise([0, *layers, 4])]
    assert float(run.tokens[0]) == pytest.approx(sum(n * span for n, span in zip(whole, spans, strict=True)) / 4)


def test_labels_give_the_models_own_loss(deep_llava, mixed):
    vlm, labels = deep_llava.vlm, mixed["input_ids"].masked_fill(mixed["attention_mask"] == 0, -100)
    with attach(vlm, scripted(1, 3), keep=7):
        out = vlm(**mixed, labels=labels)
    run = run_pruned(vlm, encode(vlm, {**mixed, "labels": labels}), scripted(1, 3), 7)
    assert torch.equal(out.logits, run.host.logits) and out.logits.shape[:2] == run.host.labels.shape
    assert out.logits.shape[1] < labels.shape[1]
    assert out.loss == vlm.loss_function(out.logits, run.host.labels, vlm.config.text_config.vocab_size)
    kept = run.host.labels != -100
    shown = [row[row != 4] for row in (run.host.labels[i][kept[i]] for i in range(4))]  # without placeholders
    assert all(torch.equal(a, b[(b != -100) & (b != 4)]) for a, b in zip(shown, labels, strict=True))


def test_merged_features_stand_at_their_anchors(deep_llava, mixed):
    class Halves(Scripted):
        """Every other token, averaged with the one after it."""

        exact = False

        def reduce(self, inputs, keep):
            index = torch.arange(0, inputs.valid.shape[1], 2).expand(len(inputs.valid), -1)
            merged = (inputs.features[:, ::2] + inputs.features[:, 1::2]) / 2
            return PruneOutput(index, inputs.valid[:, ::2], merged)

    pruner = Halves().eval()
    pruner.layers = (1, 2)
    with torch.no_grad():
        encoded = encode(deep_llava.vlm, mixed)
        with Watch(pruner) as watch:
            run = run_pruned(deep_llava.vlm, encoded, pruner, 9)
        gone, made = watch.gone(encoded)
        with masked(deep_llava.vlm, gone, made):
            expected = full_forward(deep_llava.vlm, encoded).logits[:, -1]
        with masked(deep_llava.vlm, gone):
            plain = full_forward(deep_llava.vlm, encoded).logits[:, -1]
    close(run.host.logits[:, -1], expected)
    assert (expected - plain)[0].abs().max() > 1e-3  # merging is not dropping
    assert run.output.index[0].tolist() == list(range(0, 36, 4))


def test_stats_print_tokens_and_bytes(deep_llava, mixed):
    vlm = deep_llava.vlm
    with attach(vlm, scripted(1, 3), keep=6) as run:
        assert str(run.stats).splitlines()[0] == "layer stage, layer 1: no images so far"
        cache = vlm(**mixed, use_cache=True).past_key_values
    whole = vlm(**mixed, use_cache=True).past_key_values

    def size(cache):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    assert run.stats.kv_bytes_saved == size(whole) - size(cache) > 0
    lines = str(run.stats).splitlines()
    assert lines[1].startswith("layer stage, layer 3: 4 images, 60 -> 24 tokens (40.0 %), ")
    assert (
        lines[2].startswith("18.0 tokens an image, mean over decoder layers; ") and "KiB of KV cache saved" in lines[2]
    )
    assert run.stats.seconds > 0
    with attach(vlm, "uniform", keep=6) as run:
        cache = vlm(**mixed, use_cache=True).past_key_values
    assert run.stats.kv_bytes_saved == size(whole) - size(cache) > 0 and run.stats.tokens == [6.0] * 4
