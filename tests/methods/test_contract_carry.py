"""What a pruner's stage leaves for the next one follows the tokens, wherever it acts; and so may how many are left."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from layer_pruners import Ranked, Together
from made_inputs import make_inputs
from tiny_llava import LONG, SHORT, TWO, load_llava, make_image, make_llava, make_processor

from prunezoo import PruneOutput, Pruner, attach, encode
from prunezoo.core.merge import merge_tokens
from prunezoo.host import encode_needs, run_gated, run_pruned

GRID = 6


def number(inputs):
    """Of each token, by its cell."""
    return inputs.cells[..., 1] * GRID + inputs.cells[..., 2]


class Carrying(Pruner):
    """Writes on each token its number and how many stages it has passed, and checks what it finds."""

    name = "carrying"
    places: tuple[int, ...] = (1, 2, 3)
    merges = False

    def __init__(self):
        super().__init__()
        self.found = []

    def stages(self, depth):
        return self.places

    def score(self, inputs):
        table = torch.rand(GRID * GRID, generator=torch.Generator().manual_seed(inputs.step))
        return table[number(inputs).clamp_min(0)] + 0 * inputs.features[..., 0]

    def reduce(self, inputs, keep):
        valid = inputs.valid
        if inputs.step == 0:
            assert not inputs.carry, "nothing of another pruner, nor of another pass"
            passed = torch.zeros(valid.shape, dtype=torch.long, device=valid.device)
        else:
            assert torch.equal(inputs.carry["pair"][..., 0][valid], number(inputs)[valid])
            passed = inputs.carry["pair"][..., 1]
            assert (passed[valid] == inputs.step).all() or self.comes_back
        self.found.append((inputs, passed))
        carry = {"pair": torch.stack([number(inputs), passed + 1], -1)}
        if self.merges:
            column = torch.arange(valid.shape[1]).expand_as(valid)
            leader = torch.where(column < keep[:, None], column, keep[:, None] - 1)
            return replace(merge_tokens(inputs, leader), carry=carry)
        return replace(super().reduce(inputs, keep), carry=carry)


def make(stage, places=(1, 2, 3), **others):
    return type("Carrying", (Carrying,), {"stage": stage, "places": places, **others})().eval()


@pytest.fixture(scope="module")
def deep_tower(tmp_path_factory):
    """A tiny LLaVA whose tower runs five blocks."""
    folder = tmp_path_factory.mktemp("deep_tower")
    vlm = make_llava(num_hidden_layers=4)
    vision = vlm.config.vision_config
    tower = type(vlm.model.vision_tower)(type(vision)(**{**vision.to_dict(), "num_hidden_layers": 6}))
    vlm.model.vision_tower, vlm.config.vision_config = tower, tower.config
    vlm.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return load_llava(folder)


def mixed(tiny):
    return tiny.batch([LONG, TWO, SHORT], [[make_image(0)], [make_image(1), make_image(2)], [make_image(3)]])


WAYS = {
    "between attention and MLP": {"stage": "vision"},
    "behind blocks": {"stage": "vision", "after_block": True},
    "behind blocks, all of them": {"stage": "vision", "after_block": True, "places": (0, 1, 2, 3, 4)},
    "merging in blocks": {"stage": "vision", "merges": True},
    "in front of layers": {"stage": "layer"},
    "merging in front of layers": {"stage": "layer", "merges": True},
    "from layer 0 on": {"stage": "layer", "places": (0, 2, 3)},
    "coming back": {"stage": "layer", "comes_back": "last"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("keep", [(3, 20, 1, 36), (9, 9, 9, 9), (36, 36, 36, 36)], ids=["ragged", "even", "all"])
@torch.no_grad()
def test_it_follows_the_tokens_that_are_left(way, keep, deep_tower):
    pruner = make(**WAYS[way])
    encoded = encode(deep_tower.vlm, mixed(deep_tower), encode_needs(pruner))
    for _ in range(2):  # the second pass finds nothing of the first
        run = run_pruned(deep_tower.vlm, encoded, pruner, torch.tensor(keep))
    assert run.output.counts == keep and len(pruner.found) == 2 * len(pruner.places)
    assert [inputs.step for inputs, _ in pruner.found] == 2 * list(range(len(pruner.places)))


@torch.no_grad()
def test_tokens_that_come_back_have_theirs_too(deep_tower):
    """And of the passes of a stage that they were not there for there is no count missing: each stage sees all."""
    pruner = make("layer", comes_back="last")
    encoded = encode(deep_tower.vlm, mixed(deep_tower), encode_needs(pruner))
    run_pruned(deep_tower.vlm, encoded, pruner, torch.tensor([3, 20, 1, 30]))
    for inputs, passed in pruner.found:
        assert inputs.valid.all() and (passed == inputs.step).all()


@torch.no_grad()
def test_a_pruner_finds_nothing_of_the_one_before(deep_tower):
    """Which is `scores` here, of the prompt stage, in front of one that begins at layer 0 or later."""
    encoded = encode(deep_tower.vlm, mixed(deep_tower))
    for places in ((0, 2), (1, 3)):
        pruner = make("layer", places)
        run_pruned(deep_tower.vlm, encoded, Together(Ranked(), pruner), 5)
        assert len(pruner.found) == 2


def test_with_gates_it_stays_where_it_is(deep_tower):
    pruner = make("layer").train()
    encoded = encode(deep_tower.vlm, mixed(deep_tower), encode_needs(pruner))
    run_gated(deep_tower.vlm, encoded, pruner, 5)
    assert len(pruner.found) == 3 and all(inputs.valid.shape[1] == 36 for inputs, _ in pruner.found)


class Running(Pruner):
    """Adds up what it scores, without a line about it but in `score`."""

    name, stage = "running", "vision"

    def stages(self, depth):
        return tuple(range(depth))

    def score(self, inputs):
        own = inputs.features.norm(dim=-1)
        return own + inputs.carry["scores"] if inputs.step else own


@torch.no_grad()
def test_threads_and_batches_do_not_mix(deep_tower):
    """One instance under several calls at once; each as if it were alone."""
    pruner = Running().eval()
    batches = [deep_tower.batch([LONG], [[make_image(seed)]]) for seed in range(6)]
    encoded = [encode(deep_tower.vlm, batch) for batch in batches]
    models = [load_llava(deep_tower.folder).vlm for _ in range(2)]  # hooks are a model's

    def work(vlm, mine):
        with torch.no_grad():
            return [run_pruned(vlm, one, pruner, 7).output.index for one in mine for _ in range(3)]

    expected = [work(models[0], half) for half in (encoded[:3], encoded[3:])]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, models, (encoded[:3], encoded[3:])))
    whole = run_pruned(deep_tower.vlm, encode(deep_tower.vlm, mixed(deep_tower)), pruner, 7).output
    alone = run_pruned(deep_tower.vlm, encoded[0], pruner, 7).output
    for own, other in zip(expected, found, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(own, other, strict=True))
    assert torch.equal(whole.index[0], alone.index[0])


def test_what_a_scorer_carries_is_finite_and_its_scores():
    inputs, pruner = make_inputs(pad=3), Ranked().eval()
    output = pruner(inputs, 5)
    carried = output.carry["scores"]
    assert torch.equal(carried[inputs.valid], output.scores[inputs.valid]) and carried.isfinite().all()
    after = inputs.after(output)
    assert torch.equal(after.carry["scores"], inputs.features.norm(dim=-1).gather(1, output.index))
    assert not after.after(PruneOutput(output.index[:, :1] * 0, output.valid[:, :1])).carry


class Paced(Carrying):
    """Leaves, as long as stages are to come, what the data say: two for each positive number in a token's place."""

    def schedule(self, keep, available, depth):
        return [keep] * len(self.places)

    def pace(self, inputs, keep, to_go):
        self.to_go = [*getattr(self, "to_go", ()), to_go]
        wanted = ((inputs.features[..., 0] > 0) & inputs.valid).sum(1)
        return keep if to_go == 0 else torch.maximum(wanted, keep.to(wanted.device))


@pytest.mark.parametrize("way", ["behind blocks", "in front of layers", "from layer 0 on"])
@torch.no_grad()
def test_a_stage_may_see_before_it_says_how_many_it_leaves(way, deep_tower):
    pruner = type("Paced", (Paced,), {"places": (1, 2, 3), **WAYS[way]})().eval()
    encoded = encode(deep_tower.vlm, mixed(deep_tower), encode_needs(pruner))
    run = run_pruned(deep_tower.vlm, encoded, pruner, 4)
    assert pruner.to_go == [2, 1, 0] and run.output.counts == (4, 4, 4, 4)
    first, second, third = (inputs for inputs, _ in pruner.found)
    for before, after in ((first, second), (second, third)):
        wanted = ((before.features[..., 0] > 0) & before.valid).sum(1).clamp_min(4)
        assert after.counts == tuple(wanted.tolist()) and after.counts != before.counts
    assert len(set(second.counts)) > 1, "each image its own"
    with attach(deep_tower.vlm, pruner, keep=4) as attached:
        deep_tower.vlm(**mixed(deep_tower))
    assert attached.stats.after == [4, 4, 4, 4]
