"""Distillation from a cache of the frozen model's answers."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from prunezoo import PruneZooError, encode, full_forward
from trainers import fit, teacher
from trainers.caches.cached import LogitsWorker
from trainers.data.conversation import ConversationCollator
from trainers.data.shards import ShardedCache
from trainers.data.suite import load_suite
from trainers.evaluation.loading import load_vlm
from trainers.training.losses import answer_slots, distillation_kl, hidden_mse, top_kl

ROOT = Path(__file__).parent.parent.parent
VLM = ROOT / "checkpoints" / "tiny-llava"


@pytest.fixture(scope="module")
def tiny():
    return load_vlm(str(VLM), "cpu", "float32")


def test_the_kl_over_the_likeliest_tokens_is_the_whole_one_where_the_rest_has_no_mass():
    torch.manual_seed(0)
    student, logits = torch.randn(5, 40, requires_grad=True), 8 * torch.randn(5, 40)
    log_prob = logits.log_softmax(-1)

    def kl(top):
        best, index = log_prob.topk(top)
        tail = log_prob.scatter(-1, index, -torch.inf).logsumexp(-1)
        return top_kl(student, index, best, tail)

    whole = distillation_kl(student, logits)
    torch.testing.assert_close(kl(40), whole)
    torch.testing.assert_close(kl(30), whole, rtol=1e-4, atol=1e-4)
    values = [float(kl(top).detach()) for top in (1, 3, 10, 40)]
    assert values == sorted(values) and values[0] < 0.99 * values[-1]
    (ours,), (theirs,) = torch.autograd.grad(kl(30), student), torch.autograd.grad(whole, student)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_hidden_states_are_matched_on_one_scale():
    states = torch.randn(6, 2, 8)
    scaled = states * torch.tensor([1.0, 1000.0])[:, None]
    assert hidden_mse(states, states) == 0 and float(hidden_mse(0 * scaled, scaled)) == pytest.approx(1.0)
    torch.testing.assert_close(hidden_mse(1.1 * scaled, scaled), torch.tensor(0.01), rtol=1e-3, atol=1e-5)


def test_a_shard_holds_the_models_own_answers(tiny):
    vlm, processor = tiny
    items, told = load_suite("scenes", "train", 9), []
    worker = LogitsWorker(str(VLM), "float32", items, 4, None, 16, (0, 3))
    shard = worker.on(vlm)(range(2, 9), told.append)
    assert shard["item"].tolist() == list(range(2, 9)) and sum(told) == 7
    with torch.no_grad():
        full = full_forward(vlm, encode(vlm, ConversationCollator(processor)([items[5]])), output_hidden_states=True)
    logits = answer_slots(full.logits, full.labels)[0]
    ends = shard["slots"].cumsum(0).tolist()
    here = slice(ends[2], ends[3])
    assert len(shard["tail"][here]) == len(logits) > 1
    log_prob = logits.log_softmax(-1)
    torch.testing.assert_close(
        log_prob.gather(-1, shard["top"][here].long()), shard["log_prob"][here].float(), atol=2e-2, rtol=1e-2
    )
    mass = shard["log_prob"][here].float().exp().sum(-1) + shard["tail"][here].exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), atol=2e-3, rtol=0)
    assert torch.equal(shard["top"][here][:, 0].long(), logits.argmax(-1))
    slots = full.labels[0, 1:] != -100
    for place, layer in enumerate((0, 3)):
        expected = full.hidden_states[layer][0, :-1][slots]
        assert F.cosine_similarity(shard["hidden"][here][:, place].float(), expected).min() > 0.999
    predicted = worker.bytes_per_item(vlm) * 7
    written = sum(value.numel() * value.element_size() for value in shard.values())
    assert predicted == pytest.approx(written, rel=0.3)


def words(cache, out, *extra):
    return [
        f"--config={ROOT / 'configs' / 'ppm_tiny.yaml'}",
        f"--model.vlm={VLM}",
        "--model.guide_share=0",
        "--model.guide_weight=0",
        "--data.train_items=24",
        "--data.validation_items=4",
        "--data.batch_size=4",
        "--data.workers=0",
        "--trainer.max_steps=6",
        "--trainer.limit_val_batches=0",
        "--trainer.precision=32-true",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=1",
        "--trainer.callbacks+=spies.Losses",
        f"--trainer.callbacks.folder={out}",
        f"--out={out}",
        *(
            ()
            if cache is None
            else ("--data.class_path=trainers.caches.cached.TaughtSuite", f"--data.teacher_cache={cache}")
        ),
        *extra,
    ]


def losses(out):
    return torch.tensor([float(line.split()[1]) for line in (out / "losses.0").read_text().splitlines()])


@pytest.fixture(autouse=True)
def no_words(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fit"])


def test_training_from_the_cache_is_training_beside_the_model(tmp_path, capsys):
    """Of 75 tokens 64 are kept, in half precision: losses differ by what that loses."""
    cache = tmp_path / "cache"
    extra = "--model.hidden_weight=0.5", "--model.hidden_layers=[2,5]"
    for name in ("live", "cached"):
        (tmp_path / name).mkdir()
    fit.main(words(None, tmp_path / "live", *extra))
    teacher.main(words(cache, tmp_path / "cached", "--data.hidden_layers=[2,5]", "--data.shard_items=10"))
    assert "MB will be written" in " ".join(capsys.readouterr().out.split())
    manifest = json.loads((cache / "manifest.json").read_text())
    assert [shard["rows"] for shard in manifest["shards"].values()] == [10, 10, 4]
    written = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    again = "--data.hidden_layers=[2,5]", "--data.shard_items=10", "--data.workers=1"
    fit.main(words(cache, tmp_path / "cached", *extra, *again))
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == written, "nothing was made anew"
    live, cached = losses(tmp_path / "live"), losses(tmp_path / "cached")
    assert len(live) == 6 and live[0] > 0.05
    torch.testing.assert_close(cached, live, rtol=2e-2, atol=2e-3)
    log = (tmp_path / "cached" / "training" / "logs" / "version_0" / "metrics.csv").read_text()
    assert "train/hidden" in log


def test_with_the_cache_the_full_model_is_not_asked(tmp_path, monkeypatch):
    """Forward passes of the language model in one step: the student's alone."""
    counts = {}
    for name, cache in (("live", None), ("cached", tmp_path / "cache")):
        (tmp_path / name).mkdir()
        if cache:
            teacher.main(words(cache, tmp_path / name))
        cli = fit.build([*words(cache, tmp_path / name), "--trainer.max_steps=2"])
        calls = []
        cli.model.vlm.get_decoder().layers[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        counts[name] = len(calls)
    assert counts == {"live": 4, "cached": 2}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--data.top=0", "top must be at least 1, got 0"),
        ("--data.top=8", "was made with top=64, wanted is 8"),
        ("--data.hidden_layers=[99]", "hidden_layers=[99]: the model has layers 0 to"),
        ("--model.hidden_weight=1", "hidden_weight=1.0 needs model.hidden_layers"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(wrong, said, tmp_path, capsys):
    cache = tmp_path / "cache"
    if "made" in said:
        teacher.main(words(cache, tmp_path))
    with pytest.raises(SystemExit):
        fit.main(words(cache, tmp_path, wrong))
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_training_that_would_not_read_the_answers_is_refused(tmp_path, capsys):
    m3 = [f"--config={ROOT / 'configs' / 'm3_tiny.yaml'}", f"--model.vlm={VLM}", "--trainer.accelerator=cpu"]
    data = ["--data.class_path=trainers.caches.cached.TaughtSuite", f"--data.teacher_cache={tmp_path}"]
    with pytest.raises(SystemExit):
        fit.main([*m3, *data, f"--out={tmp_path / 'm3'}"])
    assert "MatryoshkaModule trains from no cached answers" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_disk_that_is_too_small_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(LogitsWorker, "bytes_per_item", lambda self, vlm: 10**15)
    cli = fit.build(words(tmp_path / "cache", tmp_path))
    with pytest.raises(PruneZooError, match=r"GB will be needed and .* GB are free"):
        cli.datamodule.make_cache(cli.model)
    assert not list((tmp_path / "cache").iterdir())


def test_another_cut_of_the_answers_is_refused(tiny, tmp_path):
    """A cache whose places of answers are not the batch's would teach each token another one's answer."""
    from trainers.caches.cached import TaughtCollator, TaughtItems

    vlm, processor = tiny
    items = load_suite("scenes", "train", 4)
    cache = ShardedCache(tmp_path, {}, 4, 2, "again")
    worker = LogitsWorker(str(VLM), "float32", items, 2, None, 4, ())
    for name in cache.names:
        cache.note(name, cache.write(name, worker.on(vlm)(cache.range_of(name), lambda n: None)))
    taught = TaughtItems(items, cache)
    batch = TaughtCollator(processor)([taught[3], taught[0]])
    assert len(batch["teacher"]["tail"]) == int((batch["labels"] != -100).sum())
    short = [(item, {key: value[:1] for key, value in answers.items()}) for item, answers in taught]
    with pytest.raises(PruneZooError, match="4 places of answers where these items have"):
        TaughtCollator(processor)(short)
