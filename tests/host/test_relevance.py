"""Relevance maps: the rollout against its definition, and the map against one made item by item, token by token."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, Sample, tiny_family
from tiny_llava import make_image

from prunezoo import Pruner, attach, pruned_forward
from prunezoo.host import encode
from prunezoo.host.signals.relevance import eager_attention, relevance_map, roll_on

PROMPTS = (
    "<s> USER: <image> what color is the ball ? ASSISTANT: red </s>",
    "<s> USER: <image> is the box left ? ASSISTANT: 1 2 3 </s>",
    "<s> USER: <image> what ? ASSISTANT: no </s>",
)
ANSWERS = (2, 4, 2)  # labelled tokens at the end of each


def labelled(tiny, rows=(0, 1, 2), side="right"):
    """A padded batch with labels on the answers."""
    batch = tiny.batch([PROMPTS[r] for r in rows], [[make_image(r)] for r in rows], padding_side=side)
    labels = torch.full_like(batch["input_ids"], -100)
    for row, which in enumerate(rows):
        real = batch["attention_mask"][row].nonzero()[-ANSWERS[which] :, 0]
        labels[row, real] = batch["input_ids"][row, real]
    return {**batch, "labels": labels}


def by_definition(vlm, batch, row, places, tokens):
    """The map of one row over all columns: whole matrices R, one graph, one token after the other."""
    words = vlm.get_input_embeddings().weight.requires_grad_()  # so that there is a graph
    with eager_attention(vlm):
        out = vlm(**{name: value for name, value in batch.items() if name != "labels"}, output_attentions=True)
    maps = []
    for place, token in zip(places, tokens, strict=True):
        probability = out.logits[row, place].softmax(-1)[token]
        odds = (probability / (1 - probability)).log()
        gradients = torch.autograd.grad(odds, out.attentions, retain_graph=True)
        relevance = torch.eye(batch["input_ids"].shape[1])
        for weights, gradient in zip(out.attentions, gradients, strict=True):
            relevance = relevance + (weights[row] * gradient[row]).clamp(min=0).mean(0) @ relevance
        maps.append(relevance[place])
    words.requires_grad_(False)
    return torch.stack(maps).mean(0).detach()


def test_two_layers_by_hand():
    """Token 2 reads token 1 in the last layer, which has read token 0 in the first: token 0 matters by the product."""
    first, last, ones = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3)
    first[0, 0, 1, 0], last[0, :, 2, 1], last[0, 1, 2, 0] = 0.5, 0.8, 0.4
    hurts = ones.clone()
    hurts[0, 1, 2, 0] = -1.0  # what speaks against the answer counts nothing
    row = roll_on(roll_on(torch.tensor([[0.0, 0.0, 1.0]]), last, hurts), first, ones)
    torch.testing.assert_close(row, torch.tensor([[0.8 * 0.5 / 2, 0.8, 1.0]]))


def test_a_row_is_handed_through_as_whole_matrices_would():
    random = torch.Generator().manual_seed(0)
    attentions = [torch.rand(2, 3, 7, 7, generator=random).tril() for _ in range(4)]
    gradients = [torch.randn(2, 3, 7, 7, generator=random) for _ in range(4)]
    whole = torch.eye(7).expand(2, 7, 7)
    for weights, gradient in zip(attentions, gradients, strict=True):
        whole = whole + (weights * gradient).clamp(min=0).mean(1) @ whole
    start = torch.zeros(2, 7)
    start[0, 5] = start[1, 6] = 1.0
    row = start
    for weights, gradient in zip(reversed(attentions), reversed(gradients), strict=True):
        row = roll_on(row, weights, gradient)
    assert (row - start).abs().max() > 0.1
    torch.testing.assert_close(row, torch.stack([whole[0, 5], whole[1, 6]]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_the_definition(side, tiny_llava):
    """Answers of unlike length, each alone and unpadded: each averages over its own tokens."""
    vlm, maps = tiny_llava.vlm, {}
    for limit in (None, 1):
        maps[limit] = relevance_map(vlm, encode(vlm, labelled(tiny_llava, side=side)), limit)
        assert maps[limit].shape == (3, 36) and (maps[limit] >= 0).all()
    for row in range(3):
        single = labelled(tiny_llava, (row,))
        end, ids = single["input_ids"].shape[1], single["input_ids"][0]
        asked = list(range(end - ANSWERS[row], end))
        for limit in (None, 1):
            expected = by_definition(vlm, single, 0, [place - 1 for place in asked[:limit]], ids[asked[:limit]])
            expected = expected[ids == vlm.config.image_token_id]
            assert expected.max() > 1e-3
            torch.testing.assert_close(maps[limit][row], expected, rtol=1e-3, atol=1e-6)
    assert (maps[None] - maps[1]).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_the_definition(name, side):
    """Without labels, so the answer is the model's own best next token; pictures of unlike size, padded."""
    family = tiny_family(name)
    vlm, batch = family.vlm, family.batch([Sample(((48, 40),), 5), Sample(((24, 48),), 3)], side=side)
    encoded = encode(vlm, batch)
    ours, valid = relevance_map(vlm, encoded), encoded.inputs.valid
    assert (ours[valid] > 0).all() and not ours[~valid].any()
    logits = vlm(**batch).logits
    for row in range(2):
        last = int(batch["attention_mask"][row].nonzero().max())
        whole = by_definition(vlm, batch, row, [last], [logits[row, last].argmax()])
        expected = whole[encoded.slots[row, valid[row]]]
        torch.testing.assert_close(ours[row, valid[row]], expected, rtol=1e-3, atol=1e-6)


def test_the_map_is_the_same_in_inference_mode_and_leaves_the_model_as_it_was(tiny_llava):
    vlm, batch = tiny_llava.vlm, labelled(tiny_llava)
    vlm.set_attn_implementation({"text_config": "sdpa"})
    before = vlm(**batch).logits
    expected = relevance_map(vlm, encode(vlm, batch))
    with torch.inference_mode():
        ours = relevance_map(vlm, encode(vlm, batch))
    assert torch.equal(ours, expected) and not ours.requires_grad
    assert vlm.config.get_text_config()._attn_implementation == "sdpa"
    assert torch.equal(vlm(**batch).logits, before)
    assert all(p.grad is None and not p.requires_grad for p in vlm.parameters())


def test_eager_attention_is_given_back_after_an_error(tiny_llava):
    vlm, encoded = tiny_llava.vlm, encode(tiny_llava.vlm, labelled(tiny_llava))
    broken = replace(encoded, inputs=replace(encoded.inputs, features=encoded.inputs.features[..., :5]))
    with pytest.raises((RuntimeError, ValueError)):
        relevance_map(vlm, broken)
    assert vlm.config.get_text_config()._attn_implementation == "sdpa"
    with eager_attention(vlm):
        assert vlm.config.get_text_config()._attn_implementation == "eager"


def test_a_batch_of_text_and_a_sample_without_an_answer_have_no_relevance(tiny_llava):
    vlm = tiny_llava.vlm
    text = tiny_llava.batch(["<s> USER: what ? ASSISTANT:"], [[]])
    assert relevance_map(vlm, encode(vlm, text)).shape == (0, 0)
    batch = labelled(tiny_llava, (0, 1))
    batch["labels"][1] = -100
    ours = relevance_map(vlm, encode(vlm, batch))
    assert ours[0].max() > 0 and not ours[1].any()


class ByRelevance(Pruner):
    """Keeps what the model's own best next token rests on."""

    name = "by-relevance"
    needs = ("relevance",)

    def score(self, inputs):
        return inputs.signal("relevance")


def test_a_pruner_may_ask_for_it_while_attached(tiny_llava):
    vlm = tiny_llava.vlm
    batch = tiny_llava.batch([PROMPTS[0].partition(" red")[0]], [[make_image(0)]])
    encoded = encode(vlm, batch)
    expected = ByRelevance()(replace(encoded.inputs, signals={"relevance": relevance_map(vlm, encoded)}), 5)
    short = pruned_forward(vlm, encoded, expected).logits
    with attach(vlm, ByRelevance(), keep=5):
        torch.testing.assert_close(vlm(**batch).logits, short)
        assert vlm.generate(**batch, max_new_tokens=1, do_sample=False)[0, -1] == short[0, -1].argmax()
    assert (short[:, -1] - vlm(**batch).logits[:, -1]).abs().max() > 1e-3
