"""Every method that scores tokens takes every `select`, without a line of its own; who has no scores refuses it."""

import math
import operator

import pytest
import torch
from made_inputs import ALL, DIM, GRIDS, build, make_inputs, same, take_rows
from tiny_llava import make_image

from prunezoo import PruneZooError, attach, encode, load_pruner
from prunezoo.core.contract import Pruner
from prunezoo.core.registry import pruner_class, register_pruner
from prunezoo.core.select import Select, tile_quotas
from prunezoo.host import encode_needs, run_pruned
from trainers.cli.names import ROOT
from trainers.evaluation.methods import build_method

SCORERS = tuple(name for name in ALL if pruner_class(name).score is not Pruner.score)
OTHERS = tuple(name for name in ALL if name not in SCORERS)
SELECTS = ("mmr", "tile")


def build_selecting(name, select):
    pruner = build(name)
    pruner.select = select
    return pruner


def tiled_inputs(**options):
    """As `make_inputs`, with the rows of each picture dealt out to tiles of very different sizes."""
    inputs = make_inputs(**options)
    row = inputs.cells[..., 1]
    tile = torch.where(row > 0, 1 + (row > 2).long(), 0).masked_fill(~inputs.valid, -1)
    inputs.cells[..., 0] = tile
    return inputs


def kept(output):
    return [set(index[valid].tolist()) for index, valid in zip(output.index, output.valid, strict=True)]


def slow_mmr(scores, features, count, weight):
    """One picture, token by token, in plain Python and double precision."""
    scores, features = scores.tolist(), features.tolist()
    low, high = min(scores), max(scores)

    units = [[x / math.hypot(*token) for x in token] for token in features]
    cosine = [[sum(map(operator.mul, one, other)) for other in units] for one in units]
    chosen = [scores.index(high)]
    while len(chosen) < count:
        best, best_gain = None, -math.inf
        for i, score in enumerate(scores):
            if i not in chosen:
                likeness = max(cosine[i][j] for j in chosen)
                gain = weight * (score - low) / (high - low + 1e-6) - (1 - weight) * likeness
                if gain > best_gain:
                    best, best_gain = i, gain
        chosen.append(best)
    return set(chosen)


def slow_quotas(sizes, budget):
    """Largest remainders, in whole numbers."""
    exact = [(budget * size, sum(sizes)) for size in sizes]
    quotas = [top // whole for top, whole in exact]
    order = sorted(range(len(sizes)), key=lambda i: -(exact[i][0] % exact[i][1]))
    for i in order[: budget - sum(quotas)]:
        quotas[i] += 1
    return quotas


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_keeps_the_contract_with_every_select(name, select):
    inputs, pruner = tiled_inputs(pad=3), build_selecting(name, select)
    moved, padded = take_rows(inputs, [2, 0, 1]), tiled_inputs(pad=9, text_pad=4)
    for keep in (7, 1.0, torch.tensor([1, 20, 9])):
        output = pruner(inputs, keep)
        top = build(name)(inputs, keep)
        assert torch.equal(output.count, top.count) and torch.equal(output.scores, top.scores)
        for row in range(len(GRIDS)):
            index = output.index[row, : output.count[row]]
            assert (index.diff() > 0).all() and inputs.valid[row, index].all()
    one, two, three = pruner(inputs, 6), pruner(moved, 6), pruner(padded, 6)
    for new, old in enumerate((2, 0, 1)):
        same(one, two, old, new, one.kept_features(inputs), two.kept_features(moved))
        same(one, three, old, old, one.kept_features(inputs), three.kept_features(padded))
        h, w = GRIDS[old]
        alone = pruner(single := take_rows(inputs, [old], h * w, 5 - old), 6)
        same(one, alone, old, 0, one.kept_features(inputs), alone.kept_features(single))
    assert torch.equal(pruner(inputs, 6).index, one.index)


@pytest.mark.parametrize("name", SCORERS)
def test_mmr_is_the_slow_greedy_choice(name):
    inputs, differs = tiled_inputs(pad=2), False
    for select, weight in (("mmr", 0.5), ("mmr:0.9", 0.9)):
        pruner = build_selecting(name, select)
        for count in (1, 18):
            output = pruner(inputs, count)
            for row, chosen in enumerate(kept(output)):
                own = inputs.valid[row]
                slow = slow_mmr(output.scores[row, own].double(), inputs.features[row, own].double(), count, weight)
                assert chosen == slow
            differs |= kept(output) != kept(build(name)(inputs, count))
    assert differs  # it is not the top anyway


def test_mmr_spreads_over_what_the_top_would_take_twice():
    inputs = make_inputs()
    twins = make_inputs().features[:, :1].expand(-1, 5, -1)
    inputs.features[:, :5] = twins  # five of the same, and they score best

    class Ramp(Pruner):
        name = "ramp"

        def score(self, inputs):
            return -torch.arange(inputs.valid.shape[1]).float().expand(inputs.valid.shape)

    pruner = Ramp().eval()
    assert kept(pruner(inputs, 4)) == [{0, 1, 2, 3}] * 3
    pruner.select = "mmr"
    for chosen in kept(pruner(inputs, 4)):
        assert 0 in chosen and len(chosen & {1, 2, 3, 4}) == 0


def test_what_scores_minus_infinity_comes_last_and_padding_never():
    class Masked(Pruner):
        name = "masked"

        def score(self, inputs):
            return torch.where(torch.arange(inputs.valid.shape[1]) % 2 == 0, 1.0, -torch.inf).expand(inputs.valid.shape)

    inputs = tiled_inputs(pad=4)
    for select in SELECTS:
        pruner = Masked().eval()
        pruner.select = select
        for row, chosen in enumerate(kept(pruner(inputs, 10))):
            assert len(chosen) == 10 and inputs.valid[row, list(chosen)].all()
            if select != "tile":
                assert all(slot % 2 == 0 for slot in chosen)
        assert kept(pruner(inputs, 19)) == kept(pruner(inputs, 19))
        assert torch.equal(pruner(inputs, 1.0).valid.sum(1), inputs.valid.sum(1))


@pytest.mark.parametrize("name", SCORERS)
def test_tiles_share_the_budget_and_each_keeps_its_best(name):
    inputs, pruner = tiled_inputs(pad=2), build_selecting(name, "tile")
    for count in (1, 5, 11, 20):
        output = pruner(inputs, count)
        for row, chosen in enumerate(kept(output)):
            tiles, scores = inputs.cells[row, :, 0], output.scores[row].tolist()
            members = [(tiles == tile).nonzero()[:, 0].tolist() for tile in range(3)]
            quotas = slow_quotas([len(own) for own in members], count)
            for own, quota in zip(members, quotas, strict=True):
                best = sorted(own, key=lambda slot: (-scores[slot], slot))[:quota]
                assert chosen & set(own) == set(best)


def test_quotas_sum_to_the_budget_and_stay_within_the_tiles():
    random = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 7, (200, 40), generator=random)
    valid = torch.rand(200, 40, generator=random) < 0.7
    keep = (torch.rand(200, generator=random) * (valid.sum(1) + 1)).long()
    quotas, counts = tile_quotas(tiles, valid, keep, 7)
    assert torch.equal(quotas.sum(1), keep) and (quotas <= counts).all() and torch.equal(counts.sum(1), valid.sum(1))
    for row in range(200):
        assert quotas[row].tolist() == slow_quotas(counts[row].tolist(), int(keep[row]))


@pytest.mark.parametrize("name", OTHERS)
def test_who_chooses_without_scores_refuses(name):
    pruner = build(name)
    with pytest.raises(PruneZooError, match=f"select='mmr' is for methods that score tokens, and '{name}'"):
        pruner.select = "mmr"
    pruner.select = "top"


@pytest.mark.parametrize("wrong", ["best", "mmr:", "mmr:2", "tile:0.5", "MMR", "", 1, None, ["mmr"]])
def test_what_is_no_select_is_refused(wrong):
    with pytest.raises(PruneZooError, match="select="):
        build("fastervlm").select = wrong


def test_a_way_to_choose_reads_as_it_was_written():
    assert [str(Select.parse(text)) for text in ("top", "mmr", "mmr:0.5", "mmr:.25", "tile")] == [
        "top", "mmr", "mmr", "mmr:0.25", "tile",
    ]  # fmt: skip


def test_gates_are_those_of_the_top():
    pruner = build("ppm").train()
    pruner.select = "mmr"
    with pytest.raises(PruneZooError, match="train with select='top'"):
        pruner(make_inputs(), 5)
    pruner.select = "top"
    assert pruner(make_inputs(), 5).gates is not None


def test_it_is_saved_where_it_was_set_and_read_strictly(tmp_path):
    plain, chosen = build("ppm"), build_selecting("ppm", "mmr:0.7")
    chosen.load_state_dict(plain.state_dict())
    assert '"settings"' not in (plain.save_pretrained(tmp_path / "plain") / "config.json").read_text()
    folder = chosen.save_pretrained(tmp_path / "chosen")
    loaded = load_pruner(folder)
    assert loaded.select == "mmr:0.7" and loaded.config == plain.config
    assert torch.equal(loaded(make_inputs(), 6).index, chosen(make_inputs(), 6).index)
    assert load_pruner(f"{folder}?select=top").select == "top"
    whole = (folder / "config.json").read_text()
    for wrong, message in (
        ('"select": "best"', "config.json: select='best' is none"),
        ('"selct": "mmr"', "config.json: unknown setting 'selct' of 'ppm'"),
    ):
        (folder / "config.json").write_text(whole.replace('"select": "mmr:0.7"', wrong))
        with pytest.raises(PruneZooError, match=message):
            load_pruner(folder)
    (folder / "config.json").write_text(whole.replace('{\n    "select": "mmr:0.7"\n  }', "[1]"))
    with pytest.raises(PruneZooError, match="key 'settings' must be an object"):
        load_pruner(folder)


def test_a_name_may_bring_it_everywhere(deep_llava):
    ppm = f"{ROOT}/checkpoints/ppm-tiny"
    assert load_pruner("fastervlm?select=mmr").select == "mmr"
    assert build_method(f"{ppm}?select=mmr:0.25").pruners[0].select == "mmr:0.25"
    assert load_pruner(f"{ppm}?select=tile").base_model == load_pruner(ppm).base_model
    with pytest.raises(PruneZooError, match="'divprune' chooses or makes them itself"):
        load_pruner("divprune?select=mmr")
    with pytest.raises(PruneZooError, match="unknown config key 'selekt'"):
        load_pruner("fastervlm?selekt=mmr")
    with pytest.raises(PruneZooError, match="the weights depend on hidden"):
        load_pruner(f"{ppm}?hidden=32")
    vlm, batch = deep_llava.vlm, deep_llava.batch(["<s> USER: <image> what ? ASSISTANT:"], [[make_image(0)]])
    with torch.no_grad(), attach(vlm, "fastervlm?select=mmr", keep=9):
        logits = vlm(**batch).logits
    pruner = build_selecting("fastervlm", "mmr")
    with torch.no_grad():
        run = run_pruned(vlm, encode(vlm, batch, encode_needs(pruner)), pruner, 9)
        top = run_pruned(vlm, encode(vlm, batch, encode_needs(pruner)), build("fastervlm"), 9)
    assert torch.equal(logits, run.host.logits) and not torch.equal(run.output.index, top.output.index)


def test_a_method_may_not_call_a_field_of_its_config_so():
    from dataclasses import make_dataclass

    from prunezoo import PrunerConfig

    config = make_dataclass("Config", [("select", str, "x")], bases=(PrunerConfig,), frozen=True)
    body = {"config_class": config, "score": lambda self, inputs: inputs.features[..., DIM - 1]}
    with pytest.raises(PruneZooError, match="config field 'select' is taken"):
        register_pruner("has_select")(type("HasSelect", (Pruner,), body))
