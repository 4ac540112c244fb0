"""What slimming does to weights, heads and units, on small pruners and made inputs."""

import pytest
import torch
from made_inputs import make_inputs
from torch import nn

from prunezoo import PruneZooError, build_pruner, load_pruner
from prunezoo.learned.ppm import PPM, PPMConfig
from trainers.slimming.consensus import ConsensusPPM
from trainers.slimming.iss_p import ShrinkWeights, smallest_in_groups
from trainers.slimming.lrp import PositiveLinear, References, explained, prune_by_relevance, relevance_of
from trainers.slimming.lth import Tickets
from trainers.slimming.magnitude import cliffs, magnitude_masks, sweep
from trainers.slimming.precrop import Costs, precrop_sizes
from trainers.slimming.units import as_ppm, choose, crop, layers_of, total
from trainers.slimming.weights import apply_masks, keep_largest, matrices, parts_of, zeros_of


def make_ppm(seed=0, **config):
    torch.manual_seed(seed)
    ppm = PPM(**{"width": 32, "hidden": 16, "heads": 4, "blocks": 2, "text_blocks": 1, **config}).eval()
    with torch.no_grad():
        for weight in ppm.parameters():  # as training leaves them: no weight is special
            weight.add_(0.05 * torch.randn_like(weight))
    return ppm


def some_units(ppm, seed=0):
    random = torch.Generator().manual_seed(seed)
    keep = {layer.name: torch.rand(layer.units, generator=random) > 0.4 for layer in layers_of(ppm)}
    for units in keep.values():
        units[0] = True
    return keep


@pytest.mark.parametrize("query_aware", [True, False])
def test_a_cropped_pruner_scores_as_one_whose_units_are_silent(query_aware, tmp_path):
    ppm, inputs = make_ppm(query_aware=query_aware), make_inputs()
    keep = some_units(ppm)
    small = crop(ppm, keep)
    before = ppm.score(inputs)
    with torch.no_grad():
        for layer in layers_of(ppm):
            silent = ~keep[layer.name].repeat_interleave(layer.channels)
            ppm.get_submodule(layer.behind).weight[:, silent] = 0
    after = ppm.score(inputs)
    valid = inputs.valid
    assert not torch.allclose(before[valid], after[valid], atol=1e-3)
    torch.testing.assert_close(small.score(inputs)[valid], after[valid], atol=1e-5, rtol=1e-5)
    gone = sum(layer.parameters * int((~keep[layer.name]).sum()) for layer in layers_of(ppm))
    assert gone > 0 and total(small) == total(ppm) - gone
    again = load_pruner(small.save_pretrained(tmp_path))
    assert isinstance(again, PPM) and again.config == small.config and again.config.feed_widths
    assert torch.equal(again.score(inputs)[valid], small.score(inputs)[valid])


def test_what_says_nothing_of_widths_is_as_ever():
    assert PPMConfig().feed_widths == () and {name: w.shape for name, w in PPM(hidden=64).named_parameters()} == {
        name: w.shape
        for name, w in PPM(hidden=64, blocks=4, feed_widths=(128,) * 6, attention_heads=(8,) * 10).named_parameters()
    }


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"feed_widths": (8, 8)}, "feed_widths=[8, 8] must be 3 numbers, each at least 1"),
        ({"feed_widths": (8, 8, 0)}, "must be 3 numbers, each at least 1"),
        ({"attention_heads": (4, 4, 4, 4, 5)}, "must be 5 numbers, each from 1 to heads=4"),
        ({"attention_heads": (4, 4, 4, 4, 4), "query_aware": False}, "must be 2 numbers"),
    ],
)
def test_wrong_widths_are_refused(config, said):
    with pytest.raises(PruneZooError) as caught:
        make_ppm(**config)
    assert said in str(caught.value)


def test_units_worth_least_go_first_and_one_of_each_layer_stays():
    ppm = make_ppm()
    layers = layers_of(ppm)
    worth = {layer.name: torch.arange(layer.units) + 1000.0 * (layer.name != layers[0].name) for layer in layers}
    keep = choose(ppm, worth, total(ppm) - 5 * layers[0].parameters)
    assert keep[layers[0].name].tolist() == [False] * 5 + [True] * (layers[0].units - 5)
    assert all(keep[layer.name].all() for layer in layers[1:])
    fixed = total(ppm) - sum(layer.parameters * (layer.units - 1) for layer in layers)
    least = choose(ppm, worth, fixed)
    assert all(int(units.sum()) == 1 for units in least.values())
    assert total(crop(ppm, least)) == fixed
    with pytest.raises(PruneZooError, match="one unit in each layer leaves"):
        choose(ppm, worth, fixed - 1)


def test_the_largest_weights_stay():
    ppm = make_ppm()
    names = tuple(matrices(ppm))
    masks = keep_largest(ppm, 0.7, names)
    weights = dict(ppm.named_parameters())
    kept = torch.cat([weights[name].detach()[masks[name]].abs() for name in names])
    gone = torch.cat([weights[name].detach()[~masks[name]].abs() for name in names])
    assert kept.min() >= gone.max() and len(gone) == round(0.7 * (len(kept) + len(gone)))
    assert not any(name.endswith("_orig") for name in weights), "it was not changed"
    apply_masks(ppm, masks)
    zeros, count = zeros_of(ppm)
    assert zeros == len(gone) and count == len(gone) + len(kept)
    later = keep_largest(ppm, 0.8, names)
    assert all((later[name] <= masks[name]).all() for name in names), "what is gone stays away"
    even = keep_largest(make_ppm(), 0.5, names, even=True)
    assert all(int((~even[name]).sum()) == round(0.5 * even[name].numel()) for name in names)


def test_a_sweep_touches_one_part_at_a_time():
    ppm = make_ppm()
    copies = sweep(ppm, [0.25, 0.5])
    assert set(parts_of(ppm)) == {"all", "project", "place", "blocks", "head", "text_blocks"}
    assert list(copies)[:3] == ["all 0.25", "all 0.5", "project 0.25"] and zeros_of(ppm)[0] == 0
    for name, copy in copies.items():
        part = name.split()[0]
        for weight, own in matrices(copy).items():
            assert part in ("all", weight.split(".")[0]) or torch.equal(own, dict(ppm.named_parameters())[weight])
        assert zeros_of(copy)[0] > 0
    with pytest.raises(PruneZooError, match="--part tail: 'ppm' has all, project"):
        magnitude_masks(ppm, 0.5, "tail")


def test_a_cliff_is_where_retention_surely_fell():
    def row(part, sparsity, high):
        return {"part": part, "sparsity": sparsity, "difference_ci": [high - 2, high]}

    rows = [row("all", 0.2, 0.5), row("all", 0.4, -0.9), row("all", 0.6, -1.1), row("all", 0.8, 0.0)]
    assert cliffs([*rows, row("head", 0.2, -5.0)], 1.0) == {"all": 0.4, "head": None}


def test_groups_lose_their_smallest_and_grow_until_they_divide():
    torch.manual_seed(0)
    weight = torch.randn(6, 8)
    small = smallest_in_groups(weight, 0.75, 4)
    rows, kept = weight.abs().view(-1, 4), ~small.view(-1, 4)
    assert (kept.sum(1) == 1).all() and torch.equal(kept.int().argmax(1), rows.argmax(1))
    assert (smallest_in_groups(weight, 0.5, 20).view(2, 24).sum(1) == 12).all()  # 48 is no multiple of 20 to 23
    assert int(smallest_in_groups(torch.ones(1, 3), 0.5, 20).sum()) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sparsity": 1.0}, "--sparsity 1.0"),
        ({"sparsity": 0.01}, "iss_p.group=20: of so many weights none or all"),
        ({"sparsity": 0.5, "factor": 1.0}, "iss_p.factor=1.0"),
        ({"sparsity": 0.5, "share": 0.0}, "iss_p.share=0.0"),
    ],
)
def test_shrinking_refuses_what_it_cannot_do(settings, said):
    with pytest.raises(PruneZooError, match=said):
        ShrinkWeights(**settings)


def test_rounds_take_a_fifth_of_what_is_left():
    assert Tickets().sparsities(0.488) == pytest.approx([0.2, 0.36, 0.488])
    assert Tickets(each=0.5).sparsities(0.8) == pytest.approx([0.5, 0.75, 0.8])
    with pytest.raises(PruneZooError, match=r"lth.rewind=0 must lie in \(0, 1\)"):
        Tickets(rewind=0)


def test_widths_follow_from_costs_alone():
    ppm = make_ppm()
    found = precrop_sizes(ppm, 0.5, Costs())
    assert found == precrop_sizes(make_ppm(seed=1), 0.5, Costs()), "weights do not matter"
    small = PPM(**{**ppm.config.to_dict(), **found})
    assert 0.4 * total(ppm) < total(small) <= 0.5 * total(ppm)
    # a feed-forward layer has one and a half times the parameters of an attention, and so two thirds of its density
    assert found["feed_widths"][0] / 32 < found["attention_heads"][0] / 4
    widths = precrop_sizes(ppm, 0.5, Costs(of="operations", tokens=100, words=10))["feed_widths"]
    assert widths[2] == 32 and widths[0] == widths[1] < 32, "few words: cheap layers stay whole"
    with pytest.raises(PruneZooError, match="one unit in each layer costs more; at most"):
        precrop_sizes(ppm, 0.99, Costs())


def test_relevance_is_handed_on_whole():
    torch.manual_seed(0)
    x, linear = torch.randn(5, 7, requires_grad=True), nn.Linear(7, 6, bias=False)
    with torch.no_grad():
        linear.weight.copy_(linear.weight.abs())
    y = PositiveLinear.apply(x, linear.weight, None)
    relevance = torch.rand(5, 6)
    y.backward(relevance / y.detach())
    handed = x.detach() * x.grad
    torch.testing.assert_close(handed.sum(1), relevance.sum(1), atol=1e-4, rtol=1e-4)
    assert (handed[x.detach() < 0] == 0).all(), "negative products count for nothing"


def test_relevance_leaves_scores_alone_and_silent_units_without_any():
    ppm, inputs = make_ppm(), make_inputs()
    before = ppm.score(inputs)
    with explained(ppm):
        torch.testing.assert_close(ppm.score(inputs), before, atol=1e-5, rtol=1e-5)
    assert torch.equal(ppm.score(inputs), before)
    with torch.no_grad():
        ppm.blocks[0].feed.down.weight[:, 3] = 0
        ppm.blocks[1].ask.out.weight[:, 4:8] = 0  # the second head
    worth = relevance_of(ppm, [inputs], 1 / 3)
    assert worth["blocks.0.feed"][3] == 0 and worth["blocks.1.ask"][1] == 0
    assert all((units > 0).sum() >= len(units) - 1 for units in worth.values())
    assert all(weight.grad is None for weight in ppm.parameters())
    feed = next(layer for layer in layers_of(ppm) if layer.name == "blocks.0.feed")
    small = prune_by_relevance(ppm, 1.01 * feed.parameters / total(ppm), [inputs], References(keep=1 / 3))
    valid = inputs.valid
    assert small.config.feed_widths[0] < 32 or small.config.attention_heads[3] == 3
    torch.testing.assert_close(small.score(inputs)[valid], ppm.score(inputs)[valid], atol=1e-5, rtol=1e-5)


def test_gates_are_gone_once_they_agree(tmp_path):
    torch.manual_seed(0)
    sizes = {"width": 32, "hidden": 16, "heads": 2, "blocks": 1, "text_blocks": 1}
    gated, inputs = ConsensusPPM(**sizes, sparsity=0.4, ramp=2), make_inputs()
    with torch.no_grad():
        for gate in gated.gates:
            gate.bias[::2] = -2.0
    gated.train()
    for _ in range(120):
        output = gated(inputs, 4)
        terms = gated.loss_terms(output)
    sum(terms.values()).backward()
    assert all(gate.bias.grad is not None and gate.bias.grad.abs().sum() > 0 for gate in gated.gates)
    assert gated.agreement() > 0.9
    gated.eval()
    small = load_pruner(gated.save_pretrained(tmp_path))
    assert type(small) is PPM and total(small) <= 0.6 * total(PPM(**sizes))
    assert small.config.feed_widths[0] <= 16
    valid = inputs.valid
    torch.testing.assert_close(small.score(inputs)[valid], gated.score(inputs)[valid], atol=1e-5, rtol=1e-5)


def test_disagreement_and_the_share_that_stays_cost():
    torch.manual_seed(0)
    gated, inputs = ConsensusPPM(width=32, hidden=16, heads=2, blocks=1, text_blocks=1, ramp=1), make_inputs()
    gated.train()
    first = gated.loss_terms(gated(inputs, 4))
    assert first["polarise"] == 0 and first["agree"] > 0.3, "all are open for all"
    gate = gated.gates[0]
    active = gate_inputs(gated, inputs)
    with torch.no_grad():
        gate.scale.fill_(100.0)
        gate.bias.copy_(-100.0 * active.median(0).values - 1e-3)
    assert gated.loss_terms(gated(inputs, 4))["polarise"] > 0


def gate_inputs(gated, inputs):
    """The mean absolute activation of the first layer's units, (B, U)."""
    layer, seen = gated.layers[0], []
    hook = gated.get_submodule(layer.behind).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    gated.gates[0].requires_grad_(False)
    with torch.no_grad():
        gated.score(inputs)
    hook.remove()
    gated.gates[0].requires_grad_(True)
    return seen[0].abs().mean(1)


def test_other_methods_are_refused_by_name():
    with pytest.raises(PruneZooError, match="--method lrp knows the layers of 'ppm' and 'policy', not of 'm3'"):
        as_ppm(build_pruner("m3", width=32, hidden=16), "lrp")
    with pytest.raises(PruneZooError, match="'divprune' has no matrices"):
        matrices(build_pruner("divprune"))
    with pytest.raises(PruneZooError, match="ramp=0 1"):
        ConsensusPPM(width=32, hidden=16, heads=2, ramp=0)
