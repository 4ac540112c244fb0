"""A save that is killed leaves the old folder, the new one, or one that is refused: never parts of both."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from tiny_llava import make_llava

from prunezoo import PruneZooError, build_pruner, load_pruner
from prunezoo.core.base_model import BaseModel

ROOT = Path(__file__).parent.parent.parent


def save(folder, value, moves):
    """In a process of its own, which is killed after so many files have taken their place."""
    child = multiprocessing.get_context("fork").Process(target=killed, args=(folder, value, moves))
    child.start()
    child.join(60)
    return child.exitcode


def killed(folder, value, moves):
    """Save, with a kill instead of the next move."""
    replace, made = Path.replace, []

    def move(self, target):
        if len(made) == moves:
            os.kill(os.getpid(), signal.SIGKILL)
        made.append(target)
        return replace(self, target)

    Path.replace = move
    whole(folder, value)


def whole(folder, value):
    """To its end."""
    pruner = build_pruner("m3", width=32, hidden=16, heads=2, blocks=1, lora_rank=2)
    name = "model.language_model.layers.0.self_attn.q_proj"
    pruner.lora._add(name, torch.ones(2, 32), torch.ones(32, 2))
    with torch.no_grad():
        for parameter in pruner.parameters():
            parameter.fill_(value)
    pruner.save_pretrained(folder)


def strip(folder):
    """As it was saved before there were digests."""
    stored = json.loads((folder / "config.json").read_text())
    del stored["sha256"]
    (folder / "config.json").write_text(json.dumps(stored))


def test_killed_between_two_moves(tmp_path):
    folder = tmp_path / "m3"
    for moves, words in enumerate(["", "lora/adapter_config.json|", "lora/adapter_model", "is of another save"]):
        whole(folder, 1)
        assert save(folder, 2, moves) == -9
        assert list(folder.glob(".saving-*"))
        if moves < 2:  # nothing that matters was changed: the adapter's config is the same
            assert {float(p.mean()) for p in load_pruner(folder).parameters()} == {1.0}
        else:
            with pytest.raises(PruneZooError, match=words):
                load_pruner(folder)
        whole(folder, 3)
        assert not list(folder.glob(".saving-*"))
        assert {float(p.mean()) for p in load_pruner(folder).parameters()} == {3.0}


def test_new_weights_beside_a_config_from_before_there_were_digests(tmp_path):
    old = build_pruner("ppm", width=32, hidden=16, heads=2, blocks=1, text_blocks=1)
    folder, other = old.save_pretrained(tmp_path / "a"), old.save_pretrained(tmp_path / "b")
    strip(folder)
    (other / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(PruneZooError, match=r"config\.json: model\.safetensors is of another save"):
        load_pruner(folder)


WITH_DIGESTS = {
    *("patch-classifier", "patch-gaps-tiny", "fast3d-tiny", "region-focus-tiny", "a-clip-tiny", "token-routing-tiny"),
    *("hourglass-tiny", "ppm-pages", "ppm-light-tiny", "dtop-tiny", "diffrate-tiny", "stvit-tiny", "policy-pages"),
    *("one-d-piece-tiny", "budget-pages", "budget-ppm-tiny"),
}
"""Saved since there are any; both kinds ship, and both must load."""


@pytest.mark.parametrize(
    "folder", sorted(p.parent for p in (ROOT / "checkpoints").glob("*/run.json")), ids=lambda p: p.name
)
def test_what_ships_loads_with_digests_and_from_before_there_were_any(folder):
    from prunezoo import OneDPiece

    noted = "sha256" in json.loads((folder / "config.json").read_text())
    assert noted == (folder.name in WITH_DIGESTS)
    assert (OneDPiece.from_pretrained if "one-d" in folder.name else load_pruner)(folder) is not None


def test_another_process_is_not_swept(tmp_path):
    pruner = build_pruner("ppm", width=32, hidden=16, heads=2, blocks=1, text_blocks=1)
    alive = tmp_path / f".saving-{os.getppid()}-x"
    alive.mkdir()
    pruner.save_pretrained(tmp_path)
    assert alive.is_dir()


@pytest.mark.parametrize("value", [[], "x", {"model.safetensors": 1}, {}])
def test_a_digest_that_is_none(tmp_path, value):
    folder = build_pruner("ppm", width=32, hidden=16, heads=2, blocks=1, text_blocks=1).save_pretrained(tmp_path)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, "sha256": value}))
    with pytest.raises(PruneZooError, match=r"config\.json: "):
        load_pruner(folder)


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("org/llava", "org/llava"),
        ("checkpoints/tiny-llava", "checkpoints/tiny-llava"),
        ("/home/me/secret/llava", "llava"),
        ("../secret/llava", "llava"),
        ("./llava/", "llava"),
        ("~/secret/llava", "llava"),
        ("me/secret/llava", "llava"),
        ("C:\\me\\secret\\llava", "llava"),
    ],
)
def test_where_a_model_lay_is_not_saved(name, public):
    vlm = make_llava()
    vlm.name_or_path = name
    assert BaseModel.describe(vlm).name == public
