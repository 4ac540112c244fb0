"""Calls and caches under an attached pruner that gave wrong answers without a word."""

import copy
import logging
import pickle

import numpy as np
import pytest
import torch
from m3_lora import made_for
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tiny_llava import LONG, make_image, make_llava
from transformers import DynamicCache, QuantizedCache
from transformers.cache_utils import QuantizedLayer

from prunezoo import PruneZooError, attach
from prunezoo.core.budgets import budget

NEXT = " red </s> USER: is the box left ? ASSISTANT:"
OPTIONS = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture
def batch(deep_llava):
    return deep_llava.batch([LONG], [[make_image(0)]])


def turn(deep_llava, first):
    ids = torch.cat([first.sequences, deep_llava.batch([NEXT], [[]])["input_ids"]], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name", ["uniform", "m3"])
def test_a_kept_generate_raises_after_the_block(name, deep_llava, batch):
    vlm = deep_llava.vlm
    pruner = made_for(vlm) if name == "m3" else name
    bare = vlm.generate(**batch, max_new_tokens=3)
    with attach(vlm, pruner, keep=4):
        kept = vlm.generate
    with pytest.raises(PruneZooError, match="block that has been left"):
        kept(**batch, max_new_tokens=3)
    with attach(vlm, "uniform", keep=9), pytest.raises(PruneZooError, match="block that has been left"):
        kept(**batch, max_new_tokens=3)
    assert torch.equal(vlm.generate(**batch, max_new_tokens=3), bare)


@pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
def test_virtual_tokens_of_peft_are_refused(config, batch):
    options = {"encoder_hidden_size": 32} if config is PromptEncoderConfig else {}
    peft = get_peft_model(make_llava(), config(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)).eval()
    with pytest.raises(PruneZooError, match="virtual tokens"):
        attach(peft, "uniform", keep=16)
    with attach(peft.get_base_model(), "uniform", keep=16):  # and called from outside all the same
        for call in (peft, lambda **inputs: peft.generate(**inputs, max_new_tokens=2)):
            with pytest.raises(PruneZooError, match=r"virtual tokens|input_ids|filled cache"):
                call(**batch)


@pytest.mark.parametrize("keep", [4, 33])
@pytest.mark.parametrize("again", ["tensors", "pickle"])
def test_a_cache_without_its_note_is_refused(keep, again, deep_llava, batch):
    """With 33 of 36 left none of the ids that the loop would read are placeholders."""
    vlm = deep_llava.vlm
    with attach(vlm, "uniform", keep=keep):
        first = vlm.generate(**batch, **OPTIONS)
        second, cache = turn(deep_llava, first), first.past_key_values
        expected = vlm.generate(**second, past_key_values=copy.deepcopy(cache), **OPTIONS).logits[0]
        if again == "pickle":  # its note goes with it
            kept = pickle.loads(pickle.dumps(cache))
            assert torch.equal(vlm.generate(**second, past_key_values=kept, **OPTIONS).logits[0], expected)
            return
        lost = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
        with pytest.raises(PruneZooError, match="does not say how the images"):
            vlm.generate(**second, past_key_values=lost, **OPTIONS)
        with pytest.raises(PruneZooError, match="does not say how the images"):
            vlm(second["input_ids"][:, -3:], past_key_values=lost, attention_mask=second["attention_mask"])


def test_a_cache_of_a_whole_prompt_goes_on(deep_llava, batch):
    vlm = deep_llava.vlm
    first = vlm.generate(**batch, **OPTIONS)
    expected = vlm.generate(**turn(deep_llava, first), past_key_values=first.past_key_values, **OPTIONS).logits[0]
    with attach(vlm, "uniform", keep=1.0):
        first = vlm.generate(**batch, **OPTIONS)
        again = vlm.generate(**turn(deep_llava, first), past_key_values=first.past_key_values, **OPTIONS).logits[0]
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


class Rounded(QuantizedLayer):
    """As quanto's, with sixteen bits: keys of a prompt are packed, those of the last few tokens are not."""

    def _quantize(self, tensor, axis):
        return tensor.double()

    def _dequantize(self, q_tensor):
        return q_tensor.float()


@pytest.mark.parametrize("pruner", ["uniform", "fastv"])
@pytest.mark.parametrize("kind", ["fp8", "quanto-like"])
def test_quantised_caches_go_on(pruner, kind, deep_llava, batch):
    vlm, config = deep_llava.vlm, deep_llava.vlm.config

    def empty():
        cache = QuantizedCache("fp8", config)
        if kind != "fp8":
            cache.layers = [Rounded() for _ in cache.layers]
        return cache

    with attach(vlm, pruner, keep=9) as run:
        first = vlm.generate(**batch, **OPTIONS)
        plain = vlm.generate(**turn(deep_llava, first), past_key_values=first.past_key_values, **OPTIONS)
        assert run.stats.kv_bytes_saved > 0
        run.stats.reset()
        packed = vlm.generate(**batch, past_key_values=empty(), **OPTIONS)
        assert run.stats.kv_bytes_saved is None and "unknown bytes" in str(run.stats)
        ids = {**turn(deep_llava, first), "past_key_values": packed.past_key_values}
        error = (vlm.generate(**ids, **OPTIONS).logits[0] - plain.logits[0]).abs().max()
    assert error < (1.0 if kind == "fp8" else 1e-4)


@pytest.mark.parametrize("name", ["uniform", "fastervlm", "fastv", "divprune", "m3"])
def test_an_offloaded_model(name, deep_llava, batch):
    accelerate = pytest.importorskip("accelerate")
    vlm = make_llava(num_hidden_layers=4)
    pruner = made_for(vlm) if name == "m3" else name
    with attach(vlm, pruner, keep=9):
        expected, written = vlm(**batch).logits, vlm.generate(**batch, max_new_tokens=3)
    weights = {key: value.clone() for key, value in pruner.state_dict().items()} if name == "m3" else {}
    accelerate.cpu_offload(vlm, execution_device=torch.device("cpu"))
    assert vlm.device.type == "meta"
    with attach(vlm, pruner, keep=9):
        assert torch.equal(vlm(**batch).logits, expected)
        assert torch.equal(vlm.generate(**batch, max_new_tokens=3), written)
    assert all(torch.equal(value, pruner.state_dict()[key]) for key, value in weights.items())


@pytest.mark.parametrize("keep", [np.int64(4), "4", "1/9", np.float32(1 / 9), " 1 / 9 "])
def test_budgets_as_commands_and_numpy_write_them(keep, deep_llava, batch):
    with attach(deep_llava.vlm, "uniform", keep=keep) as run:
        deep_llava.vlm(**batch)
        assert run.stats.after == [4]


@pytest.mark.parametrize("keep", ["4/0", "none", "0", "10/9", "-1/9", np.float64("nan"), None, "9" * 5000])
def test_what_is_no_budget_is_refused(keep, deep_llava):
    with pytest.raises(PruneZooError, match="keep") as error:
        attach(deep_llava.vlm, "uniform", keep=keep)
    assert len(str(error.value).splitlines()) == 1


def test_a_budget_without_bounds_is_all(deep_llava, batch):
    assert budget(10**24, torch.tensor([3, 5])).tolist() == [3, 5]
    bare = deep_llava.vlm(**batch).logits
    with attach(deep_llava.vlm, "uniform", keep=10**24):
        assert torch.equal(deep_llava.vlm(**batch).logits, bare)


@pytest.mark.parametrize("pruner", ["uniform", "fastv"])
def test_a_budget_by_call(pruner, deep_llava, batch):
    vlm = deep_llava.vlm
    with attach(vlm, pruner, keep=4) as run:
        vlm(**batch)
        run.keep = "1/2"
        vlm(**batch)
        assert run.stats.after == [4, 18] and run.keep == 0.5
        for wrong in (0, "x", [4, 5]):
            with pytest.raises(PruneZooError, match="keep"):
                run.keep = wrong
        assert run.keep == 0.5
        run.stats.reset()
        assert run.stats.after == run.stats.tokens == [] and run.stats.kv_bytes_saved == 0


def test_attached_without_a_block(deep_llava, batch):
    vlm, bare = deep_llava.vlm, deep_llava.vlm(**batch).logits
    attached = attach(vlm, "uniform", keep=4)
    attached.enable()
    assert vlm(**batch).logits.shape[1] < bare.shape[1]
    attached.disable()
    attached.disable()
    assert torch.equal(vlm(**batch).logits, bare) and attached.stats.after == [4]


def test_what_changes_nothing_says_so(deep_llava, caplog):
    with caplog.at_level(logging.WARNING):
        attach(deep_llava.vlm, "uniform", keep=4)
    assert "attach(...) changed nothing" in caplog.text


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_ways_of_generating_that_pass_by_are_refused(name, deep_llava, batch, monkeypatch):
    # what is reached in spite of the refusal fails at once, where the real one would wait for requests for ever
    monkeypatch.setattr(type(deep_llava.vlm), name, lambda *_, **__: pytest.fail(f"{name} ran unpruned"))
    with attach(deep_llava.vlm, "uniform", keep=4), pytest.raises(PruneZooError, match="cannot be pruned"):
        getattr(deep_llava.vlm, name)(batch["input_ids"].tolist())
    assert name not in vars(deep_llava.vlm)


@pytest.mark.parametrize("pruner", ["uniform", "fastv"])
def test_an_attached_model_is_not_copied(pruner, deep_llava, tmp_path):
    vlm = deep_llava.vlm
    with attach(vlm, pruner, keep=4):
        for copied in (copy.deepcopy, pickle.dumps, lambda model: torch.save(model, tmp_path / "model.pt")):
            with pytest.raises(PruneZooError, match="cannot be copied or pickled"):
                copied(vlm)
        if pruner == "fastv":
            with pytest.raises(PruneZooError, match="cannot be copied or pickled"):
                copy.deepcopy(vlm.model.language_model)
    assert copy.deepcopy(vlm) is not vlm
