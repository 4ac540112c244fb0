"""`pruner.push_to_hub`: what is whole, in one commit, into a repository of the same method, and never a stale card."""

import pytest
import torch
from hub_server import Failure
from records import SIZES, publish_it

from prunezoo import AutoPruner, OneDPiece
from prunezoo.core.base_model import BaseModel
from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import build_pruner


def ppm(seed=0):
    torch.manual_seed(seed)
    return build_pruner("ppm", **SIZES)


def test_what_is_pushed_is_what_is_loaded(hub):
    pruner = ppm()
    pruner.base_model = BaseModel("org/llava", "llava", 32, 2, "clip_vision_model", 16)
    first = pruner.push_to_hub("org/mine", private=True)
    assert (first.address, first.tag, first.is_new) == (f"{hub.endpoint}/org/mine", "v1", True)
    sent = hub.repos["org/mine"].commits[-1]
    assert sent.files.keys() - {".gitattributes"} == {"config.json", "model.safetensors", "README.md"}
    card = sent.files["README.md"].decode()
    assert "Nothing was measured" in card and 'base_model: "org/llava"' in card
    assert 'AutoPruner.from_pretrained("org/mine")' in card and hub.repos["org/mine"].private
    again = AutoPruner.from_pretrained("org/mine")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in pruner.state_dict().items())

    assert pruner.push_to_hub("org/mine").is_new is False
    second = ppm(1)
    second.base_model = pruner.base_model
    assert second.push_to_hub("org/mine").tag == "v2"
    assert "README.md" not in hub.repos["org/mine"].commits[-1].files or (
        hub.repos["org/mine"].commits[-1].files["README.md"] == sent.files["README.md"]
    )


def test_a_card_of_other_weights_is_left_alone(published, hub, capsys):
    publish_it(published, capsys)
    commits = len(hub.repos["org/ppm-test"].commits)
    with pytest.raises(PruneZooError, match="org/ppm-test: its card says what was measured of other weights"):
        ppm(5).push_to_hub("org/ppm-test")
    assert len(hub.repos["org/ppm-test"].commits) == commits
    assert AutoPruner.from_pretrained(published).push_to_hub("org/ppm-test").is_new is False


def test_what_is_refused(hub):
    for name, message in (("mine", "write ORG/NAME"), ("org/na me", "is no Hub id")):
        with pytest.raises(PruneZooError, match=message):
            ppm().push_to_hub(name)
    pruner = ppm()
    pruner.base_model = BaseModel("/home/me/llava", "llava", 32, 2, "clip_vision_model", 16)
    with pytest.raises(PruneZooError, match=r"'ppm': base_model\.name '/home/me/llava' is a folder of a machine"):
        pruner.push_to_hub("org/mine")
    pruner = ppm()
    with torch.no_grad():
        next(pruner.parameters()).fill_(float("nan"))
    with pytest.raises(PruneZooError, match="holds NaN"):
        pruner.push_to_hub("org/mine")
    build_pruner("divprune").push_to_hub("org/other")
    with pytest.raises(PruneZooError, match="org/other is taken: it holds the method 'divprune'"):
        ppm().push_to_hub("org/other")
    assert "org/mine" not in hub.repos


def test_a_hub_that_fails_is_asked_again(hub):
    hub.failures.append(Failure("/commit/", 503))
    assert ppm().push_to_hub("org/mine").tag == "v1"
    assert hasattr(OneDPiece, "push_to_hub")
