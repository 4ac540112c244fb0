"""Training a ranker in front of the tower: rewards of towers that really saw less, and the recipe to its export."""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from labelled import labelled
from tiny_llava import make_image
from trainings import one_line_error

from prunezoo import PruneZooError, encode, load_pruner
from prunezoo.core.contract import Pruner
from prunezoo.host import run_pruned
from prunezoo.host.group import group_forward
from prunezoo.learned.patch_classifier import PatchClassifier
from prunezoo.training_free.energy import Energy
from trainers.cards.parts import weights_digest
from trainers.fit import main
from trainers.training.gaps import GapsModule
from trainers.training.losses import answer_slots

ROOT = Path(__file__).parent.parent.parent
DRAWS = 5


class Chosen(Pruner):
    """Leaves a given set in front of the tower."""

    name, stage = "chosen", "input"

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def score(self, inputs):
        return self.mask.float()


@pytest.fixture
def module(tiny_llava_folder):
    torch.manual_seed(0)
    made = GapsModule(
        str(tiny_llava_folder), PatchClassifier(side=8, hidden=16, grow=False, facts=True), "float32", draws=DRAWS
    )
    made.total_steps = 10
    return made


@pytest.fixture
def batch(tiny_llava):
    return labelled(tiny_llava)


@torch.no_grad()
def test_the_reward_is_what_the_model_says_when_its_tower_saw_less(module, batch):
    """Draw by draw and sample by sample, against the stage that `attach` uses; behind the tower it would be another."""
    module.answer_weight, module.agreement_weight = 0.5, 2.0
    encoded = encode(module.vlm, batch)
    mask = torch.rand(DRAWS, 2, 36, generator=torch.Generator().manual_seed(0)) < 0.4
    reward, behind = module.reward(encoded, mask), group_forward(module.vlm, encoded, mask)
    full = module.vlm(**batch).logits
    teacher = full[:, :-1][batch["labels"][:, 1:] != -100].log_softmax(-1)
    owner = torch.tensor([0, 0, 1, 1, 1])
    for draw in range(DRAWS):
        out = run_pruned(module.vlm, encoded, Chosen(mask[draw]), mask[draw].sum(1)).host
        logits, tokens, _ = answer_slots(out.logits, out.labels)
        ours = logits.log_softmax(-1)
        likelihood = ours.gather(1, tokens[:, None])[:, 0]
        kl = (teacher.exp() * (teacher - ours)).sum(-1)
        for sample in range(2):
            expected = (0.5 * likelihood - 2.0 * kl)[owner == sample].mean()
            torch.testing.assert_close(reward[draw, sample], expected, rtol=1e-4, atol=1e-4)
        rows = torch.arange(2) * DRAWS + draw  # of the same choice behind the tower
        late = behind.logits[rows, :-1][behind.labels[rows, 1:] != -100]
        assert (late - logits).abs().max() > 1e-2


def test_all_samples_of_a_batch_have_one_budget(module):
    torch.manual_seed(0)
    available = torch.tensor([36, 36, 36, 36, 36, 36])
    drawn = [module.draw_budgets(available) for _ in range(20)]
    assert all(len(set(counts.tolist())) == 1 for counts in drawn)
    assert {counts[0].item() for counts in drawn} == {9, 12, 18, 27}


def test_it_starts_as_energy_and_auto_keeps_the_share(module, batch):
    """What the first updates descend on: in the end cells stand in the order of their variance."""
    inputs = module.pixels(encode(module.vlm, batch, run_tower=False))
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(inputs.features.shape, generator=random) * torch.rand(2, 36, 1, generator=random)
    inputs = replace(inputs, features=noise)
    energy = Energy().score(inputs)
    optimizer = torch.optim.Adam(module.pruner.parameters(), lr=0.01)
    for _ in range(150):
        logits = module.pruner.rate(inputs)
        loss = module.started(logits, inputs) + module.pinned(logits, inputs.valid)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rank, other = (values.argsort(1).argsort(1).float() for values in (logits.detach(), energy))
    assert all(torch.corrcoef(torch.stack(pair))[0, 1] > 0.9 for pair in zip(rank, other, strict=True))
    kept = module.pruner.eval()(inputs, "auto").counts
    assert all(abs(count / 36 - 0.75) < 0.12 for count in kept)


def test_what_is_no_ranking_is_refused(tiny_llava_folder):
    with pytest.raises(PruneZooError, match="grow must be false"):
        GapsModule(str(tiny_llava_folder), PatchClassifier(side=8, hidden=4), "float32")
    with pytest.raises(PruneZooError, match=r"auto_share=1.0 in \(0, 1\)"):
        GapsModule(str(tiny_llava_folder), PatchClassifier(side=8, hidden=4, grow=False), "float32", auto_share=1.0)


@pytest.fixture(scope="module")
def words(tiny_llava_folder, tmp_path_factory):
    """The recipe on a user's own pictures."""
    folder = tmp_path_factory.mktemp("own")
    entries = []
    for number in range(20):
        make_image(number).save(folder / f"{number}.png")
        talk = [{"from": "human", "value": "<image>\nwhat color is the ball ?"}, {"from": "gpt", "value": "red"}]
        entries.append({"id": str(number), "image": f"{number}.png", "conversations": talk})
    (folder / "data.json").write_text(json.dumps(entries))
    return [
        f"--config={ROOT / 'configs' / 'patch_gaps_tiny.yaml'}", f"--model.vlm={tiny_llava_folder}",
        "--model.pruner.init_args.config.hidden=16", "--model.draws=6", "--model.lr=0.01",
        "--data=trainers.data.modules.LlavaJsonDataModule", f"--data.json={folder / 'data.json'}",
        f"--data.images={folder}", "--data.batch_size=4", "--data.workers=0", "--data.validation_share=0.2",
        "--trainer.accelerator=cpu", "--trainer.max_steps=6", "--trainer.val_check_interval=6",
        "--trainer.log_every_n_steps=1", "--trainer.enable_model_summary=false", "--checkpoint.every_n_train_steps=2",
        "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


def fit(words, out, monkeypatch, *extra):
    monkeypatch.setattr(sys, "argv", ["fit"])
    main([*words, f"--out={out}", *extra])
    return torch.load(out / "training" / "checkpoints" / "last.ckpt", weights_only=False)


def test_a_killed_run_goes_on_as_if_it_had_not_been(words, tmp_path, monkeypatch):
    """It is killed behind the start, which is one update long here."""
    straight = fit(words, tmp_path / "straight", monkeypatch)
    stop = ("--trainer.callbacks+=spies.StopAt", "--trainer.callbacks.step=2")
    with pytest.raises(SystemExit) as stopped:
        fit(words, tmp_path / "killed", monkeypatch, *stop)
    assert stopped.value.code == 128 + signal.SIGTERM
    resumed = fit(words, tmp_path / "killed", monkeypatch, "--ckpt_path=last")
    assert straight["global_step"] == resumed["global_step"] == 6
    weights = straight["state_dict"]
    assert all(torch.equal(weights[name], resumed["state_dict"][name]) for name in weights)
    log = (tmp_path / "straight" / "training" / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert {"train/guide", "train/reward", "train/entropy"} <= set(log.split(","))
    exported = load_pruner(tmp_path / "straight")
    assert isinstance(exported, PatchClassifier) and exported.base_model is not None
    assert not exported.config.grow


def test_updates_make_better_subsets_likelier(words, tmp_path, monkeypatch):
    fit(words, tmp_path, monkeypatch, "--trainer.max_steps=40", "--model.start_share=0", "--model.budgets=[0.25]")
    rows = (tmp_path / "training" / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/reward")
    rewards = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.01


def test_the_recipe_says_what_is_wrong(words, tmp_path, monkeypatch, capsys):
    said = one_line_error(capsys, monkeypatch, [*words, f"--out={tmp_path}", "--model.start_share=1.0"])
    assert "start_share=1.0 must lie in [0, 1)" in said


def test_the_shipped_one_is_what_was_measured():
    folder = ROOT / "checkpoints" / "patch-gaps-tiny"
    pruner, metrics = load_pruner(folder), json.loads((folder / "metrics.json").read_text())
    assert isinstance(pruner, PatchClassifier) and pruner.config.facts and pruner.base_model is not None
    assert set(metrics["weights"].values()) == {weights_digest(folder)} and metrics["n"] >= 2100
    means = {row["keep"]: row["retention"] for row in metrics["rows"] if row["group"] == "mean"}
    assert means["3/4"] > means["1/2"] > means["1/4"] > means["0"]
