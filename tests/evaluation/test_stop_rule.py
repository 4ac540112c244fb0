"""The stop rule of tail-drop latents: choice, calibration, learning from cached losses, the curve."""

import json
import sys
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from made_inputs import make_inputs
from trainings import words

from prunezoo import AutoPruner, PruneZooError, attach, encode
from prunezoo.host.run import run_pruned
from prunezoo.learned.tail_drop import StopRule, TailDrop
from trainers import stop_rule
from trainers.caches.prefix_losses import LossWorker
from trainers.cards.parts import STOP_FILE, stop_rule_of
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import load_suite
from trainers.evaluation.loading import load_vlm
from trainers.training.stop_rule import explained, learn, load_latents, with_stops
from trainers.upkeep import stop_curve
from trainers.upkeep.stop_curve import FIXED, MIXED, RULE, points_of, record_of

ROOT = Path(__file__).parent.parent.parent
VLM = ROOT / "checkpoints" / "tiny-llava"
SIZES = {"width": 32, "hidden": 16, "heads": 2, "blocks": 1, "text_blocks": 1}
STOPS = (1, 3, 8)


def ruled(**config) -> TailDrop:
    """Latents with a rule that says something else of each prefix."""
    torch.manual_seed(0)
    pruner = TailDrop(**{**SIZES, "latents": 12, "stops": STOPS, "tolerance": 1.0, **config}).eval()
    assert pruner.stop is not None
    for weight in (pruner.queries, pruner.stop.see.weight, pruner.stop.tell.weight):
        torch.nn.init.normal_(weight)
    return pruner


# The choice


def test_the_shortest_that_is_good_enough_is_chosen():
    rule = StopRule(16, STOPS)
    losses = torch.tensor([[0.5, 0.2, 0.1], [0.1, 0.9, 0.1], [0.9, 0.8, 0.7]])
    for tolerance, chosen in ((0.05, [2, 2, 2]), (0.2, [1, 0, 2]), (0.75, [0, 0, 2]), (2.0, [0, 0, 0])):
        assert rule.choose(losses, tolerance).tolist() == chosen


def test_each_image_keeps_what_the_rule_says_of_it_alone():
    pruner, inputs = ruled(), make_inputs()
    losses = pruner.stop(pruner.known(inputs)).detach()
    pruner = ruled(tolerance=float(losses[:, 0].median()) * 1.0001)
    chosen = pruner.choose_budget(inputs, None)
    by_hand = [
        next(s for s, loss in zip(STOPS, row, strict=True) if loss <= pruner.config.tolerance or s == 8)
        for row in losses.tolist()
    ]
    assert chosen.tolist() == by_hand and len(set(by_hand)) > 1
    assert torch.equal(pruner(inputs, "auto").count, chosen)
    assert torch.equal(pruner(inputs, "auto").features, pruner(inputs, chosen).features)
    padded = make_inputs(pad=9, text_pad=3)
    assert torch.equal(pruner.choose_budget(padded, None), chosen)


def test_the_rule_reads_only_the_prefix():
    """Longer prefixes to choose among change nothing for the shorter ones, nor does an image with fewer tokens."""
    pruner, inputs = ruled(), make_inputs()
    longer = with_stops(pruner, (*STOPS, 12))
    torch.testing.assert_close(longer.known(inputs)[:, :3], pruner.known(inputs))
    with torch.no_grad():
        changed = pruner.known(inputs)
        pruner.queries[5] += 1
        assert torch.equal(pruner.known(inputs)[:, :2], changed[:, :2])
        assert not torch.allclose(pruner.known(inputs)[:, 2], changed[:, 2])
    few = make_inputs(((2, 2), (1, 1), (2, 3)))
    assert (ruled(tolerance=1e-9).choose_budget(few, None) == torch.tensor([4, 1, 6])).all()


def test_a_tolerance_is_found_for_every_mean():
    torch.manual_seed(0)
    rule, losses = StopRule(16, (1, 2, 4, 8, 16)), torch.rand(4000, 5) * torch.tensor([1.0, 0.5, 0.25, 0.1, 0.05])
    assert rule.tolerance_of(4) == pytest.approx(rule.tolerance_of(12)), "not yet calibrated"
    rule.calibrate(losses)
    for mean in (1.5, 2, 3, 6, 10):
        lengths = rule.lengths(losses, rule.tolerance_of(mean)).double()
        assert lengths.mean() == pytest.approx(mean, abs=0.15)
    accepted = [rule.tolerance_of(mean) for mean in (1, 2, 4, 8, 15, 16, 400)]
    assert accepted == sorted(accepted, reverse=True)
    pruner = ruled()
    pruner.stop.calibrate(pruner.stop(pruner.known(make_inputs())))
    lengths = [pruner.choose_budget(make_inputs(), mean).double().mean() for mean in (1, 3, 8)]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_latents_without_a_rule_set_no_budgets():
    pruner = with_stops(ruled(), ())
    assert not pruner.sets_budgets and ruled().sets_budgets
    with pytest.raises(PruneZooError, match="'tail_drop' sets none"):
        pruner(make_inputs(), "auto")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"stops": (3, 1)}, "stops"),
        ({"stops": (4, 13)}, "latents=12"),
        ({"stops": (4,)}, "two or more"),
        ({"tolerance": 0.0}, "above 0"),
    ],
)
def test_a_mistake_in_the_config_is_named(wrong, named):
    with pytest.raises(PruneZooError, match=named):
        ruled(**wrong)


# Learning


def test_the_rule_learns_the_mean_of_skewed_losses():
    torch.manual_seed(1)
    known = torch.randn(3000, 2, 16)
    mean = known[..., 0].exp()
    losses = torch.distributions.Exponential(1 / mean).sample()
    usual = losses[:2000].mean(0)
    rule = StopRule(16, (1, 2))
    learn(rule, known[:2000], losses[:2000], steps=400, lr=3e-3)
    with torch.no_grad():
        expected = rule(known[2000:])
        assert explained(expected, losses[2000:], usual) > 0.2
        assert explained(expected.flip(0), losses[2000:], usual) < 0
        assert explained(usual.expand(1000, 2), losses[2000:], usual) == pytest.approx(0, abs=1e-6)
    error = (expected.log() - known[2000:, :, 0]).abs().mean()
    assert error < 0.3, "of the logarithm of the true mean"


def test_a_rule_stays_finite_where_longer_prefixes_do_harm():
    torch.manual_seed(0)
    known = torch.randn(512, 2, 8)
    losses = torch.where(known[..., 0] > 0, 0.5, -4.0)  # known beforehand, so that it can be learned in full
    rule = StopRule(8, (1, 2))
    learn(rule, known, losses, steps=600, lr=0.05)
    expected = rule(known).detach()
    assert expected.isfinite().all()
    assert expected[losses < 0].mean() < 0.05 and expected[losses > 0].mean() == pytest.approx(0.5, abs=0.1)


def test_losses_are_those_of_reading_each_prefix():
    vlm, processor = load_vlm(str(VLM), "cpu", "float32")
    items = load_suite("scenes", "train", 6)
    torch.manual_seed(0)
    pruner = TailDrop(width=128, hidden=16, heads=2, blocks=1, text_blocks=1, latents=8, stops=STOPS).eval()
    told: list[int] = []
    compute = LossWorker(str(VLM), "float32", items, 2, None, pruner).on(vlm)
    shard = compute(range(1, 6), told.append)
    assert sum(told) == 5 and shard["item"].tolist() == [1, 2, 3, 4, 5]
    assert shard["loss"].shape == (5, 3) and shard["right"].shape == (5, 4) and shard["known"].shape == (5, 3, 16)
    encoded = encode(vlm, ConversationCollator(processor)([items[4]]))
    with torch.no_grad():
        full = run_pruned(vlm, encoded, pruner, 144).host
        short = run_pruned(vlm, encoded, pruner, 3).host
        asked = [host.labels[:, 1:] != -100 for host in (full, short)]
        log = [host.logits[:, :-1][where].log_softmax(-1) for host, where in zip((full, short), asked, strict=True)]
        kl = (log[0].exp() * (log[0] - log[1])).sum(-1).mean()
        torch.testing.assert_close(shard["loss"][3, 1], kl, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(shard["known"][3], pruner.known(encoded.inputs)[0], rtol=1e-4, atol=1e-4)
    assert shard["right"][3, 0] == (log[0].argmax(-1) == full.labels[:, 1:][asked[0]]).all()


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A folder of untrained latents that was given a rule by the command, and its words."""
    folder = tmp_path_factory.mktemp("learnt")
    torch.manual_seed(0)
    sizes = {"width": 128, "hidden": 16, "heads": 2, "blocks": 1, "text_blocks": 1, "latents": 12}
    TailDrop(**sizes).to(torch.bfloat16).save_pretrained(folder / "latents")
    words = [
        f"--config={ROOT / 'configs' / 'tail_drop_tiny.yaml'}",
        f"--model.vlm={VLM}",
        "--data.validation_items=8",
        "--data.batch_size=8",
        f"--pruner={folder / 'latents'}",
        "--stops=[1,3,8]",
        "--tolerance=0.5",
        "--train_items=16",
        "--steps=20",
        f"--cache={folder / 'losses'}",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["stop_rule"])
        stop_rule.main(words)
    return folder, words


def test_the_command_writes_a_rule_that_attaches(learnt):
    folder, _ = learnt
    pruner = AutoPruner.from_pretrained(folder / "latents")
    assert pruner.config.stops == STOPS and pruner.config.tolerance == 0.5
    assert {weight.dtype for weight in pruner.parameters()} == {torch.bfloat16}
    assert (pruner.stop.means[:-1] >= pruner.stop.means[1:]).all() and pruner.stop.means[0] > pruner.stop.means[-1]
    vlm, processor = load_vlm(str(VLM), "cpu", "float32")
    items = load_suite("scenes", "validation", 4)
    batch = ConversationCollator(processor, answers=False)(list(items))
    with attach(vlm, pruner, keep="auto") as run:
        vlm.generate(**batch, max_new_tokens=2, do_sample=False)
    encoded = encode(vlm, batch)
    expected = pruner.choose_budget(encoded.inputs.to(torch.bfloat16), None)
    assert run.stats.after == expected.tolist() and set(expected.tolist()) <= set(STOPS)


def test_losses_on_the_disk_are_read_again_unless_they_are_of_others(learnt, capsys, monkeypatch):
    folder, words = learnt
    monkeypatch.setattr(sys, "argv", ["stop_rule"])
    shards = sorted((folder / "losses").rglob("*.safetensors"))
    before = [shard.stat().st_mtime_ns for shard in shards]
    weights = (folder / "latents" / "model.safetensors").read_bytes()
    stop_rule.main(words)
    assert len(shards) == 2 and [shard.stat().st_mtime_ns for shard in shards] == before
    assert (folder / "latents" / "model.safetensors").read_bytes() == weights, "the same seed, the same rule"
    with pytest.raises(SystemExit):
        stop_rule.main([*words, "--stops=[1,2]"])
    assert "was made with stops=[1, 3, 8], wanted is [1, 2]" in capsys.readouterr().err


def test_the_recipe_for_llava_takes_a_rule(world, tiny_llava_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stop_rule"])
    TailDrop(**SIZES, latents=12).save_pretrained(tmp_path / "latents")
    given = [word for word in words(world, tiny_llava_folder, tmp_path) if word.startswith(("--data", "--model.vlm"))]
    recipe = [f"--config={ROOT / 'configs' / 'tail_drop_llava.yaml'}", f"--pruner={tmp_path / 'latents'}", *given]
    stop_rule.main([*recipe, "--stops=[1,4,12]", "--train_items=16", "--steps=5", f"--cache={tmp_path / 'losses'}"])
    assert load_latents(str(tmp_path / "latents")).config.stops == (1, 4, 12)
    for wrong, named in (
        ("--stops=[]", "two or more lengths"),
        ("--stops=[1,13]", "latents=12"),
        ("--tolerance=0", "above 0"),
    ):
        with pytest.raises(SystemExit):
            stop_rule.main([*recipe, "--stops=[1,4]", wrong])
        assert named in capsys.readouterr().err


def test_a_rule_is_for_tail_drop_only():
    with pytest.raises(PruneZooError, match="--pruner uniform: a stop rule is for 'tail_drop', this is 'uniform'"):
        load_latents("uniform")


# The curve


def test_the_rule_is_compared_at_equal_mean_length():
    """Half of the questions need 8 tokens, the others one; the rule knows which."""
    rule = StopRule(16, STOPS)
    hard = torch.arange(400) % 2 == 0
    known = torch.zeros(400, 3, 16)
    known[:, :, 0] = torch.where(hard[:, None], torch.tensor([3.0, 3.0, -3.0]), -3.0)
    with torch.no_grad():
        rule.see.weight.copy_(torch.eye(16))
        rule.see.bias.zero_()
        rule.tell.weight.zero_()[0, 0] = 1
        rule.tell.bias.fill_(-1.0)
    loss = torch.where(hard[:, None], torch.tensor([2.0, 2.0, 0.0]), 0.0)
    right = torch.cat([torch.ones(400, 1, dtype=torch.bool), loss == 0], dim=1)
    rule.calibrate(rule(known))
    points = points_of(rule, 1.0, {"known": known, "loss": loss, "right": right}, [2])
    assert [point.kind for point in points] == [FIXED] * 3 + [RULE, MIXED] * 2
    auto, mixed = points[3:5]
    assert set(auto.lengths[hard.numpy()]) == {8.0} and set(auto.lengths[~hard.numpy()]) == {1.0}
    assert auto.lengths.mean() == mixed.lengths.mean() == 4.5 and auto.right.all()
    assert mixed.right.mean() == pytest.approx(0.7 * 0.5 + 0.3 * 1.0), "0.7 of 3 tokens and 0.3 of 8 are 4.5"
    record = record_of(points, np.ones(400), np.arange(400) % 4 // 2, ("a", "b"))
    pair = record["paired"][0]
    assert pair["keep"] == "auto" and pair["difference"] == pytest.approx(35) and pair["ci"][0] > 28
    assert [row["retention"] for row in record["rows"][:3]] == [50, 50, 100]


def test_the_curve_is_measured_by_a_command(learnt, tmp_path, capsys):
    folder, _ = learnt
    words = ["--vlm", str(VLM), "--pruner", str(folder / "latents"), "--suite", "scenes", "--split", "validation"]
    words += ["--limit", "14", "--mean", "2", "--cache", str(tmp_path / "read")]
    stop_curve.main([*words, "--json", str(tmp_path / "c.json"), "--figure", str(tmp_path / "c.png")])
    record = json.loads((tmp_path / "c.json").read_text())
    assert [row["keep"] for row in record["rows"]] == ["1", "3", "8", "auto", "auto", "auto:2", "auto:2"]
    assert record["n"] == 14 and len(record["paired"]) == 2 and (tmp_path / "c.png").stat().st_size > 5000
    assert "stop rule" in capsys.readouterr().out
    card_of = copytree(folder / "latents", tmp_path / "with a card")
    (card_of / STOP_FILE).write_text((tmp_path / "c.json").read_text())
    shown = stop_rule_of(card_of)
    assert [line["keep"] for line in shown["lines"]] == ["auto", "auto:2"]
    assert shown["lines"][0]["retention"].startswith(f"{record['rows'][3]['retention']:.1f} (")
    with_stops(load_latents(str(card_of)), ()).save_pretrained(card_of)
    assert stop_rule_of(card_of) is None, "of other weights"
    with_stops(load_latents(str(folder / "latents")), ()).save_pretrained(tmp_path / "none")
    with pytest.raises(SystemExit):
        stop_curve.main(["--vlm", str(VLM), "--pruner", str(tmp_path / "none"), "--suite", "scenes"])
    assert "it has no stop rule; train one with trainers.stop_rule" in capsys.readouterr().err
