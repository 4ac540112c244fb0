"""One pruner for several frozen models: turns, teachers, stopping and going on, and what is refused."""

import csv
import json
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from trainings import checkpoints, one_line_error

from prunezoo import AutoPruner, attach, encode, full_forward
from prunezoo.learned.ppm import PPM
from trainers import fit, slim
from trainers.data.in_turn import SUITE, InTurn, SuitesInTurn
from trainers.data.loading import ResumableLoader
from trainers.data.modules import GROUPS, IDS, SuiteDataModule
from trainers.evaluation.loading import load_vlm
from trainers.training import distill
from trainers.training.losses import answer_slots
from trainers.training.several import SeveralModule

ROOT = Path(__file__).parent.parent.parent
VLMS = {"scenes": str(ROOT / "checkpoints" / "tiny-llava"), "pages": str(ROOT / "checkpoints" / "small-llava")}
OPTIONS = {"batch_size": 2, "workers": 0, "validation_items": 8, "train_items": 6, "seed": 1}
STEPS = 9  # both suites begin anew after their third batch


@pytest.fixture(autouse=True)
def no_words(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fit"])


def words(out, *extra):
    return [
        f"--config={ROOT / 'configs' / 'ppm_both.yaml'}",
        f"--model.vlm={json.dumps(VLMS)}",
        "--model.pruner.config.hidden=16",
        "--model.pruner.config.heads=2",
        "--model.guide_share=0.5",
        *(f"--data.{key}={OPTIONS[key]}" for key in ("batch_size", "validation_items", "train_items")),
        f"--trainer.max_steps={STEPS}",
        f"--trainer.val_check_interval={STEPS}",
        "--trainer.precision=32-true",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=1",
        "--checkpoint.every_n_train_steps=1",
        f"--out={out}",
        *extra,
    ]


def weights(out):
    return torch.load(checkpoints(out) / "last.ckpt", weights_only=False)["state_dict"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The unbroken run."""
    out, patch = tmp_path_factory.mktemp("straight") / "both", pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["fit"])
    fit.main(words(out))
    patch.undo()
    return out


@pytest.fixture(scope="module")
def data():
    module = SuitesInTurn(VLMS, list(VLMS), **OPTIONS)
    module.setup()
    return module


def loader(first, count):
    """Batches of one number."""
    return ResumableLoader(range(first, first + count), 1, lambda numbers: numbers[0], seed=first)


def test_turns_go_on_from_anywhere_and_no_number_comes_twice_in_an_epoch():
    def turns():
        return InTurn([loader(0, 5), loader(100, 3)])

    whole, unbroken = turns(), []
    for _ in range(3):
        unbroken += list(whole)
    assert len(whole) == 10 and len(unbroken) == 30
    assert [number >= 100 for number in unbroken] == [False, True] * 15
    assert [sorted(unbroken[start : start + 10 : 2]) for start in (0, 10, 20)] == [list(range(5))] * 3
    assert [sorted(unbroken[start : start + 6 : 2]) for start in range(1, 30, 6)] == [[100, 101, 102]] * 5
    assert unbroken[0:10:2] != unbroken[10:20:2]
    for place in range(21):
        resumed = turns()
        resumed.load_state_dict({"given": place})
        assert list(resumed) == unbroken[place : place + 10]
        assert resumed.state_dict() == {"given": place + 10}


def test_each_batch_is_its_own_suites_and_says_so(data):
    given = list(islice(data.train_dataloader(), 6))
    assert [batch[SUITE] for batch in given] == ["scenes", "pages"] * 3
    for place, (suite, vlm) in enumerate(VLMS.items()):
        alone = SuiteDataModule(vlm, suite, **OPTIONS)
        alone.setup()
        for ours, theirs in zip(given[place::2], alone.train_dataloader(), strict=True):
            assert ours[IDS] == theirs[IDS] and torch.equal(ours["pixel_values"], theirs["pixel_values"])
            assert torch.equal(ours["input_ids"], theirs["input_ids"])
    loaders = data.val_dataloader()
    assert [{batch[SUITE] for batch in each} for each in loaders] == [{"scenes"}, {"pages"}]
    assert data.on_after_batch_transfer({**given[1]}, 0).keys() == given[1].keys() - {IDS}
    assert data.batch_ids == given[1][IDS]


def test_each_batch_is_distilled_from_its_own_model(tmp_path, monkeypatch, data):
    """Of its guide's pass as of its answers."""
    asked, compare = [], distill.distillation_kl
    monkeypatch.setattr(
        distill, "distillation_kl", lambda student, teacher: asked.append(teacher) or compare(student, teacher)
    )
    ends = ("--model.guide_share=0", "--trainer.max_steps=2", "--trainer.limit_val_batches=0")
    for weight in (0, 1):
        fit.main(words(tmp_path / str(weight), *ends, f"--model.guide_weight={weight}"))
    assert len(asked) == 4
    for place, batch in enumerate(islice(data.train_dataloader(), 2)):
        vlm, _ = load_vlm(VLMS[batch[SUITE]], "cpu", "float32")
        inputs = {name: value for name, value in batch.items() if name not in (SUITE, IDS, GROUPS)}
        with torch.no_grad():
            full = full_forward(vlm, encode(vlm, inputs))
        expected = answer_slots(full.logits, full.labels)[0]
        for teacher in asked[place::2]:
            torch.testing.assert_close(teacher.detach(), expected, rtol=1e-3, atol=1e-3)
    assert {teacher.shape[1] for teacher in asked} == {82, 92}  # their vocabularies: no model was asked for the other


def test_a_stopped_run_goes_on_as_if_it_had_not_been(straight, tmp_path):
    """In the middle of a turn, and of both epochs."""
    out = tmp_path / "both"
    with pytest.raises(SystemExit):
        fit.main(words(out, "--trainer.callbacks+=spies.StopAt", "--trainer.callbacks.step=5"))
    assert torch.load(checkpoints(out) / "last.ckpt", weights_only=False)["global_step"] == 5
    fit.main(words(out, "--ckpt_path=last"))
    ours, theirs = weights(out), weights(straight)
    assert {name.split(".")[0] for name in theirs} == {"pruner"}
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_what_was_trained_is_a_ppm_for_each_model(straight, data):
    pruner = AutoPruner.from_pretrained(straight)
    assert type(pruner) is PPM and pruner.base_model.name == "tiny-llava and small-llava"
    for suite, batch in zip(VLMS, islice(data.train_dataloader(), 2), strict=True):
        vlm, _ = load_vlm(VLMS[suite], "cpu", "float32")
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        with attach(vlm, pruner, keep=9):
            logits = vlm(**inputs).logits
        assert logits.shape[1] == inputs["input_ids"].shape[1] - vlm.config.image_seq_length + 9


def test_validation_tells_the_suites_apart_and_the_record_lists_the_models(straight):
    with (straight / "training" / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = {name: float(value) for name, value in rows[-1].items() if value}
    for suite, group in (("scenes", "reading"), ("pages", "field")):
        assert last[f"{suite}/val/full"] > 0.6 and f"{suite}/val/{group}_0.111" in last
        assert {f"{suite}/val/retention_{share}" for share in ("0.111", "0.056")} < last.keys()
    for name in ("score", "kl"):
        both = [last[f"{suite}/val/{name}"] for suite in VLMS]
        assert last[f"val/{name}"] == pytest.approx(sum(both) / 2) and both[0] != both[1]
    assert "scenes/train/guide" in rows[0] and "pages/train/kl" in rows[0]
    run = json.loads((straight / "run.json").read_text())
    assert run["vlm"] == VLMS and run["data"] == "SuitesInTurn(scenes, pages)" and run["steps"] == STEPS


def test_each_model_has_its_guide_and_free_text_of_one_chooses_by_kl():
    pruner = PPM(width=128, hidden=16, heads=2, blocks=1, text_blocks=1)
    module = SeveralModule(VLMS, pruner, guide={"pages": "lrp", "scenes": "relevance"}, vlm_dtype="float32")
    assert [part.guide for part in module.parts.values()] == ["relevance", "lrp"]
    assert all(part.pruner is module.pruner for part in module.parts.values())
    assert len(list(module.parameters())) == len(list(pruner.parameters()))  # the frozen models are no part of it
    assert module.best_by == ("val/score", "max")
    module.parts["pages"].free_text = True
    assert module.best_by == ("val/kl", "min")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--data.suites=[]", "data.suites is empty"),
        ("--data.suites=[scenes,pages,scenes]", "data.suites names 'scenes' twice"),
        ("--data.suites=[scenes,pages,several]", "model.vlm names no model for suite 'several'"),
        ("--data.suites=[scenes]", "model.vlm names a model for suite 'pages', which is not in data.suites"),
        ("--model.vlm={}", "model.vlm is empty"),
        ("--model.guide={scenes: lrp}", "model.guide is for scenes, and model.vlm for scenes, pages"),
        ("--model.lrr=1", "did you mean 'lr'?"),
        ("--data.batchsize=2", "did you mean 'batch_size'?"),
    ],
)
def test_what_does_not_go_together_is_refused(wrong, said, tmp_path, capsys, monkeypatch):
    assert said in one_line_error(capsys, monkeypatch, words(tmp_path, wrong))


def test_models_of_other_widths_are_refused_with_both_names(tiny_llava_folder, tmp_path, capsys, monkeypatch):
    other = json.dumps({**VLMS, "pages": str(tiny_llava_folder)})
    said = one_line_error(capsys, monkeypatch, words(tmp_path, f"--model.vlm={other}"))
    assert "width 128 and 32" in said and f"tiny-llava and {tiny_llava_folder.name} are not built alike" in said


def test_a_key_that_stands_twice_is_refused(tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model:\n  init_args:\n    vlm:\n      scenes: a\n      scenes: b\n")
    said = one_line_error(capsys, monkeypatch, [f"--config={recipe}", f"--out={tmp_path / 'out'}"])
    assert "'scenes' stands twice in one place" in said


def test_slimming_that_reads_batches_of_one_model_says_so(straight, tmp_path, capsys, monkeypatch):
    arguments = words(tmp_path / "out", f"--pruner={straight}", "--method=lrp")
    assert "take a recipe that has one" in one_line_error(capsys, monkeypatch, arguments, slim.main)
