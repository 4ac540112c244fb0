"""ATP: budgets over layers, thresholds that let each image have its own count, and training by a mean."""

import dataclasses

import pytest
import torch

from prunezoo import PruneInputs, PruneZooError
from prunezoo.core.gates import soft_threshold, straight_through, threshold_mask
from prunezoo.learned.atp import ATP, QUANTILES, REACH, quantiles, rescale, spatial_scores
from trainers.evaluation.methods import build_method

SIDE, WIDTH, WORDS = 8, 32, 5


def grid(side=SIDE):
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)


def make_inputs(batch=6, seed=0, peaks=None, **changes):
    """Images whose prompt attention has as many peaks as `peaks` says, by default more from row to row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = SIDE * SIDE
    peaks = peaks or [2 + 3 * row for row in range(batch)]
    attention = 1e-3 * torch.rand(batch, tokens, generator=generator)
    for row, count in enumerate(peaks):
        attention[row, torch.randperm(tokens, generator=generator)[:count]] += 0.1
    own = torch.rand(batch, tokens, generator=generator) / tokens
    inputs = PruneInputs(
        features=torch.randn(batch, tokens, WIDTH, generator=generator),
        valid=torch.ones(batch, tokens, dtype=torch.bool),
        cells=grid().expand(batch, -1, -1),
        text=torch.randn(batch, WORDS, WIDTH, generator=generator),
        text_valid=torch.ones(batch, WORDS, dtype=torch.bool),
        signals={"self_attention": own, "prompt_attention": attention},
        layer=1,
    )
    return dataclasses.replace(inputs, **changes)


def make_atp(**config):
    torch.manual_seed(0)
    return ATP(**{"layers": (1,), "width": WIDTH, **config}).eval()


# The split of a budget over the layers


@pytest.mark.parametrize("layers", [(0, 3), (0, 2, 4), (1, 3), (2,)])
@pytest.mark.parametrize("taper", [0.5, 1.0])
@pytest.mark.parametrize("keep", [8, 16, 32, 47, 100, 143])
def test_the_mean_over_all_layers_is_what_was_asked_for(layers, taper, keep):
    depth, tokens = 5, 144
    stages = make_atp(layers=layers, taper=taper).schedule(torch.tensor([keep]), torch.tensor([tokens]), depth)
    counts = [tokens] * layers[0]
    for stage, count in enumerate(stages):
        end = layers[stage + 1] if stage + 1 < len(layers) else depth
        counts += [int(count)] * (end - layers[stage])
    assert counts == sorted(counts, reverse=True) and counts[-1] >= 1
    if tokens * layers[0] + depth - layers[0] <= keep * depth:  # else the layers in front have spent it all
        assert keep - 1 < sum(counts) / depth <= keep
    else:
        assert counts[-1] == 1


def test_all_tokens_asked_for_are_all_tokens_kept():
    atp, available = make_atp(layers=(1, 3)), torch.tensor([144, 7])
    assert [stage.tolist() for stage in atp.schedule(available, available, 5)] == [[144, 7], [144, 7]]
    inputs = make_inputs()
    with torch.no_grad():
        for head in atp.thresholds:
            head.displacement.bias.fill_(50.0)  # thresholds that nothing passes
    output = atp(inputs, 1.0)
    assert output.valid.all() and torch.equal(output.kept_features(inputs), inputs.features)
    assert (atp(inputs, 0.9).count == 1).all(), "and yet they were in force"


# Scores


def test_grids_are_worth_more_the_coarser_they_are():
    scores = spatial_scores(grid(12)[None], strides=(4, 3, 2), weight=3.0)[0].view(12, 12)
    values, counts = scores.unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([0.0, 1 - 3 / 4, 1 - 3 / 9, 1 - 3 / 16]))
    assert counts[-1] == 9 and scores[2, 2] == scores.max() and scores[1, 1] == values[2]
    newline = torch.tensor([[[0, -1, -1]]])
    assert spatial_scores(newline, strides=(4, 3, 2), weight=3.0).eq(0).all()


def test_attention_is_rescaled_within_the_valid_tokens():
    attention, valid = torch.tensor([[0.02, 0.01, 0.03, 9.0]]), torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(rescale(attention, valid), torch.tensor([[0.5, 0.0, 1.0, 0.0]]))
    assert rescale(torch.full((1, 3), 0.1), torch.ones(1, 3, dtype=torch.bool)).eq(0).all()
    row = quantiles(attention, valid)[0]
    assert row.shape == (QUANTILES,) and row[0] == 0.01 and row[-1] == 0.03


def test_self_and_cross_attention_both_count():
    inputs, atp = make_inputs(), make_atp()
    for name in atp.needs:
        signals = {**inputs.signals, name: inputs.signals[name].flip(1)}
        other = atp(dataclasses.replace(inputs, signals=signals), 12)
        assert not torch.equal(other.index, atp(inputs, 12).index), name


# Thresholds


def test_before_training_the_count_is_the_one_asked_for():
    inputs = make_inputs()
    for hidden in (0, 16):
        assert make_atp(hidden=hidden)(inputs, 10).count.tolist() == [10] * 6


def learned(atp, std=2.0):
    """Thresholds as training might leave them: each image its own."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for head in atp.thresholds:
            head.displacement.weight.normal_(std=std / REACH, generator=generator)
    return atp


def test_images_of_one_batch_keep_their_own_counts():
    inputs = make_inputs()
    adaptive = learned(make_atp())
    counts = adaptive(inputs, 10).count
    assert len(counts.unique()) > 2
    for row in range(6):  # and none of it depends on the neighbours
        one = {name: signal[row : row + 1] for name, signal in inputs.signals.items()}
        parts = (inputs.features, inputs.valid, inputs.cells, inputs.text, inputs.text_valid)
        alone = PruneInputs(*(part[row : row + 1] for part in parts), one, layer=1)
        assert adaptive(alone, 10).count.item() == counts[row]


def test_the_fixed_rival_ranks_alike_and_keeps_exactly_the_count():
    inputs, adaptive = make_inputs(), learned(make_atp())
    fixed = make_atp(adaptive=False)
    fixed.load_state_dict(adaptive.state_dict())
    one, two = adaptive(inputs, 10), fixed(inputs, 10)
    assert two.count.tolist() == [10] * 6 and one.count.tolist() != [10] * 6
    assert torch.equal(one.scores, two.scores)
    for row in range(6):
        few, many = sorted((set(o.index[row][o.valid[row]].tolist()) for o in (one, two)), key=len)
        assert few <= many


def test_a_low_spatial_threshold_adds_the_grid():
    inputs, atp = make_inputs(), make_atp(strides=(4,))
    on_grid = spatial_scores(inputs.cells, (4,), 3.0)[0].nonzero()[:, 0].tolist()
    assert not set(on_grid) <= set(atp(inputs, 6).index[0].tolist())
    with torch.no_grad():
        atp.thresholds[0].level.bias.fill_(1.0)  # the grid's score, 1 - 3/16, is at 1.47
    assert set(on_grid) <= set(atp(inputs, 6).index[0].tolist())


def test_something_is_left_whatever_the_thresholds_say():
    atp = make_atp(least=3)
    with torch.no_grad():
        atp.thresholds[0].displacement.bias.fill_(50.0)
    assert atp(make_inputs(), 10).count.tolist() == [3] * 6


def test_gates_are_hard_in_value_and_soft_in_gradient():
    inputs, atp = make_inputs(), learned(make_atp(hidden=16)).train()
    keep = torch.full((6,), 10)
    output = atp(inputs, keep)
    kept = torch.zeros(inputs.valid.shape).scatter(1, output.index, output.valid.float())
    assert torch.equal(output.gates.sum(1), output.count.float())
    assert torch.equal(output.gates.detach()[kept > 0], torch.ones(int(kept.sum())))
    soft = ((output.scores - atp.batch_shift(output.scores, inputs.valid, keep)) / atp.gate_temperature).sigmoid()
    weights = torch.randn(soft.shape, generator=torch.Generator().manual_seed(0))
    names, parameters = zip(*atp.named_parameters(), strict=True)
    hard = torch.autograd.grad((output.gates * weights).sum(), parameters, retain_graph=True, allow_unused=True)
    same = torch.autograd.grad((soft * weights).sum(), parameters, allow_unused=True)
    for name, one, two in zip(names, hard, same, strict=True):
        assert (one is None) == (two is None), name
        if one is not None:
            torch.testing.assert_close(one, two, msg=name)


def test_in_training_a_batch_has_its_mean_while_its_images_differ():
    inputs, atp = make_inputs(), learned(make_atp(strides=()), std=0.7)
    free = atp(inputs, 10)
    bound = atp.train()(inputs, 10)
    assert free.count.sum() > 70 and bound.count.sum() == 60 and len(bound.count.unique()) > 2
    assert torch.equal(free.scores, bound.scores), "the scores are those that inference will see"
    # Raising all thresholds changes nothing, so the model's answers teach only who gets more.
    level = torch.autograd.grad(bound.gates.sum(), atp.thresholds[0].displacement.bias)[0]
    assert level.abs() < 1e-3
    mixed = atp(inputs, torch.tensor([64, 5, 5, 5, 5, 5]))
    assert mixed.count[0] == 64 and mixed.count[1:].sum() == 25


def test_the_mean_is_learnt_by_a_loss_of_its_own():
    inputs, atp = make_inputs(), learned(make_atp(), std=1.0).train()
    optimizer = torch.optim.Adam(atp.parameters(), lr=0.001)
    means = []
    for _ in range(100):
        output = atp(inputs, 10)
        means.append(float((output.scores >= 0).sum() / 6))
        optimizer.zero_grad()
        atp.loss_terms(output)["mean"].backward()
        optimizer.step()
    counts = atp.eval()(inputs, 10).count.float()
    assert means[0] > 20 and abs(float(counts.mean()) - 10) < 1.0 and counts.std() > 1.0
    assert make_atp(adaptive=False).train().loss_terms(output) == {}


def test_a_checkpoint_is_measured_with_and_without_its_thresholds(tmp_path):
    folder = learned(make_atp()).save_pretrained(tmp_path / "atp")
    adaptive, fixed = (build_method(f"{folder}{query}").pruners[0] for query in ("", "?adaptive=false"))
    assert adaptive.config.adaptive and not fixed.config.adaptive and fixed.config.layers == (1,)
    assert torch.equal(adaptive(make_inputs(), 9).scores, fixed(make_inputs(), 9).scores)
    for query, named in (("adaptiv=false", "adaptiv"), ("hidden=16", "depend on hidden"), ("least=0", "least")):
        with pytest.raises(PruneZooError, match=named):
            build_method(f"{folder}?{query}")


# Gates as functions


def test_threshold_masks_and_straight_through_gates():
    margins = torch.tensor([[0.5, -0.1, 0.0, 9.0], [-3.0, -1.0, -2.0, 9.0]])
    valid = torch.tensor([[True, True, True, False], [True, True, True, False]])
    assert threshold_mask(margins, valid).tolist() == [[True, False, True, False], [False, True, False, False]]
    assert threshold_mask(margins, valid, least=9).tolist() == valid.tolist()
    soft = torch.rand(2, 4, requires_grad=True)
    gates = straight_through(valid, soft)
    assert torch.equal(gates.detach(), valid.float())
    assert torch.equal(torch.autograd.grad(gates.sum(), soft)[0], torch.ones(2, 4))


def test_the_soft_threshold_meets_the_count():
    scores = torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    valid, keep = torch.ones(3, 9, dtype=torch.bool), torch.tensor([2, 5, 8])
    for temperature in (0.3, 1.0, 4.0):
        threshold = soft_threshold(scores, valid, keep, temperature)
        torch.testing.assert_close(((scores - threshold) / temperature).sigmoid().sum(1), keep.double())


# Mistakes


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": ()},
        {"layers": (3, 1)},
        {"layers": (-1,)},
        {"taper": 0.0},
        {"least": 0},
        {"strides": (0,)},
        {"hidden": 6, "heads": 2},
    ],
)
def test_a_wrong_config_is_refused(wrong):
    with pytest.raises(PruneZooError, match=next(iter(wrong))):
        ATP(**wrong)


def test_a_layer_that_the_decoder_has_not_is_refused():
    with pytest.raises(PruneZooError, match="layer 24"):
        ATP(layers=(4, 14, 24)).stages(24)


def test_a_correction_needs_the_prompt_and_the_right_width():
    inputs = make_inputs()
    with pytest.raises(PruneZooError, match="hidden=0"):
        make_atp(hidden=16)(dataclasses.replace(inputs, text=None, text_valid=None), 5)
    with pytest.raises(PruneZooError, match=f"width={WIDTH}"):
        make_atp(hidden=16, width=64)(inputs, 5)
    assert make_atp()(dataclasses.replace(inputs, text=None, text_valid=None), 5).count.tolist() == [5] * 6
