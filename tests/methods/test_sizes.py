"""Sizes that suit the frozen model: what a pruner's work is, and what a share of the prefill buys."""

import json
from dataclasses import fields

import pytest
import torch
from tiny_llava import make_llava

from prunezoo import PruneZooError, build_pruner, load_pruner
from prunezoo.core.contract import PruneInputs
from prunezoo.core.prefill import Prefill
from prunezoo.core.registry import pruner_class
from trainers.benchmarking.flops import counted_flops, request_work
from trainers.benchmarking.models import SIZES, random_llava

WIDTH = 64
KIN = {"ppm": {}, "policy": {}, "tail_drop": {"latents": 8, "rebuild": 0.0}}


@pytest.fixture(scope="module")
def vlm():
    """Of the make of `random:llava-120m`, on the device that computes nothing."""
    return random_llava(SIZES["llava-120m"], "meta", torch.float32)


def made_up(prefill, width):
    n, t = prefill.tokens, prefill.words
    cells = torch.stack([torch.zeros(n), torch.arange(n) // 8, torch.arange(n) % 8], -1).long()[None]
    valid, real = torch.ones(1, n, dtype=torch.bool), torch.ones(1, t, dtype=torch.bool)
    return PruneInputs(torch.randn(1, n, width), valid, cells, torch.randn(1, t, width), real)


@pytest.mark.parametrize("query_aware", [True, False])
@pytest.mark.parametrize("name", KIN)
def test_operations_are_those_that_torch_counts(name, query_aware):
    prefill = Prefill(tokens=48, words=7, flops=0)
    sizes = {"width": WIDTH, "hidden": 32, "heads": 4, "blocks": 3, "text_blocks": 2, "query_aware": query_aware}
    pruner = build_pruner(name, **sizes, **KIN[name]).eval()
    with torch.no_grad():
        _, counted = counted_flops(lambda: pruner(made_up(prefill, WIDTH), prefill.kept))
    assert pruner.config.flops(prefill) == counted


def test_a_prefill_is_that_of_the_benchmark(vlm):
    prefill = Prefill.of(vlm.config)
    assert (prefill.tokens, prefill.kept) == (576, 64)
    lengths = [prefill.tokens + prefill.words] * 15
    assert prefill.flops == request_work(vlm.config.get_text_config(), lengths, 1, 1, 0).prefill


@pytest.mark.parametrize("name", KIN)
@pytest.mark.parametrize("share", [None, 0.005, 0.02, 0.2])
def test_a_share_of_the_prefill_buys_the_sizes(name, share, vlm):
    given = {} if share is None else {"budget_flops": share}
    config = build_pruner(name, vlm, **given).config
    prefill, most = Prefill.of(vlm.config), share or 0.01
    cost = config.flops(prefill) / prefill.flops
    assert config.width == 768 and config.budget_flops is None and config.blocks == (4 if config.hidden >= 256 else 2)
    assert cost <= most
    more = config.hidden + 2 * config.heads
    wider = type(config)(width=768, hidden=more, blocks=4 if more >= 256 else 2)
    assert config.hidden == 768 or wider.flops(prefill) / prefill.flops > most, "the largest that it buys"


def test_sizes_that_are_given_win_and_sizes_left_open_without_a_model_are_those_of_the_large_recipe(vlm):
    for given, expected in (
        ({"hidden": 48}, (48, 4)),
        ({"blocks": 1}, (512, 1)),
        ({"hidden": 48, "blocks": 1}, (48, 1)),
    ):
        config = build_pruner("ppm", vlm, **given).config
        assert (config.hidden, config.blocks) == expected
    alone = build_pruner("ppm", width=32, budget_flops=0.02)
    assert (alone.config.hidden, alone.config.blocks) == (512, 4) and alone.open_config.budget_flops == 0.02


def test_what_is_saved_says_the_sizes(tmp_path):
    pruner = build_pruner("ppm", make_llava(num_hidden_layers=4), budget_flops=0.5)
    pruner.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["config"]
    assert stored["hidden"] == pruner.config.hidden and stored["hidden"] < 512 and stored["budget_flops"] is None
    again = load_pruner(tmp_path)
    assert again.config == pruner.config == again.open_config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in pruner.state_dict().items())


@pytest.mark.parametrize(
    ("name", "config", "parts"),
    [
        ("budget", {"inner": "ppm"}, ("inner_config", "reader_config")),
        ("aptp", {}, ("inner_config",)),
        ("combined", {"methods": ("ppm", "atp"), "configs": ({}, {}), "shares": (1.5, 1.0)}, ("configs",)),
    ],
)
def test_parts_of_others_are_sized_too(name, config, parts, vlm):
    own = pruner_class("ppm").config_class
    alone = build_pruner("ppm", vlm).config.to_dict()
    for model, expected in ((vlm, alone), (None, {**alone, "width": 4096, "hidden": 512, "blocks": 4})):
        built = build_pruner(name, model, **config).config
        for part in parts:
            values = getattr(built, part)
            assert (values[0] if part == "configs" else values) == expected
    assert {field.name for field in fields(own)} == set(alone)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"budget_flops": 0.02, "hidden": 64}, "budget_flops chooses hidden and blocks"),
        ({"budget_flops": 0.02, "blocks": 2}, "budget_flops chooses hidden and blocks"),
        ({"budget_flops": 0.0}, "above 0"),
        ({"budget_flops": 1.5}, "up to 1"),
        ({"budget_flops": 1e-5}, "budget_flops=1e-05 buys nothing: the smallest, hidden=16"),
        ({"hidden": -16}, "hidden must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused(config, message, vlm):
    with pytest.raises(PruneZooError, match=message):
        build_pruner("ppm", vlm, **config)
