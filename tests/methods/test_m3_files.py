"""M3 on the disk and on the Hub: the LoRA in PEFT's own format, whole or refused, and only for its own model."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from m3_lora import LORA_FILES, PROMPT, SIZES, made_for
from peft import PeftModel
from records import record_of
from safetensors.torch import load_file, save_file
from tiny_llava import make_image
from transformers import AutoModelForImageTextToText, AutoProcessor

from prunezoo import AutoPruner, PruneZooError, attach, encode, load_pruner
from prunezoo.core import source
from prunezoo.host.run import run_pruned
from prunezoo.learned.m3 import M3
from trainers.cards.cards import write_card
from trainers.cards.parts import weights_digest
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import load_suite
from trainers.publishing.package import check

ROOT = Path(__file__).parent.parent.parent


def edit(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.fixture
def batch(tiny_llava):
    return tiny_llava.batch([PROMPT, PROMPT], [[make_image(0)], [make_image(1)]])


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
    with pytest.raises(PruneZooError, match="is of another save"):
        check(folder, "org/m3-lora")


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
