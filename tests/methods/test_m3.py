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
from made_inputs import make_inputs
from peft import PeftModel
from records import record_of
from safetensors.torch import load_file, save_file
from tiny_llava import make_image, make_llava
from transformers import AutoModelForImageTextToText, AutoProcessor

from prunezoo import AutoPruner, PruneInputs, PruneZooError, attach, encode, load_pruner
from prunezoo.core import source
from prunezoo.host.run import run_pruned
from prunezoo.learned.m3 import M3
from prunezoo.training_free.pool import PoolPruner
from trainers.cards.cards import write_card
from trainers.cards.parts import weights_digest
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import load_suite
from trainers.fit import main
from trainers.publishing.package import check
from trainers.training.losses import answer_slots, distillation_kl

ROOT = Path(__file__).parent.parent.parent
SIZES = {"width": 32, "hidden": 16, "heads": 2}
PROMPT = "<s> USER: <image> what color is the ball ? ASSISTANT:"
LORA_FILES = ("adapter_config.json", "adapter_model.safetensors")


def stir(module, std=0.3):
    """Random weights everywhere, as after much training."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)


def made_for(vlm, **config):
    """An M3 with a LoRA for a model, both far from where they start."""
    torch.manual_seed(0)
    pruner = M3(**SIZES, lora_rank=2, lora_alpha=4, **config).eval()
    pruner.lora.fit(vlm)
    stir(pruner)
    return pruner


def edit(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path)


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


def test_saved_in_pefts_own_format(tiny_llava, batch, tmp_path):
    vlm, pruner = tiny_llava.vlm, made_for(tiny_llava.vlm)
    folder = pruner.save_pretrained(tmp_path / "m3")
    assert sorted(p.name for p in (folder / "lora").iterdir()) == sorted(LORA_FILES)
    assert not [name for name in load_file(folder / "model.safetensors") if "lora" in name]
    loaded, encoded = load_pruner(folder), encode(vlm, batch)
    with torch.no_grad():
        output = pruner(encoded.inputs, 4)
        tuned = run_pruned(vlm, encoded, pruner, 4).host.logits
        assert torch.equal(run_pruned(vlm, encoded, loaded, 4).host.logits, tuned)
        # PEFT alone, without this library: the same weights at the same places.
        pruner.lora = None
        theirs = PeftModel.from_pretrained(copy.deepcopy(vlm), folder / "lora").base_model.model.eval()
        assert torch.equal(run_pruned(theirs, encoded, pruner, 4).host.logits, tuned)
    assert torch.equal(loaded(encoded.inputs, 4).features, output.features)


def test_the_hub_is_asked_for_every_file(tiny_llava, tmp_path, monkeypatch):
    folder, asked = made_for(tiny_llava.vlm).save_pretrained(tmp_path / "m3"), set()

    def download(repo, filename, **_options):
        asked.add(filename)
        return str(folder / filename)

    monkeypatch.setattr(source, "hf_hub_download", download)
    assert len(AutoPruner.from_pretrained("org/m3").lora.weights) == 28
    assert asked == {"config.json", "model.safetensors", *(f"lora/{name}" for name in LORA_FILES)}


def test_publishing_takes_the_lora_along(tiny_llava, tmp_path):
    folder = made_for(tiny_llava.vlm).save_pretrained(tmp_path / "m3-lora")
    write_card(folder, record_of(str(folder), weights_digest(folder)))
    files = check(folder, "org/m3-lora").files
    assert {"config.json", "model.safetensors", "README.md", *(f"lora/{name}" for name in LORA_FILES)} <= set(files)
    assert "`lora/adapter_model.safetensors`" in (folder / "README.md").read_text()
    edit(folder / "lora" / LORA_FILES[1], lambda state: next(iter(state.values())).add_(1))
    with pytest.raises(PruneZooError, match="measured with other weights"):
        check(folder, "org/m3-lora")


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


def test_another_model_is_refused(tiny_llava, batch):
    pruner = made_for(tiny_llava.vlm)
    deeper = copy.deepcopy(tiny_llava.vlm)
    deeper.model.language_model.layers.append(copy.deepcopy(deeper.model.language_model.layers[0]))
    with (
        pytest.raises(PruneZooError, match=r"layers.2.*this LoRA has no matrices for it; use the model"),
        pruner.adapt(deeper),
    ):
        pass
    other = copy.deepcopy(tiny_llava.vlm)
    other.model.language_model.layers[1].mlp.up_proj = torch.nn.Linear(32, 48)
    with pytest.raises(PruneZooError, match=r"layers\.1\.mlp\.up_proj.*32 to 64.*32 to 48"), pruner.adapt(other):
        pass
    other.model.language_model.layers[1].mlp.up_proj = torch.nn.Identity()
    with pytest.raises(PruneZooError, match=r"layers\.1\.mlp\.up_proj' is a Identity"):
        run_pruned(other, encode(other, batch), pruner, 4)


def test_a_lora_that_is_not_whole_is_refused(tiny_llava, tmp_path, monkeypatch):
    folder = made_for(tiny_llava.vlm).save_pretrained(tmp_path / "m3")
    weights, config = folder / "lora" / LORA_FILES[1], folder / "lora" / LORA_FILES[0]
    whole, settings = weights.read_bytes(), config.read_text()
    first = next(name for name in load_file(weights) if name.endswith("lora_B.weight"))

    def refused(*words):
        with pytest.raises(PruneZooError) as caught:
            load_pruner(folder)
        assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value
        weights.write_bytes(whole)
        config.write_text(settings)

    edit(weights, lambda s: s.pop(first))
    refused(str(weights), "has lora_A only", "not whole")
    edit(weights, lambda s: s.update({first: torch.zeros(32, 3)}))
    refused(first, "(32, 3)", "rank 2")
    edit(weights, lambda s: s.update({first: torch.full((32, 2), torch.nan)}))
    refused(first, "NaN")
    edit(weights, lambda s: s.update({"surprise": torch.zeros(1)}))
    refused("unexpected tensor 'surprise'")
    weights.write_bytes(b"\x80\x04")
    refused(str(weights), "not a readable safetensors file")
    weights.unlink()
    refused("lora/adapter_model.safetensors is missing")
    config.write_text(json.dumps({**json.loads(settings), "lora_alpha": 5}))
    refused(str(config), "lora_alpha is 5", "4")
    config.write_text(json.dumps({**json.loads(settings), "use_rslora": True}))
    refused(str(config), "use_rslora is True")
    config.write_text("{}")
    refused(str(config), "peft_type")
    monkeypatch.setitem(sys.modules, "peft", None)
    refused("pip install peft")


def test_a_lora_without_weights_is_not_saved(tmp_path):
    with pytest.raises(PruneZooError, match="without weights"):
        M3(**SIZES, lora_rank=2).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["m3-tiny", "m3-lora-tiny"])
def test_what_is_shipped_is_whole_and_runs(name):
    shipped = ROOT / "checkpoints"
    pruner = check(shipped / name, f"org/{name}").module
    vlm = AutoModelForImageTextToText.from_pretrained(shipped / "tiny-llava", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(shipped / "tiny-llava")
    items = list(load_suite("scenes", "validation", 14))
    batch = ConversationCollator(processor, answers=False)(items)
    with attach(vlm, pruner, keep=1 / 9) as run:
        words = vlm.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert run.stats.after == [16] * 14
    answers = processor.batch_decode(words, skip_special_tokens=True)
    right = [answer.strip() == item.turns[-1][1] for answer, item in zip(answers, items, strict=True)]
    assert sum(right) >= 11, answers  # 87 and 91 % of 2100 questions; chance gives 4


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
