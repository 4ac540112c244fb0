"""Saving and loading: strict, atomic, safetensors only; each refusal names the file, the key and the remedy."""

import json
import re
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from prunezoo import AutoPruner, Pruner, PrunerConfig, PruneZooError, load_pruner, register_pruner
from prunezoo.core import registry
from prunezoo.training_free.fastervlm import FasterVLM


@pytest.fixture(autouse=True)
def sample_method(monkeypatch):
    """A method with weights that belongs to these tests alone."""
    registry.list_pruners()
    monkeypatch.setattr(registry, "_PRUNERS", dict(registry._PRUNERS))

    from dataclasses import dataclass

    @dataclass(frozen=True)
    class LinearConfig(PrunerConfig):
        width: int = 4  # of the tokens
        sizes: tuple[int, ...] = (1, 2)  # a tuple survives JSON

    @register_pruner("sample_linear")
    class SampleLinear(Pruner):
        """A linear score."""

        config_class = LinearConfig

        def __init__(self, config=None, **overrides):
            super().__init__(config, **overrides)
            self.head = nn.Linear(self.config.width, 1)

        def score(self, inputs):
            return self.head(inputs.features)[..., 0]

    return SampleLinear


@pytest.fixture
def folder(sample_method, tmp_path):
    return sample_method(width=6).save_pretrained(tmp_path / "saved")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def refused(folder, *words):
    with pytest.raises(PruneZooError) as caught:
        load_pruner(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_files_and_types(folder, sample_method):
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    stored = json.loads((folder / "config.json").read_text())
    assert stored["method"] == "sample_linear" and stored["dtype"] == "float32"
    assert stored["config"] == {"width": 6, "sizes": [1, 2]} and stored["prunezoo_version"]
    assert AutoPruner.from_pretrained(folder).config == sample_method(width=6).config
    half = sample_method().bfloat16().save_pretrained(folder)
    assert load_pruner(half).head.weight.dtype == torch.bfloat16


def test_all_files_may_be_read_by_whom_the_system_lets(folder):
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_weights_that_do_not_fit_are_refused(folder):
    edit_weights(folder, lambda s: s.pop("head.bias"))
    refused(folder, "model.safetensors", "'head.bias' is missing")
    edit_weights(folder, lambda s: s.update({"head.bias": torch.zeros(1), "tail.bias": torch.zeros(1)}))
    refused(folder, "model.safetensors", "unexpected tensor 'tail.bias'")
    edit_weights(folder, lambda s: (s.pop("tail.bias"), s.update({"head.bias": torch.zeros(2)})))
    refused(folder, "'head.bias' has shape (2,)", "(1,)")
    edit_weights(folder, lambda s: s.update({"head.bias": torch.full((1,), torch.nan)}))
    refused(folder, "'head.bias' holds NaN")
    (folder / "model.safetensors").write_bytes(b"\x80\x04 not a tensor file")
    refused(folder, "model.safetensors", "not a readable safetensors file")
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors is missing")


def test_configs_that_do_not_fit_are_refused(folder):
    edit_config(folder, config={"widht": 6})
    refused(folder, "config.json", "'widht'", "did you mean 'width'?")
    edit_config(folder, config=[6])
    refused(folder, "config.json", "'config'")
    edit_config(folder, config={"width": 6}, extra=1)
    refused(folder, "config.json", "unknown key 'extra'")
    (folder / "config.json").write_text('{"method": "sample_linear"}')
    refused(folder, "config.json", "'config' is missing")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json", "not readable JSON")
    (folder / "config.json").unlink()
    refused(folder, "config.json is missing")


def test_another_method_is_refused(folder):
    with pytest.raises(PruneZooError, match="method is 'sample_linear', not 'fastervlm'; use AutoPruner"):
        FasterVLM.from_pretrained(folder)
    edit_config(folder, method="unheard_of")
    refused(folder, "unknown pruner 'unheard_of'")
    edit_config(folder, method="sample_linear", dtype="int3")
    refused(folder, "unknown dtype 'int3'")


def test_names_that_are_nothing(tmp_path):
    refused("no such thing", "'no such thing' is neither a known pruner, nor a folder, nor a Hub id")
    with pytest.raises(PruneZooError, match="neither"):
        load_pruner(tmp_path / "absent")
    assert load_pruner("fastervlm").name == "fastervlm"
    refused("sample_linear", "'sample_linear' is a learned method")


def test_a_full_disk_leaves_the_old_checkpoint_whole(folder, sample_method):
    """The kernel itself refuses the bytes: a limit on file size stands in for the end of the disk."""
    (folder / "README.md").write_text("the card")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    old_action = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(PruneZooError, match=f"cannot save to {re.escape(str(folder))}.*free space"):
            sample_method(width=100_000).save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old_action)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert load_pruner(folder).config.width == 6


def test_nan_weights_are_not_saved(folder, sample_method):
    pruner = sample_method()
    pruner.head.bias.data.fill_(torch.nan)
    with pytest.raises(PruneZooError, match=r"'head\.bias'.*NaN"):
        pruner.save_pretrained(folder)
    assert load_pruner(folder).config.width == 6
