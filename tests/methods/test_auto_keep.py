"""`keep="auto"`: the pruner says how many tokens each image keeps, wherever a budget can be given."""

import pytest
import torch
from tiny_llava import make_image

from prunezoo import PruneZooError, attach, build_pruner, encode
from prunezoo.core.budgets import budget
from prunezoo.core.contract import Pruner
from prunezoo.host import run_pruned
from trainers.cli.names import CHECKPOINTS, find_pruner
from trainers.evaluation.budgets import Budget, parse_budget
from trainers.evaluation.methods import PrunerMethod, build_method
from trainers.evaluation.tables import display_name

PROMPTS = ["<s> USER: <image> what ? ASSISTANT:", "<s> USER: <image> what color is the ball ? ASSISTANT:"]


class WordBudget(Pruner):
    """Keeps the tokens of largest norm, one for each word of the prompt, or as many more as make a mean."""

    name = "word_budget"

    def score(self, inputs):
        return inputs.features.norm(dim=-1)

    def choose_budget(self, inputs, mean):
        words = inputs.text_valid.sum(1)
        return words if mean is None else (words + mean - words.float().mean()).round().long()


def test_every_image_keeps_what_the_pruner_chose_for_it(tiny_llava):
    batch = tiny_llava.batch(PROMPTS, [[make_image(0)], [make_image(1)]], padding_side="right")
    encoded = encode(tiny_llava.vlm, batch)
    words = encoded.inputs.text_valid.sum(1)
    assert words[0] < words[1]
    run = run_pruned(tiny_llava.vlm, encoded, WordBudget(), "auto")
    assert run.tokens.tolist() == words.tolist()
    by_hand = run_pruned(tiny_llava.vlm, encoded, WordBudget(), words)
    assert torch.equal(run.host.logits, by_hand.host.logits)
    assert run_pruned(tiny_llava.vlm, encoded, WordBudget(), "auto:12").tokens.mean() == 12
    with attach(tiny_llava.vlm, WordBudget(), keep="auto") as attached:
        tiny_llava.vlm.generate(**tiny_llava.batch(PROMPTS, [[make_image(0)], [make_image(1)]]), max_new_tokens=2)
    assert attached.stats.after == words.tolist()


def test_who_sets_no_budgets_says_so_at_once(tiny_llava):
    with pytest.raises(PruneZooError, match="keep='auto' is for pruners that set budgets, and 'uniform' sets none"):
        attach(tiny_llava.vlm, "uniform", keep="auto")
    with pytest.raises(PruneZooError, match="'uniform' sets none"):
        build_pruner("uniform").check_keep("auto:4")
    for wrong in ("automatic", "auto:", "auto:0", "auto:1.5", "64"):
        with pytest.raises(PruneZooError, match=f"keep='{wrong}' is none: tokens"):
            WordBudget().check_keep(wrong)
    with pytest.raises(PruneZooError, match="keep='auto' is for a pruner of the input or prompt stage"):
        budget("auto", torch.tensor([4]))


def test_an_evaluation_gives_the_others_the_same_mean():
    assert parse_budget(" auto:16 ") == Budget("auto:16", "auto:16")
    chooser, fixed = PrunerMethod("chooser", [WordBudget()]), PrunerMethod("fixed", [build_pruner("uniform")])
    assert chooser.amount(None, "auto:16") == "auto:16" and chooser.amount(None, "auto") == "auto"
    assert fixed.amount(None, "auto:16") == 16
    with pytest.raises(PruneZooError, match="--keep auto: 'fixed' sets no budgets; auto:64"):
        fixed.amount(None, "auto")


def test_one_that_sets_budgets_can_be_measured_beside_itself_with_the_same_number_for_all():
    folder = CHECKPOINTS / "tail-drop-tiny"
    free, fixed = build_method(str(folder)), build_method(f"fixed:{folder}")
    assert free.amount(None, "auto:16") == "auto:16" and fixed.amount(None, "auto:16") == 16
    assert fixed.amount(None, 9) == 9 and fixed.name == f"fixed:{folder}"
    assert find_pruner("fixed:tail-drop-tiny").endswith("checkpoints/tail-drop-tiny")
    assert display_name("fixed:checkpoints/tail-drop-tiny") == "fixed:tail-drop-tiny"
    with pytest.raises(PruneZooError, match=r"--keep auto: 'fixed:.*' sets no budgets; auto:64"):
        fixed.amount(None, "auto")
