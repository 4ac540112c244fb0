"""The room that policy gradient has: drawn subsets are read as each alone would be, in batches of any size."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from prunezoo.core.budgets import budget
from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import load_pruner
from prunezoo.host import attach, encode, encode_needs
from trainers.cli.names import CHECKPOINTS
from trainers.data.conversation import IGNORED, ConversationCollator
from trainers.data.suite import load_suite
from trainers.evaluation.budgets import parse_budgets
from trainers.evaluation.drawn import Ways, measure_drawn, passes
from trainers.evaluation.draws import Draws, draw_masks
from trainers.evaluation.journal import Journal
from trainers.evaluation.loading import load_vlm
from trainers.evaluation.measure import measure
from trainers.evaluation.methods import GivenScores, PrunerMethod
from trainers.upkeep import rl_room

NAME = "ppm"


@pytest.fixture(scope="module")
def embedded():
    """The embedded model, its processor, and the pruner that was distilled for it."""
    vlm, processor = load_vlm(str(CHECKPOINTS / "tiny-llava"), "cpu", "float32")
    return vlm, processor, load_pruner(CHECKPOINTS / "ppm-tiny").eval()


def measured(embedded, suite, keeps, draws, **options):
    vlm, processor, pruner = embedded
    return measure_drawn(vlm, processor, suite, NAME, pruner, parse_budgets(keeps), draws, **options)


def written_from(embedded, item, mask):
    """Whether `generate` writes the reference answer, to the end token, from one subset (1, N) that is kept alone."""
    vlm, processor, _ = embedded
    labels = ConversationCollator(processor)([item])["labels"]
    answer = labels[labels != IGNORED].tolist()
    prompt = ConversationCollator(processor, answers=False)([item])
    with attach(vlm, GivenScores(mask.float()).eval(), keep=int(mask.sum())):
        ids = vlm.generate(**prompt, max_new_tokens=len(answer), do_sample=False)
    return ids[0, prompt["input_ids"].shape[1] :].tolist() == answer


@torch.no_grad()
def test_each_draw_is_what_the_subset_alone_would_be(embedded):
    vlm, processor, pruner = embedded
    suite, draws = load_suite("scenes", "test", 8), Draws(3, temperature=2.0, seed=1)
    found = measured(embedded, suite, ["1/36"], draws, batch_size=5)
    ways, alone = Ways.of(NAME, 3), {False: [], True: []}
    for place in range(len(suite)):
        encoded = encode(vlm, ConversationCollator(processor)([suite[place]]), needs=encode_needs(pruner))
        valid = encoded.inputs.valid
        given = (pruner.score(encoded.inputs), valid, budget(1 / 36, valid.sum(1)), (0,), [place], draws)
        for by_lot, rows in alone.items():
            masks = draw_masks(*given, by_lot)
            assert set(masks.sum(-1).flatten().tolist()) == {4}
            rows.append([float(written_from(embedded, suite[place], mask)) for mask in masks])
    for by_lot, mean, best in ((False, ways.mean, ways.best), (True, ways.lot_mean, ways.lot_best)):
        expected = np.array(alone[by_lot])
        assert 0 < expected.mean() < expected.max(1).mean(), "the comparison would prove little"
        np.testing.assert_allclose(found.scores[mean, "1/36"].correct, expected.mean(1))
        np.testing.assert_array_equal(found.scores[best, "1/36"].correct, expected.max(1))
    # beside them is what `trainers.evaluate` measures
    plain = measure(vlm, processor, suite, [PrunerMethod(NAME, [pruner])], parse_budgets(["1/36"]))
    for key, scores in plain.scores.items():
        for field, values in vars(scores).items():
            np.testing.assert_allclose(vars(found.scores[key])[field], values, atol=1e-5, err_msg=f"{key} {field}")


def test_figures_are_the_same_in_batches_of_any_size_and_the_best_is_no_worse_than_the_mean(embedded):
    suite, told = load_suite("scenes", "test", 12), []
    four, eight = (
        measured(embedded, suite, ["1/72", "1/36"], Draws(2), batch_size=size, advance=told.append) for size in (4, 8)
    )
    assert sum(told) == 2 * len(suite) * passes(parse_budgets(["1/72", "1/36"]), Draws(2))
    for key, scores in four.scores.items():
        for field, values in vars(scores).items():
            np.testing.assert_allclose(vars(eight.scores[key])[field], values, atol=1e-5, err_msg=f"{key} {field}")
    ways = Ways.of(NAME, 2)
    for mean, best in ((ways.mean, ways.best), (ways.lot_mean, ways.lot_best)):
        for keep, tokens in (("1/72", 2), ("1/36", 4)):
            low, high = four.scores[mean, keep], four.scores[best, keep]
            assert (high.correct >= low.correct).all() and (high.agreement >= low.agreement).all()
            assert (high.kl < low.kl).any() and (high.kl <= low.kl).all()
            assert set(low.tokens) == set(high.tokens) == {tokens}
    other = measured(embedded, suite, ["1/72"], Draws(2, seed=1))
    assert (other.scores[ways.mean, "1/72"].kl != four.scores[ways.mean, "1/72"].kl).all()


def test_who_keeps_all_is_the_full_model(embedded):
    found = measured(embedded, load_suite("scenes", "test", 6), ["1.0"], Draws(2))
    full = found.scores["full", "1.0"]
    for way in Ways.of(NAME, 2):
        own = found.scores[way, "1.0"]
        np.testing.assert_array_equal(own.correct, full.correct)
        assert own.agreement.min() == 1 and own.kl.max() < 1e-6 and own.flops.tolist() == full.flops.tolist()


def test_written_answers_are_scored_of_every_draw(embedded):
    """By the exact rule, greedy answers are right where the teacher-forced reading says so."""
    suite, scored = (load_suite("scenes", "test", 6) for _ in range(2))
    scored.scorer = "exact"
    read, written = (measured(embedded, one, ["1/36"], Draws(2)) for one in (suite, scored))
    rates = [scores.correct.mean() for scores in read.scores.values()]
    assert len(set(rates)) > 2
    for key, scores in read.scores.items():
        np.testing.assert_array_equal(written.scores[key].correct, scores.correct)


def test_draws_are_of_the_question_and_its_scores_alone():
    scores = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(12) < torch.tensor([[12], [7]])
    few, keep = Draws(50, seed=3), torch.tensor([4, 2])
    masks = draw_masks(scores, valid, keep, (0, 1), [5, 9], few)
    assert masks.sum(-1).unique(dim=0).tolist() == [[4, 2]] and not (masks & ~valid).any()
    alone = draw_masks(
        scores[1:, :7], valid[1:, :7], keep[1:], (0,), [9], few
    )  # without padding, in a batch of its own
    assert torch.equal(alone[:, 0], masks[:, 1, :7])
    assert (masks <= draw_masks(scores, valid, keep + 1, (0, 1), [5, 9], few)).all(), "a smaller budget keeps the first"
    two = draw_masks(scores, valid, keep, (0, 0), [5], few)  # images of one question are not drawn alike
    assert torch.equal(two[:, 0], masks[:, 0]) and not torch.equal(two[:, 1], masks[:, 1])
    lot = draw_masks(scores, valid, keep, (0, 1), [5, 9], few, by_lot=True)
    assert torch.equal(lot, draw_masks(torch.zeros_like(scores), valid, keep, (0, 1), [5, 9], few, by_lot=True))
    certain = draw_masks(scores, valid, keep, (0, 1), [5, 9], Draws(4, temperature=1e-4))
    for row, count in enumerate(keep.tolist()):
        best = scores[row].masked_fill(~valid[row], -9).topk(count).indices
        assert certain[:, row, best].all()
    # first picks are as likely as a softmax of the scores says
    many = draw_masks(scores, valid, torch.ones_like(keep), (0, 1), [5, 9], Draws(4000, temperature=0.5))
    expected = (scores / 0.5).masked_fill(~valid, -torch.inf).softmax(-1)
    torch.testing.assert_close(many.float().mean(0), expected, rtol=0, atol=0.03)


class Merging(Pruner):
    """Scores tokens, and makes others of those that it keeps."""

    name = "merging"

    def score(self, inputs):
        return inputs.features.norm(dim=-1)

    def beside(self, inputs, output):
        return replace(output, features=2 * output.kept_features(inputs))


def test_tokens_that_are_no_subset_are_refused(embedded):
    suite = load_suite("scenes", "test", 1)
    with pytest.raises(PruneZooError, match=r"--pruner own: it merges tokens or makes others, .* like ppm-tiny"):
        measure_drawn(*embedded[:2], suite, "own", Merging().eval(), parse_budgets(["1/36"]), Draws(2))


WORDS = "--vlm tiny-llava --pruner ppm-tiny --keep 1/36 --draws 2 --limit 21 --device cpu"


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    whole, path = tmp_path / "whole.json", tmp_path / "room.json"
    assert rl_room.main([*WORDS.split(), "--batch-size", "7", "--json", str(whole)]) == 0
    write, done = Journal.write, []

    def stop(self, scores, groups, number):
        write(self, scores, groups, number)
        done.append(number)
        if len(done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "write", stop)
    with pytest.raises(SystemExit):
        rl_room.main([*WORDS.split(), "--batch-size", "7", "--json", str(path)])
    assert not path.exists() and (tmp_path / "room.json.partial.npz").is_file()
    assert rl_room.main([*WORDS.split(), "--batch-size", "4", "--json", str(path)]) == 0
    assert done == [7, 14, 18, 21] and not list(tmp_path.glob("*.npz"))
    one, two = (json.loads(each.read_text()) for each in (whole, path))
    one.pop("command"), two.pop("command")
    for row in (*one["rows"], *two["rows"]):  # rounding moves the last digits
        row["kl"] = round(row["kl"], 4)
    assert one == two
    assert (one["n"], one["split"], one["draws"], one["pruner"]) == (21, "test", 2, "checkpoints/ppm-tiny")
    assert {"torch", "transformers"} <= one["versions"].keys() and one["weights"].keys() == {one["pruner"]}
    by_name = {row["pruner"]: row for row in one["rows"] if row["group"] == "mean"}
    assert list(by_name) == ["full", "none", *Ways.of(one["pruner"], 2)]
    for row in by_name.values():
        assert row["accuracy_ci"][0] <= row["accuracy"] <= row["accuracy_ci"][1]
    (pair,) = (p for p in one["paired"] if (p["pruner"], p["rival"]) == ("best of 2", one["pruner"]))
    assert pair["difference"] == pytest.approx(by_name["best of 2"]["retention"] - by_name[one["pruner"]]["retention"])
    said = capsys.readouterr().out
    assert "chosen by ppm-tiny" in said and "random, best of 2" in said and f"{pair['difference']:+.1f} (" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--pruner divprune", "--pruner divprune: it does not score tokens, and subsets are drawn by the scores"),
        ("--pruner fastv", "it acts in the layer stage"),
        ("--pruner ppm-atp-tiny", "it is several pruners"),
        ("--pruner changed", "it remembers other questions"),
        ("--pruner attention@2", "--pruner attention@2: this is for a pruner as it is: take one like ppm-tiny"),
        ("--pruner ppm-tiny --draws 0", "--draws 0: at least 1"),
        ("--pruner ppm-tiny --temperature 0", "--temperature 0.0: a number above 0, as 0.4"),
        ("--pruner ppm-tiny --seed -1", "--seed -1: at least 0"),
        ("--pruner ppm-tiny --batch-size 0", "--batch-size 0: at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_what_works(words, message, capsys):
    with pytest.raises(SystemExit):
        rl_room.main([*words.split(), "--limit", "1"])
    assert message in capsys.readouterr().err
