"""CATP the slow way: two examples and a question, and a question alone."""

from dataclasses import replace

import pytest
import torch
from layer_oracle import Watch
from made_inputs import make_inputs, take_rows
from tiny_llava import LONG, make_image
from torch.nn import functional

from prunezoo import PruneZooError, attach, build_pruner, encode
from prunezoo.host import encode_needs, run_pruned

ICL = "<s> USER: <image> red ? ball <image> left box <image> what color ? ASSISTANT:"


def cosine(a, b):
    return float(functional.cosine_similarity(a, b, dim=0))


@pytest.fixture
def inputs():
    """Eight words: the first example's is 0 and 1, the second's 2 and 3, the question's 4 to 7."""
    grids = ((4, 5), (3, 6), (4, 4), (5, 3))
    made = make_inputs(grids=grids, pad=2)
    random = torch.Generator().manual_seed(7)
    text = torch.randn(8, made.text.shape[2], generator=random)
    behind = torch.zeros(4, 8)
    for row, start in enumerate((0, 2, 4, 0)):
        behind[row, start:] = 1
    signals = {**made.signals, "word_behind": behind}
    return replace(
        made,
        text=text.expand(4, -1, -1),
        text_valid=torch.ones(4, 8, dtype=torch.bool),
        signals=signals,
        sample=torch.tensor([0, 0, 0, 1]),
    )


def covered(tokens, text, keep, weight):
    n = len(tokens)
    alike = [[(cosine(a, b) + 1) / 2 for b in tokens] for a in tokens]
    fits = [(cosine(token, text) + 1) / 2 for token in tokens]

    def worth(chosen):
        return sum(max(alike[x][y] for y in chosen) for x in range(n)) + weight * sum(fits[y] for y in chosen)

    chosen = []
    while len(chosen) < keep:
        chosen.append(max((y for y in range(n) if y not in chosen), key=lambda y: worth([*chosen, y])))
    return sorted(chosen)


@pytest.mark.parametrize("weight", [0.1, 0.7, 30.0])
def test_coverage_of_a_picture_and_its_own_text(inputs, weight):
    output = build_pruner("catp", own_text=weight).cover(inputs, 6)
    for row, own in enumerate(((0, 1), (2, 3), (4, 5, 6, 7), range(8))):
        tokens = inputs.features[row][inputs.valid[row]]
        half = (len(tokens) + 7) // 2
        kept = covered(tokens, inputs.text[row][list(own)].mean(0), half, weight)
        assert output.index[row, :half].tolist() == kept and output.counts[row] == half


def test_examples_by_the_question_and_the_question_by_the_examples(inputs):
    pruner, tokens = build_pruner("catp").context, [f[v] for f, v in zip(inputs.features, inputs.valid, strict=True)]
    keep, words = torch.tensor([5, 7, 4, 6]), inputs.text[0]
    now, before = (inputs.signal(name) for name in ("last_attention", "last_attention@previous"))
    first = pruner(inputs, keep)
    question = torch.cat([tokens[2], words[4:]]).mean(0)
    rated = {}
    for row in (0, 1):
        for slot, token in enumerate(tokens[row]):
            grows = max(0.0, float(now[row, slot] - before[row, slot]))
            rated[row, slot] = grows + 0.6 * cosine(token, question)
    best = sorted(rated, key=lambda place: -rated[place])[:12]
    for row in (0, 1):
        kept = sorted(slot for own, slot in best if own == row)
        assert first.index[row, : len(kept)].tolist() == kept and first.counts[row] == len(kept)
    assert first.counts[2:] == (16, 15) and sum(first.counts[:2]) == 12

    second = pruner(replace(inputs.after(first), step=1), keep)
    context = torch.cat([*(tokens[row][slot][None] for row, slot in best), words[:4]]).mean(0)
    for row, likeness in ((2, context), (3, words.mean(0))):
        order = sorted(range(len(tokens[row])), key=lambda slot: -cosine(tokens[row][slot], likeness))
        assert second.index[row, : keep[row]].tolist() == sorted(order[: keep[row]])
    assert second.counts == (*first.counts[:2], 4, 6)


def test_another_prompt_in_the_batch_changes_nothing(inputs):
    pruner = build_pruner("catp").eval()
    whole = pruner(inputs, 6)
    for rows in ([2, 0, 1], [3]):
        part = replace(take_rows(inputs, rows), sample=torch.zeros(len(rows), dtype=torch.long))
        alone = pruner(part, 6)
        for place, row in enumerate(rows):
            count = int(whole.count[row])
            assert whole.index[row, :count].tolist() == alone.index[place, : int(alone.count[place])].tolist()


@torch.no_grad()
def test_in_a_model_examples_share_what_they_keep(deep_llava):
    pictures = [[make_image(0), make_image(5), make_image(6)], [make_image(1)]]
    batch = deep_llava.batch([ICL, LONG], pictures)
    pruner = build_pruner("catp").eval()
    encoded = encode(deep_llava.vlm, batch, encode_needs(pruner))
    with Watch(pruner) as watch:
        run = run_pruned(deep_llava.vlm, encoded, pruner, 8)
    entering, examples, whole, last = run.layers.T.tolist()
    assert entering == [22] * 4 and examples[2:] == [22, 22] and sum(examples[:2]) == 16
    assert whole == last == [*examples[:2], 8, 8]
    assert [inputs.layer for inputs, _ in watch.calls if inputs.layer is not None] == [1, 2]
    with attach(deep_llava.vlm, pruner, keep=8):
        torch.testing.assert_close(deep_llava.vlm(**batch).logits[:, -1], run.host.logits[:, -1], rtol=0, atol=1e-5)
    with attach(deep_llava.vlm, pruner, keep=1.0):
        logits = deep_llava.vlm(**batch).logits
    assert torch.equal(logits, deep_llava.vlm(**batch).logits)


def test_bad_fields_are_refused():
    for field, value in (("own_text", -0.1), ("question", -1.0), ("layer", 0)):
        with pytest.raises(PruneZooError, match=f"{field}="):
            build_pruner("catp", **{field: value})
