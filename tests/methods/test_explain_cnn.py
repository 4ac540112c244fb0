"""The explainability-map CNN beyond the shared contract: input, cache of maps, training from one command."""

import dataclasses
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from prunezoo import AutoPruner, PruneInputs, PruneZooError, attach, build_pruner, encode
from prunezoo.host.signals.relevance import relevance_map
from prunezoo.learned.explain_cnn import ExplainCNN, standardised_log
from trainers import fit, teacher
from trainers.caches.maps import MapSet, RelevanceWorker, pad_maps
from trainers.data.conversation import ConversationCollator
from trainers.data.shards import ShardedCache
from trainers.data.suite import load_suite
from trainers.evaluation.loading import load_vlm

ROOT = Path(__file__).parent.parent.parent
VLM = ROOT / "checkpoints" / "tiny-llava"
RECIPE = ROOT / "configs" / "explain_cnn_tiny.yaml"
ITEMS = 24


def inputs_of(attention):
    """Inputs with attention (B, N) or, for each head, (B, N, H)."""
    valid = torch.ones(attention.shape[:2], dtype=torch.bool)
    name = "prompt_attention" if attention.dim() == 2 else "prompt_head_attention"
    cells = torch.full((*valid.shape, 3), -1)
    return PruneInputs(attention.new_zeros(*valid.shape, 0), valid, cells, signals={name: attention})


@pytest.mark.parametrize("heads", [0, 3])
@pytest.mark.parametrize("tokens", [1, 2, 1000])
def test_any_number_of_tokens_goes_and_only_ratios_of_attention_count(tokens, heads):
    torch.manual_seed(0)
    attention = torch.rand(2, tokens, heads) / tokens if heads else torch.rand(2, tokens) / tokens
    cnn = ExplainCNN(widths=(8, 16), heads=heads).eval()
    scores = cnn.score(inputs_of(attention))
    assert scores.shape == (2, tokens) and scores.isfinite().all()
    torch.testing.assert_close(cnn.score(inputs_of(attention * 1e-3)), scores, rtol=1e-4, atol=1e-4)
    if tokens > 2:
        assert scores.std() > 1e-2
        assert (cnn.score(inputs_of(attention.flip(1))) - scores).abs().max() > 1e-2


def test_the_input_has_one_scale_for_all():
    attention = torch.tensor([[1.0, 10.0, 100.0, 7.0], [0.3, 0.3, 0.3, 0.3], [0.0, 0.0, 5.0, 5.0]])
    valid = torch.tensor([[True, True, True, False], [True] * 4, [True] * 4])
    both = standardised_log(torch.stack([attention, 7 * attention], -1), valid)
    torch.testing.assert_close(both[..., 1], both[..., 0])
    result = both[..., 0]
    torch.testing.assert_close(result[0], torch.tensor([-1.5, 0.0, 1.5, 0.0]).sign() * 1.5**0.5)
    assert not result[1].any(), "equal attention says nothing"
    torch.testing.assert_close(result[2], torch.tensor([-1.0, -1.0, 1.0, 1.0]))


def test_a_token_is_seen_as_far_as_the_kernels_reach():
    torch.manual_seed(0)
    cnn = ExplainCNN(widths=(8, 16, 8), kernel=5).eval()
    x, valid = torch.randn(1, 40, 1), torch.ones(1, 40, dtype=torch.bool)
    y = x.clone()
    y[0, 20] += 1.0
    for layer in cnn.layers:
        x, y = layer(x, valid), layer(y, valid)
    assert (x - y).abs().amax(-1)[0].nonzero()[:, 0].tolist() == list(range(20 - 6, 20 + 7))


def test_another_models_heads_are_refused():
    with pytest.raises(PruneZooError, match="built for 3 attention heads, the model has 5: build it with heads=5"):
        ExplainCNN(widths=(8,), heads=3).score(inputs_of(torch.rand(1, 4, 5)))


@pytest.mark.parametrize("wrong", [{"widths": ()}, {"widths": (8, 0)}, {"kernel": 4}, {"kernel": 0}, {"heads": -1}])
def test_a_wrong_size_is_refused(wrong):
    with pytest.raises(PruneZooError, match=next(iter(wrong))):
        build_pruner("explain_cnn", **wrong)


def test_the_recipe_for_llava_onevision_is_as_small_as_the_papers():
    recipe = yaml.safe_load((ROOT / "configs" / "explain_cnn_llava_onevision.yaml").read_text())
    cnn = ExplainCNN(**recipe["model"]["init_args"]["pruner"]["init_args"]["config"])
    assert cnn.config == ExplainCNN().config
    assert 170_000 < sum(p.numel() for p in cnn.parameters()) < 190_000


# The maps


@pytest.fixture(scope="module")
def tiny():
    return load_vlm(str(VLM), "cpu", "float32")


def worker(items, max_tokens=None, signal="prompt_attention"):
    return RelevanceWorker(str(VLM), "float32", items, 5, None, max_tokens, signal)


def test_only_items_that_are_answered_rightly_have_maps_and_these_are_theirs(tiny):
    vlm, processor = tiny
    items = load_suite("scenes", "train", ITEMS)[:8]
    question, _ = items[2].turns[-1]
    items[2] = dataclasses.replace(items[2], turns=(*items[2].turns[:-1], (question, "no number")))
    told = []
    shard = worker(items).on(vlm)(range(1, 8), told.append)
    assert shard["item"].tolist() == [1, 3, 4, 5, 6, 7] and sum(told) == 7
    assert shard["tokens"].tolist() == [144] * 6
    encoded = encode(vlm, ConversationCollator(processor)([items[4]]), ("prompt_attention",))
    for name, expected in (
        ("relevance", relevance_map(vlm, encoded)),
        ("signal", encoded.inputs.signal("prompt_attention")),
    ):
        torch.testing.assert_close(shard[name].view(6, 144)[2], expected[0], rtol=1e-3, atol=1e-6)
    shorter = worker(items, max_tokens=1).on(vlm)(range(1, 8), told.append)
    assert torch.equal(shorter["signal"], shard["signal"])
    assert not torch.equal(shorter["relevance"], shard["relevance"])
    heads = worker(items, signal="prompt_head_attention").on(vlm)(range(1, 8), told.append)["signal"]
    assert heads.shape == (6 * 144, 4)
    torch.testing.assert_close(heads.mean(-1), shard["signal"])
    nothing = worker(items).on(vlm)(range(2, 3), told.append)
    assert [len(nothing[name]) for name in ("item", "tokens", "signal", "relevance")] == [0] * 4


def test_ragged_maps_are_read_back_and_padded(tmp_path):
    cache = ShardedCache(tmp_path, {}, 4, 2, "again")
    for name, sizes in zip(cache.names, ([3], [2, 4]), strict=True):
        relevance, count = torch.rand(sum(sizes)), len(sizes)
        shard = {"item": torch.arange(count), "tokens": torch.tensor(sizes), "relevance": relevance}
        cache.note(name, cache.write(name, {**shard, "signal": torch.stack([relevance, 2 * relevance], -1)}))
    maps = MapSet(cache)
    assert [len(maps[i][0]) for i in range(len(maps))] == [3, 2, 4]
    batch = pad_maps([maps[i] for i in range(3)])
    assert batch["valid"].sum(1).tolist() == [3, 2, 4]
    assert torch.equal(batch["signal"][..., 1], 2 * batch["relevance"])
    assert not batch["relevance"][~batch["valid"]].any() and torch.equal(batch["relevance"][1, :2], maps[1][1])


# One command


def words(maps, out, *extra):
    return [
        f"--config={RECIPE}",
        f"--model.vlm={VLM}",
        f"--data.maps={maps}",
        f"--data.train_items={ITEMS}",
        "--data.shard_items=10",
        "--data.maps_per_step=4",
        "--data.validation_items=7",
        "--data.workers=0",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=200",
        "--trainer.val_check_interval=200",
        "--trainer.enable_model_summary=false",
        "--checkpoint.every_n_train_steps=20",
        f"--out={out}",
        *extra,
    ]


@pytest.fixture(autouse=True)
def no_words(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fit"])  # LightningCLI warns about pytest's own words otherwise


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The recipe in one command: it makes the maps, trains and exports."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fit"])
        fit.main(words(folder / "maps", folder / "cnn"))
    return folder


def error_of(capsys, main, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and message.startswith("error: "), message
    return message


def test_the_command_makes_the_maps_and_a_pruner_that_attaches(straight, tiny):
    vlm, processor = tiny
    manifest = json.loads((straight / "maps" / "manifest.json").read_text())
    assert manifest["facts"]["suite"] == "scenes" and manifest["facts"]["split"] == "train"
    assert [shard["items"] for shard in manifest["shards"].values()] == [10, 10, 4]
    pruner = AutoPruner.from_pretrained(straight / "cnn")
    assert pruner.name == "explain_cnn"
    torch.manual_seed(0)
    assert any(
        not torch.equal(a, b) for a, b in zip(pruner.parameters(), ExplainCNN(pruner.config).parameters(), strict=True)
    )
    item = load_suite("scenes", "validation", 1)[0]
    batch = ConversationCollator(processor, answers=False)([item])
    with attach(vlm, pruner, keep=16) as run:
        vlm.generate(**batch, max_new_tokens=2, do_sample=False)
    assert "144 -> 16" in str(run.stats)
    log = (straight / "cnn" / "training" / "logs" / "version_0" / "metrics.csv").read_text()
    assert "val/retention_0.111" in log


def test_the_recipe_for_llava_onevision_runs_on_llava_format_files(tmp_path):
    """All of it but the model and its size: maps of the training pictures, training, pruning of the held-out ones."""
    entries = []
    for item in load_suite("scenes", "train", 30):
        item.image.save(tmp_path / f"{item.id}.png")
        turns = [
            {"from": who, "value": text}
            for turn in item.turns
            for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        entries.append({"id": item.id, "image": f"{item.id}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    small = {"train_items": 12, "batch_size": 2, "workers": 0, "validation_share": 0.3, "maps_per_step": 4}
    fit.main(
        [
            f"--config={ROOT / 'configs' / 'explain_cnn_llava_onevision.yaml'}",
            f"--model.vlm={VLM}",
            "--model.pruner.config.widths=[8,16]",
            *(f"--data.{name}={value}" for name, value in small.items()),
            f"--data.json={tmp_path / 'data.json'}",
            f"--data.images={tmp_path}",
            f"--data.maps={tmp_path / 'maps'}",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=4",
            "--trainer.val_check_interval=2",
            "--trainer.enable_model_summary=false",
            f"--out={tmp_path / 'cnn'}",
        ]
    )
    assert AutoPruner.from_pretrained(tmp_path / "cnn").needs == ("prompt_attention",)
    facts = json.loads((tmp_path / "maps" / "manifest.json").read_text())["facts"]
    assert facts["json"] == "data.json" and facts["dtype"] == "bfloat16" and facts["max_tokens"] == 16


def test_a_stopped_run_goes_on_as_if_it_had_not_been(straight, tmp_path):
    """SIGTERM in the middle of an epoch, then `--ckpt_path=last`: the same weights bit for bit, from the same maps."""
    arguments = words(straight / "maps", tmp_path / "cnn")
    written = {path.name: path.stat().st_mtime_ns for path in (straight / "maps").iterdir()}
    with pytest.raises(SystemExit) as stopped:
        fit.main([*arguments, "--trainer.callbacks+=spies.StopAt", "--trainer.callbacks.step=33"])
    assert stopped.value.code == 128 + signal.SIGTERM
    last = tmp_path / "cnn" / "training" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=False)["global_step"] < 200, "the run was over before it could be stopped"
    fit.main([*arguments, "--ckpt_path=last"])
    ours, theirs = (load_file(folder / "cnn" / "model.safetensors") for folder in (tmp_path, straight))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {path.name: path.stat().st_mtime_ns for path in (straight / "maps").iterdir()} == written


def test_maps_made_before_are_those_that_training_would_make(straight, tmp_path):
    """The command of its own, of more items, after a shard has been lost: what lies there is kept."""
    maps = tmp_path / "maps"
    shutil.copytree(straight / "maps", maps)
    (maps / "00001.safetensors").unlink()
    teacher.main(words(maps, tmp_path / "cnn", "--data.train_items=30"))
    for name in ("00000.safetensors", "00001.safetensors"):
        assert (maps / name).read_bytes() == (straight / "maps" / name).read_bytes()
    assert json.loads((maps / "manifest.json").read_text())["shards"]["00002.safetensors"]["items"] == 10


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--data.maps_per_step=30", "maps do not fill one step of 1 x maps_per_step=30"),
        ("--data.processes=0", "processes must be at least 1, got 0"),
        ("--data.max_tokens=1", "was made with max_tokens=None, wanted is 1; name another folder"),
        ("--data.suite=easy-vqa", "was made with "),
        ("--data.signal=prompt_attention", "was made with signal='prompt_head_attention'"),
        ("--data.signal=prompt_atention", "unknown signal 'prompt_atention'"),
        ("--model.pruner.config.heads=0", "reads prompt_attention: set data.signal=prompt_attention"),
        ("--model.cut=1", "cut=1.0 must lie in [0, 1)"),
        ("--model.pruner=prunezoo.learned.ppm.PPM", "'ppm' reads no signal"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(wrong, said, straight, tmp_path, capsys):
    assert said in error_of(capsys, fit.main, words(straight / "maps", tmp_path, wrong))


def test_a_damaged_shard_is_computed_again_or_named(straight, tmp_path):
    maps = tmp_path / "maps"
    shutil.copytree(straight / "maps", maps)
    path = maps / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    cli = fit.build(words(maps, tmp_path / "out"))
    with pytest.raises(PruneZooError, match=r"00000.safetensors is damaged.*python -m trainers.teacher"):
        MapSet(cli.datamodule.cache(cli.model))


def test_a_recipe_without_maps_has_no_cache_to_make(capsys):
    arguments = [f"--config={ROOT / 'configs' / 'ppm_tiny.yaml'}", f"--model.vlm={VLM}"]
    assert "SuiteDataModule keeps no cache" in error_of(capsys, teacher.main, arguments)
    arguments = [f"--config={ROOT / 'configs' / 'one_d_piece_ablation.yaml'}", "--data.images=nowhere"]
    assert "PhotographDataModule keeps no cache" in error_of(capsys, teacher.main, arguments)
