"""Every method that acts at several blocks or layers takes a schedule, without a line of its own."""

from dataclasses import dataclass

import pytest
import torch
from layer_oracle import Watch
from made_inputs import ALL, build

from prunezoo import PrunerConfig, PruneZooError, attach, encode, load_pruner
from prunezoo.core.registry import pruner_class, register_pruner
from prunezoo.core.schedule import Schedule
from prunezoo.host import encode_needs, run_pruned
from prunezoo.host.families import find_family

BLOCKS, LAYERS = 2, 4
SCHEDULES = {
    "vision": Schedule("vision", 36, (29, 7), "test"),
    "layer": Schedule("layer", 36, (33, 29, 15, 7), "test"),
}


def takes(name):
    pruner = build(name)
    return pruner.stage in SCHEDULES and pruner.exact and not pruner.comes_back


def places(name):
    pruner = build(name)
    return pruner.stages(BLOCKS if pruner.stage == "vision" else LAYERS)


TAKING = [name for name in ALL if takes(name)]
SEVERAL = [name for name in TAKING if len(places(name)) > 1]


def test_there_are_some_of_both_stages():
    assert {"tome", "gtp", "pyramiddrop", "sparsevlm"} <= set(SEVERAL)


def test_a_pace_of_its_own_gives_way():
    """FlowCut decides in each block how many leave it, by what it sees; under a schedule it asks nothing."""
    pruner, keep = build("flowcut"), torch.tensor([7])
    pruner.given_schedule = SCHEDULES["vision"]
    assert pruner.step(None, keep, 3) is keep


@pytest.mark.parametrize("name", SEVERAL)
@torch.no_grad()
def test_each_stage_leaves_what_the_schedule_says(name, deep_llava, mixed, tmp_path):
    vlm, pruner = deep_llava.vlm, build(name)
    depths = find_family(vlm).tower().depth, find_family(vlm).decoder().depth
    assert depths == (BLOCKS, LAYERS)
    schedule = SCHEDULES[pruner.stage]
    pruner.given_schedule = schedule
    for tested in (pruner, load_pruner(pruner.save_pretrained(tmp_path))):
        assert tested.given_schedule == schedule
        with Watch(tested) as watch:
            run_pruned(vlm, encode(vlm, mixed, encode_needs(tested)), tested, 5)
        wanted = [
            int(s) for s in schedule.at(places(name), torch.tensor([5]), torch.tensor([36]), len(schedule.counts))
        ]
        assert wanted[-1] == 5 and wanted[0] != wanted[-1]
        assert [set(output.counts) for _, output in watch.calls] == [{count} for count in wanted]


@pytest.mark.parametrize("name", sorted(set(ALL) - set(TAKING)))
def test_others_refuse_one(name):
    pruner = build(name)
    with pytest.raises(PruneZooError, match=f"'{name}' takes no schedule"):
        pruner.given_schedule = SCHEDULES["vision"]
    assert "schedule" not in pruner.settings()


def test_what_does_not_fit_is_refused_before_anything_runs(deep_llava, tmp_path):
    vlm = deep_llava.vlm
    with pytest.raises(PruneZooError, match="of the layer stage is not for 'tome'"):
        build("tome").given_schedule = SCHEDULES["layer"]
    for name, schedule in (("tome", Schedule("vision", 36, (9, 8, 7))), ("pyramiddrop", Schedule("layer", 9, (9, 2)))):
        path = schedule.save(tmp_path / f"{name}.json")
        with pytest.raises(PruneZooError, match=r"does not fit \d: make one for this model"):
            attach(vlm, f"{name}?schedule={path}", keep=5)
    path = SCHEDULES["layer"].save(tmp_path / "fastv.json")
    with pytest.raises(PruneZooError, match="this one acts at one"):
        attach(vlm, f"fastv?schedule={path}", keep=5)


def test_the_word_is_not_free_for_options():
    @dataclass(frozen=True)
    class Config(PrunerConfig):
        schedule: str = ""

    with pytest.raises(PruneZooError, match="'schedule' is taken"):
        register_pruner("scheduled")(type("Scheduled", (pruner_class("tome"),), {"config_class": Config}))
