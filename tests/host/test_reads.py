"""The hot path asks the device for nothing that shapes and ids have told: a read makes the host wait for all before."""

import pytest
import torch
from made_inputs import build
from reads import counted_reads
from tiny_llava import LONG, SHORT, make_image

from prunezoo import PruneZooError, attach
from prunezoo.core.contract import Pruner
from prunezoo.core.registry import list_pruners, pruner_class
from prunezoo.core.signals import parse_signal

MORE = 2
"""Reads that an attached prefill has beyond those of the bare model: ids with mask, and one flag of all checks."""
IN_FRONT = 4
"""And in front of the tower: what was chosen, the ids twice more, and its pictures, before anything is computed."""
READ_BY_NATURE = {
    "vidcom2": "deals the budget out over frames on the host",
    "random_input": "draws by what is in the picture, on the host",
    "random": "draws by what is in the picture, on the host",
    "atp": "decides itself how many tokens it keeps",
    "budget": "decides itself how many tokens it keeps",
    "changed": "holds of each image what it kept, and asks whose it is",
}


@pytest.fixture(scope="module")
def batch(deep_llava):
    return deep_llava.batch([LONG, SHORT, LONG], [[make_image(0)], [make_image(1)], [make_image(2)]])


def reads_of(vlm, batch, call):
    with torch.no_grad(), counted_reads() as seen:
        if call == "forward":
            vlm(**batch)
        else:
            vlm.generate(**batch, max_new_tokens=1)
    return seen


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize(
    "name", [name for name in list_pruners() if name not in READ_BY_NATURE and pruner_class(name).exact]
)
def test_an_attached_prefill_waits_twice_more(name, call, deep_llava, batch):
    vlm = deep_llava.vlm
    pruner, bare = build(name, vlm=vlm), reads_of(vlm, batch, call)
    looks = any(not parse_signal(signal).is_vision for signal in pruner.needs) and pruner.stage == "prompt"
    with attach(vlm, pruner, keep=9) as run:
        run.memory.streams = "abc"  # for who remembers
        reads_of(vlm, batch, call)  # layouts of grids are worked out once
        pruned = reads_of(vlm, batch, call)
    # a signal of the language model runs layers of it, which read what they read
    more = MORE + IN_FRONT * (pruner.stage == "input")
    assert pruned.total() <= bare.total() * (1 + looks) + more, pruned - bare


class Spoilt(Pruner):
    name = "spoilt"

    def score(self, inputs):
        return inputs.features.sum(-1) * torch.nan


@pytest.mark.parametrize("stage", ["prompt", "layer"])
def test_what_is_wrong_is_told_when_the_prompt_has_been_read(stage, deep_llava, batch):
    vlm = deep_llava.vlm
    where = {"stage": stage, "stages": lambda self, depth: (2,) if stage == "layer" else ()}
    with attach(vlm, type("Spoilt", (Spoilt,), where)(), keep=9) as run:
        for call in (lambda: vlm(**batch), lambda: vlm.generate(**batch, max_new_tokens=3)):
            with pytest.raises(PruneZooError, match="'spoilt' scored NaN"):
                call()
        assert run.stats.before == [], "nothing of a call that failed is counted"
    assert "generate" not in vars(vlm)
