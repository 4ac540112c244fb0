"""Combinations: one config, one folder, one budget; in a host each part at its own place."""

import json

import pytest
import torch
from tiny_llava import make_image

from prunezoo import PruneZooError, attach, build_pruner, encode, load_pruner
from prunezoo.host import encode_needs, run_pruned

WIDTH = 32
PPM = {"width": WIDTH, "hidden": 16, "heads": 2, "blocks": 1, "text_blocks": 1}
ATP = {"layers": [2], "width": WIDTH, "hidden": 16}


def make(**changes):
    torch.manual_seed(0)
    config = {"methods": ("ppm", "atp"), "configs": (PPM, ATP), "shares": (1.5, 1.0), **changes}
    return build_pruner("combined", **config).eval()


@pytest.fixture(scope="module")
def batch(deep_llava):
    prompts = ["<s> USER: <image> what color is the ball ? ASSISTANT:", "<s> USER: <image> what ? ASSISTANT:"]
    return deep_llava.batch(prompts, [[make_image(0)], [make_image(1)]])


def test_a_budget_is_dealt_out():
    pruner = make()
    asked = {keep: [share for _, share in pruner.parts(keep)] for keep in (8, 3, 0.25, 0.9, 1.0)}
    assert asked[8] == [12, 8] and asked[3] == [4, 3] and asked[1.0] == [1.0, 1.0]
    # a share is of what the part finds: 0.25 of all, found 0.375 of all
    assert asked[0.25] == pytest.approx([0.375, 0.25 / 0.375]) and asked[0.9] == pytest.approx([1.0, 0.9])
    first, second = (share for _, share in pruner.parts(torch.tensor([8, 3])))
    assert first.tolist() == [12, 4] and second.tolist() == [8, 3]
    with pytest.raises(PruneZooError, match="keep=0"):
        pruner.parts(0)


@pytest.mark.parametrize(("keep", "share"), [(12, 12), (12 / 36, 12)])
def test_each_part_acts_at_its_place_and_the_mean_is_the_budget(deep_llava, batch, keep, share):
    """36 tokens; 18 = 1.5 * 12 enter, and layers 2 and 3 of 4 read 6, so that the mean is 12."""
    vlm, pruner = deep_llava.vlm, make()
    encoded = encode(vlm, batch, encode_needs(pruner))
    with torch.no_grad():
        run = run_pruned(vlm, encoded, pruner, keep)
    assert [(cut.stage, cut.layer, cut.after.tolist()) for cut in run.cuts] == [
        ("prompt", None, [18, 18]),
        ("layer", 2, [6, 6]),
    ]
    assert run.tokens.tolist() == [share, share]
    with attach(vlm, pruner, keep=keep) as attached:
        ids = vlm.generate(**batch, max_new_tokens=3, do_sample=False)
    assert torch.equal(ids[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    assert [stage.after for stage in attached.stats.stages] == [[18, 18], [6, 6]]


def test_it_is_what_its_parts_do_together(deep_llava, batch):
    vlm, pruner = deep_llava.vlm, make()
    parts = [part for part, _ in pruner.parts(1.0)]
    with torch.no_grad():
        with attach(vlm, pruner, keep=12):
            one = vlm(**batch).logits
        with attach(vlm, parts, keep=[18, 12]):
            two = vlm(**batch).logits
        with attach(vlm, parts[0], keep=18):
            first = vlm(**batch).logits
    assert torch.equal(one, two) and (one[:, -1] - first[:, -1]).abs().max() > 1e-3


def test_all_three_stages_together(deep_llava, batch):
    pruner = make(methods=("tome", "ppm", "atp"), configs=({}, PPM, ATP), shares=(2.0, 1.5, 1.0))
    with attach(deep_llava.vlm, pruner, keep=12) as attached:
        deep_llava.vlm.generate(**batch, max_new_tokens=3, do_sample=False)
    assert [(stage.pruner, stage.after) for stage in attached.stats.stages] == [
        ("tome", [24, 24]),
        ("ppm", [18, 18]),
        ("atp", [6, 6]),
    ]


def test_one_folder_holds_all_of_it(tmp_path, deep_llava, batch):
    pruner, vlm = make(), deep_llava.vlm
    folder = pruner.save_pretrained(tmp_path / "both")
    stored = json.loads((folder / "config.json").read_text())
    assert stored["config"]["methods"] == ["ppm", "atp"] and stored["config"]["configs"][1]["layers"] == [2]
    loaded = load_pruner(folder)
    assert loaded.config == pruner.config and not loaded.training
    prefixes = {name.split(".")[1] for name in loaded.state_dict()}
    assert prefixes == {"ppm", "atp"}
    with torch.no_grad(), attach(vlm, pruner, keep=0.3):
        one = vlm(**batch).logits
    with torch.no_grad(), attach(vlm, folder, keep=0.3):
        two = vlm(**batch).logits
    assert torch.equal(one, two)


def test_what_is_saved_does_not_hang_on_defaults(tmp_path):
    stored = json.loads((make().save_pretrained(tmp_path) / "config.json").read_text())["config"]["configs"]
    assert stored[0]["octaves"] == 5 and stored[1]["taper"] == 0.5


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"shares": (1.0,)}, "shares"),
        ({"shares": (1.0, 0.0)}, "shares"),
        ({"methods": ("ppm", "ppm")}, "different"),
        ({"methods": ("ppm",), "configs": (PPM,), "shares": (1.0,)}, "two or more"),
        ({"methods": ("atp", "ppm"), "configs": (ATP, PPM)}, "vision then prompt then layer"),
        ({"methods": ("uniform", "ppm"), "configs": ({}, PPM)}, r"uniform \(prompt\), ppm \(prompt\)"),
        ({"configs": ({**PPM, "hiden": 3}, ATP)}, "combined: ppm: unknown config key 'hiden'"),
        ({"methods": ("ppm", "apt")}, "apt"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_that_names_it(wrong, named):
    with pytest.raises(PruneZooError, match=named):
        make(**wrong)
