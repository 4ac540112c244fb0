"""The share of operations that a record gives is that of what torch counts."""

import pytest
import torch
from tiny_llava import make_image

from prunezoo import build_pruner, encode
from prunezoo.core.prefill import decoder_flops
from prunezoo.host import encode_needs, full_forward, run_pruned
from trainers.benchmarking.flops import counted_flops
from trainers.evaluation.flops import flops_share


def batch_of(tiny):
    return tiny.batch(["<s> USER: <image> what color ? ASSISTANT:"], [[make_image(0)]])


@pytest.mark.parametrize("name", ["tome", "uniform", "fastv", "tome_unmerge", "energy"])
@torch.no_grad()
def test_shares_follow_what_was_read(name, deep_llava):
    vlm, batch = deep_llava.vlm, batch_of(deep_llava)
    pruner = build_pruner(name).eval()
    encoded = encode(vlm, batch, () if pruner.stage == "input" else encode_needs(pruner))
    seen = []
    blocks = vlm.model.vision_tower.encoder.layers[:2]
    parts = [part for block in blocks for part in (block.self_attn, block.mlp)]
    handles = [
        part.register_forward_hook(
            lambda m, a, out: seen.append((out if torch.is_tensor(out) else out[0]).shape[1] - 1)
        )
        for part in parts
    ]
    run = run_pruned(vlm, encoded, pruner, 9)
    for handle in handles:
        handle.remove()
    config, text = vlm.config.vision_config, vlm.config.text_config
    width, inner = config.hidden_size, config.intermediate_size
    ran = list(zip(seen[::2], seen[1::2], strict=True)) if pruner.stage in ("input", "vision") else [(36, 36)] * 2

    def work(pairs, lengths):
        tower = sum(a * (8 * width**2 + 4 * a * width) + 4 * m * width * inner for a, m in pairs)
        return tower + decoder_flops(text, lengths, lengths)

    words = encoded.mask.shape[1] - 36
    expected = work(ran, [words + int(n) for n in run.layers[0]]) / work([(36, 36)] * 2, [words + 36] * 4)
    share = flops_share(vlm, encoded, run)
    assert share.tolist() == pytest.approx([expected]) and 0 < float(share) < 1


@torch.no_grad()
def test_all_tokens_are_all_operations(deep_llava):
    vlm, batch = deep_llava.vlm, batch_of(deep_llava)
    encoded = encode(vlm, batch)
    assert flops_share(vlm, encoded, None).tolist() == [1.0]
    # And they are those that torch counts, but for the embeddings, the projector and CLS.
    _, whole = counted_flops(lambda: full_forward(vlm, encoded, logits_to_keep=1))
    length = encoded.mask.shape[1]
    assert decoder_flops(vlm.config.text_config, [length] * 4, [length] * 4) == whole
