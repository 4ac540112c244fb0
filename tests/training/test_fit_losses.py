"""Losses against hand-made values, and guides against what they claim to measure."""

import pytest
import torch
from tiny_llava import make_image

from prunezoo import PruneZooError, encode, full_forward, gated_forward
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import Item
from trainers.training.distill import draw_budgets
from trainers.training.frozen import AnswerTable, judge
from trainers.training.guides import attention_guide, one_slot_each, relevance
from trainers.training.losses import answer_slots, distillation_kl, guide_kl, guide_mse, topk_hinge

ALL = torch.ones(2, 4, dtype=torch.bool)


@pytest.fixture(scope="module")
def encoded(tiny_llava):
    turns = [(("what color is the ball ?", "red"),), (("is it left ?", "no"), ("what is right ?", "1 2"))]
    items = [Item(id="x", image=make_image(n), turns=t, group="all") for n, t in enumerate(turns)]
    return encode(tiny_llava.vlm, ConversationCollator(tiny_llava.processor)(items))


def test_answer_slots_are_the_places_before_labelled_tokens():
    logits = torch.arange(2 * 4 * 3).reshape(2, 4, 3).float()
    labels = torch.tensor([[-100, -100, 1, 2], [-100, 0, -100, -100]])
    values, tokens, sample = answer_slots(logits, labels)
    assert torch.equal(values, torch.stack([logits[0, 1], logits[0, 2], logits[1, 0]]))
    assert tokens.tolist() == [1, 2, 0] and sample.tolist() == [0, 0, 1]
    with pytest.raises(PruneZooError, match="labels"):
        answer_slots(logits, None)


def test_distillation_is_zero_at_the_teacher_and_teaches_only_the_student():
    teacher, student = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    assert distillation_kl(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    p, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(distillation_kl(student, teacher), (p * (p / q).log()).sum(-1).mean())
    distillation_kl(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("loss", [guide_mse, guide_kl])
def test_guides_prefer_their_own_order_and_ignore_padding(loss):
    guide = torch.tensor([[0.1, 0.7, 0.2, 0.0], [4.0, 1.0, 2.0, 3.0]])
    scores = guide.clamp_min(1e-3).log()
    right = loss(scores, guide, ALL)
    assert right < loss(scores.flip(1), guide, ALL)
    valid = torch.cat([ALL, torch.zeros(2, 2, dtype=torch.bool)], 1)
    filler = torch.tensor([[9.0, -9.0], [5.0, 1.0]])
    torch.testing.assert_close(loss(torch.cat([scores, filler], 1), torch.cat([guide, filler], 1), valid), right)


def test_guide_kl_by_hand():
    guide, scores = torch.tensor([[3.0, 1.0, 0.2, 0.1]]), torch.tensor([[1.0, 0.0, 0.5, -1.0]])
    target = torch.tensor([[0.75, 0.25, 0.0, 0.0]])  # the lower half is cut, the rest divided by its sum
    by_hand = torch.xlogy(target, target).sum() - (target * scores.log_softmax(-1)).sum()
    torch.testing.assert_close(guide_kl(scores, guide, ALL[:1]), by_hand)
    assert guide_kl(scores, torch.zeros(1, 4), ALL[:1]) == 0


def test_hinge_asks_for_the_guides_best_and_no_more():
    guide = torch.tensor([[5.0, 1.0, 3.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    keep = torch.tensor([2, 2])
    apart = torch.tensor([[9.0, 0.0, 8.0, 1.0], [0.0, 1.0, 2.0, 3.0]])
    assert topk_hinge(apart, guide, ALL, keep) == 0, "any order within the best, and any among equals"
    scores = torch.zeros(2, 4, requires_grad=True)
    topk_hinge(scores, guide, ALL, keep).backward()
    assert (scores.grad[0] < 0).tolist() == [True, False, True, False] and scores.grad[1].eq(0).all()


def test_relevance_is_what_dimming_a_token_costs(tiny_llava, encoded):
    """First order: a gate lowered by h changes the log-odds at the slot drawn by h times its token's relevance."""
    torch.manual_seed(3)
    found, logits = relevance(tiny_llava.vlm, encoded)
    torch.testing.assert_close(logits, answer_slots(full_forward(tiny_llava.vlm, encoded).logits, encoded.labels)[0])
    _, tokens, sample = answer_slots(full_forward(tiny_llava.vlm, encoded).logits, encoded.labels)
    torch.manual_seed(3)
    chosen = one_slot_each(sample)
    assert sample[chosen].tolist() == [0, 1]

    def odds(gates):
        values = answer_slots(gated_forward(tiny_llava.vlm, encoded, gates).logits, encoded.labels)[0][chosen]
        p = values.double().softmax(-1).gather(1, tokens[chosen, None])[:, 0]
        return (p / (1 - p)).log()

    step = 0.02
    for slot in (0, 7, 20):
        low, high = torch.ones(2, 36), torch.ones(2, 36)
        low[:, slot], high[:, slot] = 1 - step, 1 + step
        slope = (odds(high) - odds(low)) / (2 * step)
        torch.testing.assert_close(found[:, slot].double(), slope.abs(), rtol=2e-2, atol=1e-4)


def test_every_answer_slot_is_drawn_alike():
    torch.manual_seed(0)
    sample = torch.tensor([0, 1, 1, 1, 2, 2])
    drawn = torch.stack([one_slot_each(sample) for _ in range(600)])
    assert torch.equal(sample[drawn], torch.tensor([0, 1, 2]).expand(600, 3))
    assert drawn[:, 1].bincount(minlength=4)[1:].min() > 150 and drawn[:, 2].bincount(minlength=6)[4:].min() > 240


def test_attention_guide_equals_the_models_own_attention(tiny_llava, encoded):
    guide, logits = attention_guide(tiny_llava.vlm, encoded, layers=[1])
    tiny_llava.vlm.set_attn_implementation({"text_config": "eager"})
    out = full_forward(tiny_llava.vlm, encoded, output_attentions=True)
    maps = out.attentions[1]
    tiny_llava.vlm.set_attn_implementation({"text_config": "sdpa"})
    torch.testing.assert_close(logits, answer_slots(out.logits, encoded.labels)[0], rtol=1e-4, atol=1e-4)
    for row in range(2):
        words = encoded.mask[row] & (encoded.labels[row] == -100)
        words[: encoded.slots[row].max() + 1] = False
        expected = maps[row].mean(0)[words].mean(0)[encoded.slots[row]]
        torch.testing.assert_close(guide[row], expected, rtol=1e-4, atol=1e-6)
    both = [attention_guide(tiny_llava.vlm, encoded, layers=[layer])[0] for layer in (0, 1)]
    torch.testing.assert_close(attention_guide(tiny_llava.vlm, encoded, None)[0], (both[0] + both[1]) / 2)
    whole = attention_guide(tiny_llava.vlm, encoded, [1], rows="all")[0]
    behind = [encoded.mask[row] & (torch.arange(len(maps[row][0])) > encoded.slots[row].max()) for row in range(2)]
    for row in range(2):
        expected = maps[row].mean(0)[behind[row]].mean(0)[encoded.slots[row]]
        torch.testing.assert_close(whole[row], expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(PruneZooError, match="guide_layer=7"):
        attention_guide(tiny_llava.vlm, encoded, layers=[7])


def test_an_answer_counts_only_if_every_token_of_it_is_right():
    tokens, sample = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1])
    teacher = torch.eye(3) * 9
    student = teacher[[0, 2, 2]]
    judged = judge(student, teacher, tokens, sample, 2)
    assert judged[:, 0].tolist() == [0, 1] and judged[:, 1].tolist() == [0, 1]
    assert judged[0, 2] > 1 and judged[1, 2] == 0
    table = AnswerTable(groups=2, rows=1)
    table.update(torch.tensor([1, 1]), judged[:, None])
    assert table.compute()[:, 0, 0].isnan().tolist() == [True, False] and table.compute()[1, 0, 0] == 0.5


def test_budgets_lie_between_the_shares():
    available = torch.tensor([576] * 500 + [10] * 500)
    keep = draw_budgets(available, 0.05, 0.5)
    assert keep[:500].min() >= 28 and keep[:500].max() <= 288 and keep[:500].float().std() > 20
    assert keep[500:].min() >= 1 and keep[500:].max() <= 5
