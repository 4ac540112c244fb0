"""The command `trainers.slim`: every method by one command, the same result after a kill, smaller files that load."""

import json
import signal
import sys

import pytest
import torch
from spies import StopAt
from trainings import one_line_error, short

from prunezoo import load_pruner
from prunezoo.learned.ppm import PPM
from trainers import fit, slim
from trainers.slimming.note import read_note
from trainers.slimming.weights import zeros_of


@pytest.fixture(autouse=True)
def no_words(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["slim"])


@pytest.fixture(scope="module")
def start(world, tiny_llava_folder, tmp_path_factory):
    """A trained pruner."""
    out = tmp_path_factory.mktemp("start") / "out"
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["fit"])
    fit.main(short(world, tiny_llava_folder, out))
    patch.undo()
    return out


@pytest.fixture
def words(world, tiny_llava_folder):
    def of(out, method, *extra):
        return [*short(world, tiny_llava_folder, out), f"--method={method}", *extra]

    return of


def state(out):
    return load_pruner(out).state_dict()


def equal(one, other):
    one, other = state(one), state(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def die_at(monkeypatch, step, training=1):
    """The command is told to end at a step of one of its trainings."""
    train, count = slim.train, iter(range(1, 100))

    def dying(trainer, *args, **data):
        if next(count) == training:
            trainer.callbacks.insert(0, StopAt(step))
        train(trainer, *args, **data)

    monkeypatch.setattr(slim, "train", dying)


def test_the_smallest_weights_become_zero(words, start, tmp_path, capsys):
    slim.main(words(tmp_path / "small", "magnitude", f"--pruner={start}", "--sparsity=0.5"))
    note, small = read_note(tmp_path / "small"), load_pruner(tmp_path / "small")
    zeros, count = zeros_of(small)
    assert zeros / count == pytest.approx(0.5, abs=1e-3) and note["zeros"] == pytest.approx(zeros / count, abs=1e-6)
    assert note["speed"].startswith("no speed-up") and "no speed-up" in capsys.readouterr().out
    record = json.loads((tmp_path / "small" / "run.json").read_text())
    assert record["slimmed"] == note and record["steps"] == 4
    before = state(start)
    assert all(torch.equal(w[w != 0], before[name][w != 0]) for name, w in small.state_dict().items())
    slim.main(words(tmp_path / "small", "magnitude", f"--pruner={start}", "--sparsity=0.5"))
    assert "is finished" in capsys.readouterr().out


def test_zeros_stay_zero_while_it_is_trained_on(words, start, tmp_path):
    slim.main(words(tmp_path / "small", "magnitude", f"--pruner={start}", "--sparsity=0.5", "--tune=2"))
    zeros, count = zeros_of(load_pruner(tmp_path / "small"))
    assert zeros / count == pytest.approx(0.5, abs=1e-3) and not equal(tmp_path / "small", start)
    assert json.loads((tmp_path / "small" / "run.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("iss_p", ("--sparsity=0.5", "--pruner=START")),
        ("consensus", ("--sparsity=0.4", "--consensus.ramp=2", "--pruner=START")),
        ("precrop", ("--sparsity=0.4",)),
    ],
)
def test_a_killed_training_ends_as_an_unbroken_one(method, extra, words, start, tmp_path, monkeypatch):
    extra = [word.replace("START", str(start)) for word in extra]
    slim.main(words(tmp_path / "straight", method, *extra))
    with monkeypatch.context() as patch:
        die_at(patch, 3)
        with pytest.raises(SystemExit) as stopped:
            slim.main(words(tmp_path / "killed", method, *extra))
    assert stopped.value.code == 128 + signal.SIGTERM
    slim.main(words(tmp_path / "killed", method, *extra))
    assert equal(tmp_path / "straight", tmp_path / "killed")
    small, whole = load_pruner(tmp_path / "killed"), load_pruner(start)
    assert type(small) is PPM and small.base_model is not None
    if method == "iss_p":
        zeros, count = zeros_of(small)
        assert 0.45 < zeros / count < 0.51
    else:
        size = sum(weight.numel() for weight in small.parameters())
        assert size <= 0.6 * sum(weight.numel() for weight in whole.parameters())
        assert read_note(tmp_path / "killed")["parameters"] == size
        assert json.loads((tmp_path / "killed" / "run.json").read_text())["parameters"] == size


def test_tickets_are_found_again_after_a_kill(words, tmp_path, monkeypatch):
    extra = ("--sparsity=0.36", "--lth.rewind=0.25")
    slim.main(words(tmp_path / "straight", "lth", *extra))
    with monkeypatch.context() as patch:
        die_at(patch, 3, training=2)
        with pytest.raises(SystemExit):
            slim.main(words(tmp_path / "killed", "lth", *extra))
    rounds = tmp_path / "killed" / "training"
    assert (rounds / "round-0" / "config.json").is_file() and not (rounds / "round-2").exists()
    slim.main(words(tmp_path / "killed", "lth", *extra))
    assert equal(tmp_path / "straight", tmp_path / "killed")
    shares = [zeros / count for zeros, count in (zeros_of(load_pruner(rounds / f"round-{n}")) for n in range(3))]
    assert shares == pytest.approx([0, 0.2, 0.36], abs=1e-3)
    rewound = torch.load(rounds / "rewind.ckpt", weights_only=False)
    assert rewound["global_step"] == 1
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["steps"] == 4


def test_relevance_takes_units_out(words, start, tmp_path):
    slim.main(words(tmp_path / "small", "lrp", f"--pruner={start}", "--sparsity=0.3", "--lrp.batches=1"))
    small, whole = load_pruner(tmp_path / "small"), load_pruner(start)
    assert small.config.feed_widths and small.config != whole.config
    note = read_note(tmp_path / "small")
    assert note["structured"] and note["parameters"] <= 0.7 * sum(w.numel() for w in whole.parameters())
    assert note["speed"].startswith("smaller matrices")


def test_a_sweep_measures_each_part(tmp_path, capsys):
    recipe = ["--config=ppm_tiny", "--trainer.accelerator=cpu", f"--out={tmp_path}", "--pruner=ppm", "--method=sweep"]
    slim.main([*recipe, "--sweep.grid=[0.9]", "--sweep.limit=7", f"--sweep.file={tmp_path / 'sweep.json'}"])
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["name"] for row in record["rows"]][:2] == ["start", "all 0.9"]
    assert {row["part"] for row in record["rows"]} == {
        "start",
        "all",
        "project",
        "place",
        "blocks",
        "head",
        "text_blocks",
    }
    assert record["split"] == "validation" and record["n"] == 7 and set(record["cliffs"]) >= {"all", "head"}
    assert record["rows"][1]["not_zero"] < 0.15 * record["rows"][0]["not_zero"]
    assert "zeros are no speed-up" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "extra", "said"),
    [
        ("magnitude", ("--sparsity=0.5",), "--method magnitude needs a trained pruner: name one by --pruner"),
        ("magnitude", ("--sparsity=1.5", "--pruner=START"), "--sparsity 1.5"),
        ("magnitude", ("--part=tail", "--pruner=START"), "--part tail: 'ppm' has all"),
        ("precrop", ("--pruner=START",), "precrop is for untrained pruners"),
        ("precrop", ("--sparsity=0.99",), "one unit in each layer costs more"),
        ("lrp", ("--sparsity=0.99", "--pruner=START"), "one unit in each layer stays; at most"),
        ("lrp", ("--lrp.batches=0", "--pruner=START"), "lrp.batches=0: at least 1"),
        ("sweep", ("--pruner=START",), "the recipe's data must be a suite"),
        ("best", (), "method"),
    ],
)
def test_mistakes_name_their_option(method, extra, said, words, start, tmp_path, capsys, monkeypatch):
    extra = [word.replace("START", str(start)) for word in extra]
    assert said in one_line_error(capsys, monkeypatch, words(tmp_path / "small", method, *extra), slim.main)


def test_another_slimming_is_not_overwritten(words, start, tmp_path, capsys, monkeypatch):
    slim.main(words(tmp_path / "small", "magnitude", f"--pruner={start}", "--sparsity=0.5"))
    other = words(tmp_path / "small", "magnitude", f"--pruner={start}", "--sparsity=0.6")
    assert "another slimming was begun there" in one_line_error(capsys, monkeypatch, other, slim.main)
    onto = words(start, "magnitude", f"--pruner={start}", "--sparsity=0.6")
    assert "a pruner is there; name another folder" in one_line_error(capsys, monkeypatch, onto, slim.main)
