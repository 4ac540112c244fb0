"""Tail-drop latents beyond the shared contract: order, prefixes, rebuilding, training."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from made_inputs import make_inputs
from tiny_llava import make_image
from trainings import words

from prunezoo import AutoPruner, PruneZooError, encode, load_pruner
from prunezoo.host import full_forward
from prunezoo.host.run import run_pruned
from prunezoo.learned.ppm import PPM
from prunezoo.learned.tail_drop import TailDrop
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import load_suite
from trainers.evaluation.loading import load_vlm
from trainers.training.tail_drop import TailDropModule, adopt_reader

ROOT = Path(__file__).parent.parent.parent
PROMPT = "<s> USER: <image> what color is the ball ? ASSISTANT:"
SIZES = {"width": 32, "hidden": 16, "heads": 2, "blocks": 1, "text_blocks": 1}


def made(seed: int = 0, **config) -> TailDrop:
    """Latents far from where they start."""
    torch.manual_seed(seed)
    pruner = TailDrop(**{**SIZES, "latents": 12, **config}).eval()
    for parameter in (pruner.correct.weight, pruner.queries):
        torch.nn.init.normal_(parameter, std=0.3)
    return pruner


# Prefixes


def test_untrained_latents_are_the_best_tokens_of_the_reader():
    torch.manual_seed(0)
    pruner, inputs = TailDrop(**SIZES, latents=12).eval(), make_inputs()
    pruner.lean.bias.data.fill_(-torch.inf)  # towards the mean
    for keep in (1, 5, 15):
        alone, made_anew = pruner.reader(inputs, keep), pruner(inputs, keep)
        assert torch.equal(made_anew.index, alone.index)
        kept = made_anew.valid
        torch.testing.assert_close(made_anew.features[kept], alone.kept_features(inputs)[kept])


def test_a_longer_prefix_adds_latents_and_leaves_the_others():
    pruner, inputs = made(), make_inputs()
    seen: dict[int, torch.Tensor] = {}
    for keep in range(1, 13):
        output = pruner(inputs, keep)
        slots = output.index[0, : output.count[0]].tolist()
        tokens = dict(zip(slots, output.kept_features(inputs)[0], strict=False))
        assert set(seen) < set(tokens) and len(tokens) == keep
        for slot, token in seen.items():
            torch.testing.assert_close(tokens[slot], token, rtol=1e-5, atol=1e-5)
        assert all(not torch.allclose(token, inputs.features[0, slot]) for slot, token in tokens.items())
        seen = tokens


def test_beyond_the_row_come_the_image_s_own_tokens():
    pruner, inputs = made(latents=5), make_inputs()
    output = pruner(inputs, 15)
    rank = pruner.latents(inputs, 5)[2]
    own = 0
    for row in range(3):
        for slot, token in zip(output.index[row].tolist(), output.kept_features(inputs)[row], strict=True):
            assert torch.equal(token, inputs.features[row, slot]) == (rank[row, slot] >= 5)
            own += int(rank[row, slot] >= 5)
    assert own == 30


def test_every_length_runs_on_a_model_and_the_last_is_the_bare_one(tiny_llava):
    batch = tiny_llava.batch([PROMPT, PROMPT], [[make_image(0)], [make_image(1)]])
    pruner = made(latents=30)
    with torch.no_grad():
        bare = tiny_llava.vlm(**batch).logits[:, -1]
        encoded = encode(tiny_llava.vlm, batch, pruner.needs)
        for keep in range(1, 37):
            run = run_pruned(tiny_llava.vlm, encoded, pruner, keep)
            assert run.tokens.tolist() == [keep, keep] and run.host.logits.isfinite().all()
            assert torch.equal(run.host.logits[:, -1], bare) == (keep == 36)


def test_the_prompt_matters_unless_blind():
    inputs = make_inputs()
    other = replace(inputs, text=inputs.text.flip(1) + 1)
    aware, blind = made(), made(query_aware=False)
    assert not torch.allclose(aware(inputs, 4).features, aware(other, 4).features)
    assert torch.equal(blind(inputs, 4).features, blind(replace(inputs, text=None, text_valid=None), 4).features)


def test_ragged_budgets_give_what_each_gives_alone():
    pruner, inputs = made(), make_inputs()
    together = pruner(inputs, torch.tensor([3, 20, 9]))
    for row, keep in enumerate((3, 20, 9)):
        alone = pruner(inputs, keep)
        assert torch.equal(together.index[row, :keep], alone.index[row, :keep])
        torch.testing.assert_close(together.features[row, :keep], alone.features[row, :keep])


# Training


def test_rebuilding_is_asked_for_in_training_only_and_can_be_learned():
    pruner, inputs = made().train(), make_inputs()
    assert made()(inputs, 6).error is None
    optimizer = torch.optim.Adam(pruner.parameters(), lr=3e-3)
    errors = []
    for _ in range(150):
        output = pruner(inputs, 12)
        (term,) = pruner.loss_terms(output).values()
        assert term.item() == pytest.approx(0.1 * output.error.item())
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
        errors.append(output.error.item())
    assert errors[0] > 0.9 and errors[-1] < 0.5 * errors[0], "1 is the mean token"
    pruner = made(rebuild=0.0).train()
    assert pruner.loss_terms(pruner(inputs, 6)) == {}


def test_the_reader_is_a_trained_ppm_that_stays_as_it_is(tmp_path):
    torch.manual_seed(5)
    ppm = PPM(**SIZES)
    ppm.save_pretrained(tmp_path)
    pruner, inputs = made(), make_inputs()
    assert not torch.allclose(pruner.reader.score(inputs), ppm.score(inputs))
    adopt_reader(pruner, str(tmp_path))
    torch.testing.assert_close(pruner.reader.score(inputs), ppm.score(inputs))
    assert not any(weight.requires_grad for weight in pruner.reader.parameters())
    with pytest.raises(PruneZooError, match="hidden=32"):
        adopt_reader(made(hidden=32), str(tmp_path))


def test_a_reader_that_is_new_learns_what_to_lean_towards():
    pruner, inputs = made().train(), make_inputs()
    pruner(inputs, 6).features.square().sum().backward()
    assert pruner.reader.head.weight.grad.abs().sum() > 0


def test_training_brings_short_prefixes_nearer_to_the_full_model(world, tiny_llava_folder, tmp_path):
    """By the command line, on the recipe for LLaVA; then the exported folder prunes."""
    given = words(world, tiny_llava_folder, tmp_path / "out")
    arguments = [
        f"--config={ROOT / 'configs' / 'tail_drop_llava.yaml'}",
        *(f"--model.pruner.config.{key}={value}" for key, value in {**SIZES, "latents": 12}.items()),
        "--model.reader=null",
        "--model.lr=0.003",
        *(word for word in given if "pruner" not in word and "--config" not in word),
        "--trainer.max_steps=30",
        "--trainer.val_check_interval=null",
        "--trainer.check_val_every_n_epoch=2",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "trainers.fit", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    pruner = AutoPruner.from_pretrained(tmp_path / "out")
    assert pruner.name == "tail_drop" and not pruner.training
    log = (tmp_path / "out/training/logs/version_0/metrics.csv").read_text()
    assert "train/kl" in log and "train/rebuild" in log and "val/accuracy_0.028" in log
    assert pruner(make_inputs(), 3).count.tolist() == [3, 3, 3]


def test_lengths_are_drawn_unless_the_tail_is_never_dropped():
    torch.manual_seed(0)
    vlm = str(ROOT / "checkpoints" / "tiny-llava")
    collate = ConversationCollator(load_vlm(vlm, "cpu", "float32")[1])
    read: list[list[int]] = []
    for drop in (True, False):
        pruner = made(width=128).train()
        pruner.register_forward_pre_hook(lambda _, given: read[-1].append(given[1]))
        module = TailDropModule(vlm, pruner, lengths_a_step=8, longest=1 / 3, drop=drop)
        read.append([])
        module.training_step(collate(load_suite("scenes", "train", 2)[:]), 0).backward()
    assert len(set(read[0])) > 3 and min(read[0]) < 6 and max(read[0]) <= 48
    assert read[1] == [48]


@pytest.mark.parametrize(
    ("wrong", "named"), [({"latents": 0}, "latents"), ({"rebuild": -1.0}, "rebuild"), ({"hidden": 18}, "hidden=18")]
)
def test_a_mistake_in_the_config_is_named(wrong, named):
    with pytest.raises(PruneZooError, match=named):
        made(**wrong)


def test_the_recipes_build_what_they_say():
    for size, parameters in (("tiny", 1_000_000), ("llava", 40_000_000)):
        recipe = yaml.safe_load((ROOT / "configs" / f"tail_drop_{size}.yaml").read_text())
        with torch.device("meta"):
            pruner = TailDrop(**recipe["model"]["init_args"]["pruner"]["init_args"]["config"])
        assert parameters / 2 < sum(p.numel() for p in pruner.parameters()) < parameters


def test_saved_latents_load(tmp_path):
    pruner = made()
    loaded = load_pruner(pruner.save_pretrained(tmp_path))
    inputs = make_inputs()
    assert torch.equal(loaded(inputs, 5).features, pruner(inputs, 5).features)


def test_every_length_of_the_shipped_checkpoint_runs():
    vlm, processor = load_vlm(str(ROOT / "checkpoints" / "tiny-llava"), "cpu", "float32")
    pruner = AutoPruner.from_pretrained(ROOT / "checkpoints" / "tail-drop-tiny")
    encoded = encode(vlm, ConversationCollator(processor)(load_suite("scenes", "validation", 1)[:]))
    distance = []
    with torch.no_grad():
        teacher = full_forward(vlm, encoded).logits[:, -3:].log_softmax(-1)
        for keep in range(1, 145):
            run = run_pruned(vlm, encoded, pruner, keep)
            assert run.tokens.item() == keep
            answer = run.host.logits[:, -3:].log_softmax(-1)
            distance.append((teacher.exp() * (teacher - answer)).sum().item())
        assert 1 <= run_pruned(vlm, encoded, pruner, "auto").tokens.item() <= 48
    assert distance[-1] == pytest.approx(0, abs=1e-5)  # the latents are in bfloat16
    assert max(distance[20:]) < min(distance[:2])
