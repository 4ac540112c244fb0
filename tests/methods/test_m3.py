"""M3: pooling that an adapter refines, and the LoRA that comes with it."""

import copy
import json
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, Sample, tiny_family
from m3_lora import PROMPT, SIZES, made_for, stir
from made_inputs import make_inputs
from tiny_llava import make_image, make_llava

from prunezoo import PruneInputs, PruneZooError, attach, encode, load_pruner
from prunezoo.host.run import run_pruned
from prunezoo.learned.m3 import M3
from prunezoo.training_free.pool import PoolPruner
from trainers.fit import main
from trainers.training.losses import answer_slots, distillation_kl

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def batch(tiny_llava):
    return tiny_llava.batch([PROMPT, PROMPT], [[make_image(0)], [make_image(1)]])


# The adapter


@pytest.mark.parametrize("keep", [1, 4, 9, 17, 0.6, 1.0])
def test_untrained_it_is_the_plain_mean_to_the_bit(keep):
    torch.manual_seed(0)
    inputs, pruner = make_inputs(pad=2), M3(**SIZES).eval()
    ours, mean = pruner(inputs, keep), PoolPruner()(inputs, keep)
    assert torch.equal(ours.index, mean.index) and torch.equal(ours.valid, mean.valid)
    assert torch.equal(ours.features[ours.valid], mean.features[mean.valid])
    stir(pruner)
    trained = pruner(inputs, keep)
    differs = (trained.features != mean.features).any(-1) & trained.valid
    assert torch.equal(differs, (trained.groups[:, None] == torch.arange(trained.index.shape[1])[:, None]).sum(-1) > 1)


@pytest.mark.parametrize("side", [1, 2, 3, 6])
def test_a_nested_scale_is_the_papers_pooling(side):
    torch.manual_seed(0)
    grid = torch.randn(1, 32, 6, 6)
    row, column = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    cells = torch.stack([torch.zeros_like(row), row, column], -1).view(1, 36, 3)
    inputs = PruneInputs(grid.flatten(2).transpose(1, 2), torch.ones(1, 36, dtype=torch.bool), cells)
    output = M3(**SIZES).eval()(inputs, side**2)
    pooled = F.avg_pool2d(grid, 6 // side).flatten(2).transpose(1, 2)
    # Anchors, which are as near to the middle as cells allow, keep the order of the squares.
    torch.testing.assert_close(output.features, pooled, rtol=0, atol=1e-6)
    square = row * side // 6 * side + column * side // 6
    assert torch.equal(output.groups, square.view(1, 36))


def test_attention_leans_towards_what_stands_out():
    """The one path by which a token itself, and not a made-up one, can outweigh its neighbours."""
    torch.manual_seed(0)
    inputs, pruner = make_inputs(grids=((6, 6),)), M3(**SIZES).eval()
    torch.nn.init.normal_(pruner.pool.query.bias, std=30.0)
    output = pruner(inputs, 4)
    distance = torch.cdist(output.features, inputs.features)[0].amin(-1)
    mean = torch.cdist(PoolPruner()(inputs, 4).features, inputs.features)[0].amin(-1)
    assert distance.max() < 0.5 * mean.min()


def test_the_models_answer_teaches_every_weight(tiny_llava, batch):
    vlm, pruner = tiny_llava.vlm, M3(**SIZES, lora_rank=2).train()
    pruner.lora.fit(vlm)
    stir(pruner, std=0.1)
    encoded = encode(vlm, {**batch, "labels": batch["input_ids"]})
    student = run_pruned(vlm, encoded, pruner, 4).host
    logits, _, _ = answer_slots(student.logits, student.labels)
    distillation_kl(logits, torch.randn_like(logits)).backward()
    for name, parameter in pruner.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in vlm.parameters())


@pytest.mark.parametrize(
    ("config", "named"), [({"heads": 3}, "heads=3"), ({"lora_rank": -1}, "lora_rank"), ({"blocks": 0}, "blocks")]
)
def test_a_config_out_of_range_is_named(config, named):
    with pytest.raises(PruneZooError, match=named):
        M3(**{**SIZES, **config})


def test_tokens_of_another_width_are_refused():
    with pytest.raises(PruneZooError, match="width=32"):
        M3(width=64, hidden=16, heads=2)(make_inputs(), 4)


# The LoRA


def test_the_lora_acts_only_while_images_lose_tokens(tiny_llava, batch):
    vlm, pruner = tiny_llava.vlm, made_for(tiny_llava.vlm)
    plain = copy.deepcopy(pruner)
    plain.lora = None
    parts, trainable = dict(vlm.named_modules()), [p.requires_grad for p in vlm.parameters()]
    with torch.no_grad():
        bare, encoded = vlm(**batch).logits, encode(vlm, batch)
        tuned, untuned = (run_pruned(vlm, encoded, p, 4).host.logits for p in (pruner, plain))
        assert (tuned - untuned).abs().max() > 0.1, "the LoRA changes nothing"
        assert torch.equal(run_pruned(vlm, encoded, pruner, 36).host.logits, bare)
        assert torch.equal(vlm(**batch).logits, bare)
    after = dict(vlm.named_modules())
    assert list(after) == list(parts) and all(after[name] is part for name, part in parts.items())
    assert [p.requires_grad for p in vlm.parameters()] == trainable


def test_attached_the_lora_is_on_from_prompt_to_last_token(tiny_llava, batch):
    vlm, pruner = tiny_llava.vlm, made_for(tiny_llava.vlm)
    with torch.no_grad():
        bare, answer = vlm(**batch).logits, vlm.generate(**batch, max_new_tokens=6, do_sample=False)
        with attach(vlm, pruner, keep=4):
            whole = vlm.generate(**batch, max_new_tokens=6, do_sample=False)
            logits = vlm(**batch).logits
            # token after token, each from a prompt read anew: what a cache must not change
            longer = dict(batch)
            for _ in range(6):
                word = vlm(**longer).logits[:, -1:].argmax(-1)
                longer["input_ids"] = torch.cat([longer["input_ids"], word], dim=1)
                longer["attention_mask"] = torch.ones_like(longer["input_ids"])
            assert torch.equal(whole, longer["input_ids"])
        assert torch.equal(run_pruned(vlm, encode(vlm, batch), pruner, 4).host.logits, logits)
        with attach(vlm, pruner, keep=1.0):
            assert torch.equal(vlm(**batch).logits, bare)
            assert torch.equal(vlm.generate(**batch, max_new_tokens=6, do_sample=False), answer)
        assert torch.equal(vlm(**batch).logits, bare)


@torch.no_grad()
def test_a_conversation_in_between_is_the_bare_models(tiny_llava, batch):
    """The LoRA is on for what follows on pruned images, and for nothing else, whatever came before."""
    vlm, pruner = tiny_llava.vlm, made_for(tiny_llava.vlm)
    text = tiny_llava.batch(["<s> USER: is the ball red ? ASSISTANT:"], [[]])
    word, mask = batch["input_ids"][:, -1:], torch.ones(len(batch["input_ids"]), batch["input_ids"].shape[1] + 1).long()
    bare, written = vlm(**text).logits, vlm.generate(**text, max_new_tokens=3)
    with attach(vlm, pruner, keep=9):
        cache = vlm(**batch, use_cache=True).past_key_values
        spare = copy.deepcopy(cache)
        expected = vlm(word, attention_mask=mask, past_key_values=cache).logits
        assert torch.equal(vlm(**text).logits, bare)
        vlm(**batch)
        assert torch.equal(vlm.generate(**text, max_new_tokens=3), written)
        assert torch.equal(vlm(word, attention_mask=mask, past_key_values=spare).logits, expected)
        pruner.lora = None
    with attach(vlm, pruner, keep=9):
        plain = vlm(**batch, use_cache=True).past_key_values
        assert not torch.equal(vlm(word, attention_mask=mask, past_key_values=plain).logits, expected)


def test_a_trainable_model_stays_trainable(batch):
    vlm = make_llava().requires_grad_(True)
    run_pruned(vlm, encode(vlm, batch), made_for(vlm), 4)
    assert all(parameter.requires_grad for parameter in vlm.parameters())


def test_an_error_inside_leaves_the_bare_model(tiny_llava):
    vlm, pruner = tiny_llava.vlm, made_for(tiny_llava.vlm)
    before = list(vlm.modules())

    def fail():
        with pruner.adapt(vlm):
            pruner.lora.switch(True)
            assert list(vlm.modules()) != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(vlm.modules()) == before


def test_a_lora_serves_one_block_at_a_time(tiny_llava, batch):
    """Within another block it would be gone from the outer one afterwards, without a word."""
    vlm, pruner = tiny_llava.vlm, made_for(tiny_llava.vlm)
    other = copy.deepcopy(vlm)
    with torch.no_grad(), attach(vlm, pruner, keep=4):
        logits = vlm(**batch).logits
        with pytest.raises(PruneZooError, match="in use already"), attach(other, pruner, keep=9):
            pass
        assert torch.equal(vlm(**batch).logits, logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lora_finds_its_maps_in_every_family(name):
    family = tiny_family(name)
    vlm = family.vlm
    encoded = encode(vlm, family.batch([Sample(((48, 40),), 5), Sample(((24, 24),), 4)]))
    pruner = M3(**{**SIZES, "width": encoded.inputs.features.shape[-1]}, lora_rank=2).eval()
    pruner.lora.fit(vlm)
    with torch.no_grad():
        before = run_pruned(vlm, encoded, pruner, 3).host.logits
        for weight in pruner.lora.weights.values():
            torch.nn.init.normal_(weight, std=0.3)
        assert (run_pruned(vlm, encoded, pruner, 3).host.logits - before).abs().max() > 0.1


# Training


def test_a_killed_run_goes_on_as_if_it_had_not_been(tiny_llava_folder, tiny_llava, tmp_path, monkeypatch, batch):
    (tmp_path / "images").mkdir()
    entries = []
    for number in range(16):
        make_image(number).save(tmp_path / "images" / f"{number}.png")
        talk = [{"from": "human", "value": "<image>\nwhat color is the ball ?"}, {"from": "gpt", "value": "red"}]
        entries.append({"id": str(number), "image": f"{number}.png", "conversations": talk})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    monkeypatch.setattr(sys, "argv", ["fit"])
    recipe = ROOT / "configs" / "m3_lora_llava.yaml"

    def fit(out, *extra):
        main(
            [
                f"--config={recipe}",
                f"--model.vlm={tiny_llava_folder}",
                "--model.vlm_dtype=float32",
                *(f"--model.pruner.config.{key}={value}" for key, value in {**SIZES, "lora_rank": 2}.items()),
                "--model.scales=[9,4,1]",
                "--model.scales_a_step=2",
                f"--data.json={tmp_path / 'data.json'}",
                f"--data.images={tmp_path / 'images'}",
                "--data.batch_size=2",
                "--data.workers=0",
                "--data.validation_share=0.25",
                "--trainer.precision=32",
                "--trainer.accelerator=cpu",
                "--trainer.max_steps=6",
                "--trainer.val_check_interval=6",
                "--trainer.num_sanity_val_steps=0",
                "--trainer.enable_model_summary=false",
                "--trainer.enable_progress_bar=false",
                "--checkpoint.every_n_train_steps=2",
                f"--out={out}",
                *extra,
            ]
        )
        return torch.load(out / "training" / "checkpoints" / "last.ckpt", weights_only=False)

    straight = fit(tmp_path / "straight")
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path / "killed", "--trainer.callbacks+=spies.StopAt", "--trainer.callbacks.step=3")
    assert stopped.value.code == 128 + signal.SIGTERM
    resumed = fit(tmp_path / "killed", "--ckpt_path=last")
    assert straight["global_step"] == resumed["global_step"] == 6
    names = set(straight["state_dict"])
    assert {name.split(".")[0] for name in names} == {"pruner"} and any(".lora." in name for name in names)
    assert all(torch.equal(straight["state_dict"][name], resumed["state_dict"][name]) for name in names)
    exported = load_pruner(tmp_path / "killed")
    assert max(w.detach().abs().max() for k, w in exported.lora.weights.items() if k.endswith("lora_B")) > 0
    with attach(tiny_llava.vlm, exported, keep=4) as run:
        tiny_llava.vlm.generate(**batch, max_new_tokens=2)
    assert run.stats.after == [4, 4]
