"""`keep="auto:64"` of every scorer that is trained as a distribution: the fewest tokens that hold enough of it."""

import json
import math

import pytest
import torch
from made_inputs import ALL, build, make_inputs, take_rows
from safetensors.torch import load_file

from prunezoo import PruneZooError, attach, load_pruner
from prunezoo.core.contract import Pruner
from prunezoo.core.mass import Mass, tails
from prunezoo.core.registry import pruner_class, register_pruner
from trainers.calibrate import main
from trainers.cli.names import ROOT
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import load_suite
from trainers.evaluation.loading import load_vlm
from trainers.evaluation.methods import PrunerMethod

DISTRIBUTIONS = tuple(name for name in ALL if pruner_class(name).distribution)
COMMAND = "python -m trainers.calibrate --vlm VLM --pruner FOLDER --suite SUITE --mean"


@pytest.fixture(params=DISTRIBUTIONS)
def name(request):
    return request.param


@torch.no_grad()
def items_of(pruner, seeds=range(16)):
    items = []
    for seed in seeds:
        inputs = make_inputs(seed=seed, pad=seed % 3)
        rows = tails(pruner.score(inputs), inputs.valid)
        items += [row[: int(valid.sum())] for row, valid in zip(rows, inputs.valid, strict=True)]
    return items


@torch.no_grad()
def calibrated(name, means=(9, 3, 15)):
    """On made pictures, from a scorer with something to say."""
    pruner = build(name)
    for parameter in pruner.head.parameters():
        parameter.mul_(3)
    pruner.mass = Mass.calibrate(items_of(pruner), means)
    return pruner


def slow_count(scores, alpha):
    """The smallest k whose cumulated probability reaches alpha, in plain Python."""
    weights = sorted((math.exp(score - max(scores)) for score in scores), reverse=True)
    total, held = math.fsum(weights), 0.0
    for k, weight in enumerate(weights, start=1):
        held += weight / total
        if held >= alpha:
            return k
    return len(weights)


def test_the_known_distributions_say_so():
    assert set(DISTRIBUTIONS) >= {"ppm", "policy", "explain_cnn"}


@torch.no_grad()
def test_the_count_is_the_smallest_that_reaches_alpha(name):
    pruner, inputs = build(name), make_inputs(pad=2)
    scores = pruner.score(inputs)
    for alpha in (0.01, 0.3, 0.7123, 0.95, 0.999):
        counts = Mass({5: 1 - alpha}, 5).counts(scores, inputs.valid, None)
        slow = [slow_count(s[v].tolist(), alpha) for s, v in zip(scores.double(), inputs.valid, strict=True)]
        assert counts.tolist() == slow


@torch.no_grad()
def test_calibration_meets_the_mean_and_auto_keeps_the_counts(name):
    pruner = calibrated(name)
    inputs = [make_inputs(seed=seed, pad=seed % 3) for seed in range(16)]
    for keep, mean in (("auto", 9), ("auto:9", 9), ("auto:3", 3), ("auto:15", 15)):
        counts = torch.cat([pruner(one, keep).count for one in inputs])
        assert counts.double().mean() == mean and counts.unique().numel() > 1
    between = torch.cat([pruner(one, "auto:6").count for one in inputs]).double().mean()
    assert 4.5 < between < 7.5
    output = pruner(inputs[0], "auto")
    assert torch.equal(output.index, pruner(inputs[0], output.count).index)
    pruner.select = "mmr"
    assert torch.equal(pruner(inputs[0], "auto").count, output.count)
    single = take_rows(inputs[0], [1], 20, 4)
    assert torch.equal(pruner(single, "auto").count, output.count[1:2])


def test_uncalibrated_it_is_refused_with_the_command(name, tiny_llava):
    pruner = build(name)
    with pytest.raises(PruneZooError, match=rf"keep='auto:16': this '{name}' is not calibrated: {COMMAND} 16"):
        pruner(make_inputs(), "auto:16")
    with pytest.raises(PruneZooError, match=f"is not calibrated: {COMMAND} 64"):
        attach(tiny_llava.vlm, pruner, keep="auto")
    with pytest.raises(PruneZooError, match=f"is calibrated for means from 3 to 15: {COMMAND} 16"):
        calibrated(name).check_keep("auto:16")
    # measured beside one that sets budgets, it gets the same mean; see `PrunerMethod.amount`
    assert PrunerMethod(name, [pruner]).amount(None, "auto:16") == 16
    assert PrunerMethod(name, [calibrated(name)]).amount(None, "auto:9") == "auto:9"


def test_it_is_saved_and_read_strictly(name, tmp_path):
    pruner = calibrated(name)
    folder = pruner.save_pretrained(tmp_path / name)
    loaded = load_pruner(folder)
    assert loaded.mass == pruner.mass and loaded.sets_budgets
    assert torch.equal(loaded(make_inputs(), "auto").index, pruner(make_inputs(), "auto").index)
    whole = json.loads((folder / "config.json").read_text())
    table = whole["settings"]["auto"]["left_out"]
    for wrong, message in (
        ({"default": 9}, "'auto' must be an object of default, left_out"),
        ({"default": 4, "left_out": table}, r"'default' of setting 'auto' must be one of its means, \[3, 9, 15\]"),
        ({"default": 9, "left_out": {**table, "0": 0.5}}, "must map tokens to shares"),
        ({"default": 9, "left_out": {**table, "20": 1.0}}, "must map tokens to shares"),
        ({"default": 9, "left_out": {**table, "²": 0.0}}, "must map tokens to shares"),
        ({"default": 9, "left_out": {**table, "20": 0.9}}, "must fall as the tokens rise"),
        ({"default": 9, "left_out": {}}, "'default' of setting 'auto' must be one of its means"),
        ([], "'auto' must be an object"),
    ):
        (folder / "config.json").write_text(json.dumps({**whole, "settings": {"auto": wrong}}))
        with pytest.raises(PruneZooError, match=f"config.json: .*{message}"):
            load_pruner(folder)


def test_only_a_distribution_is_calibrated(tmp_path):
    folder = build("atp").save_pretrained(tmp_path / "atp")
    stored = json.loads((folder / "config.json").read_text())
    stored["settings"] = {"auto": {"default": 4, "left_out": {"4": 0.5}}}
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(PruneZooError, match="unknown setting 'auto' of 'atp'"):
        load_pruner(folder)
    body = {"distribution": True, "reduce": lambda self, inputs, keep: None}
    with pytest.raises(PruneZooError, match=r"must override score\(\) and not choose_budget\(\)"):
        register_pruner("no_scores")(type("NoScores", (Pruner,), body))


def test_a_mean_beyond_the_items_is_refused():
    with pytest.raises(PruneZooError, match="a mean of 26 tokens cannot be had: the items have 25"):
        Mass.calibrate(items_of(build("ppm"), range(2)), [26])


def test_the_command_calibrates_on_validation_and_what_it_writes_works(tmp_path, capsys):
    arguments = ["--vlm", f"{ROOT}/checkpoints/tiny-llava", "--suite", "scenes", "--limit", "24"]
    ppm, out = f"{ROOT}/checkpoints/ppm-tiny", tmp_path / "ppm"
    assert main([*arguments, "--pruner", ppm, "--mean", "16", "8", "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert "auto:8: 8.00 tokens in the mean over 24 images" in said and "auto:16: 16.00 tokens" in said
    pruner = load_pruner(out)
    assert pruner.mass.default == 16 and list(pruner.mass.left_out) == [8, 16]
    weights = [load_file(folder / "model.safetensors") for folder in (out, ROOT / "checkpoints/ppm-tiny")]
    assert weights[0].keys() == weights[1].keys() and all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    for wrong, message in (
        (["--pruner", f"{ROOT}/checkpoints/atp-tiny"], "'atp' is no distribution over tokens"),
        (["--pruner", f"{ROOT}/checkpoints/budget-tiny"], "'budget' is no distribution over tokens, and sets its"),
        (["--pruner", "fastervlm"], "--pruner fastervlm is no folder: name one to save it into with --output"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, *wrong, "--mean", "8"])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    vlm, processor = load_vlm(f"{ROOT}/checkpoints/tiny-llava", "cpu", "float32")
    items = load_suite("scenes", "validation", 3)
    batch = ConversationCollator(processor, answers=False)(items[0:3])
    with torch.no_grad(), attach(vlm, str(out), keep="auto:8") as run:
        vlm.generate(**batch, max_new_tokens=1)
    assert len(set(run.stats.after)) > 1 and max(run.stats.after) < 60
