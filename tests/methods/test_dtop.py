"""DToP against loops over patches: who is spared, who stops, and what is put out of those who did."""

import pytest
import torch
from made_inputs import make_inputs
from towers import small_tower
from vision_runs import TOWERS, N, run

from prunezoo import PruneZooError, build_pruner
from prunezoo.host.parts.tower import Tower
from prunezoo.learned.dtop import spared


def slow_spared(sure, classes, candidates, count):
    chosen = set()
    for own in set(classes):
        members = [i for i, one in enumerate(classes) if one == own and candidates[i]]
        chosen |= set(sorted(members, key=lambda i: -sure[i])[:count])
    return chosen


@pytest.mark.parametrize("count", [0, 2, 5])
def test_the_surest_of_each_class_are_spared(count):
    random = torch.Generator().manual_seed(count)
    sure = (torch.rand(3, 40, generator=random) * 8).round() / 8  # with equals
    classes = torch.randint(0, 6, (3, 40), generator=random)
    candidates = torch.rand(3, 40, generator=random) > 0.4
    found = spared(sure, classes, candidates, count)
    for row in range(3):
        expected = slow_spared(sure[row].tolist(), classes[row].tolist(), candidates[row].tolist(), count)
        assert set(found[row].nonzero()[:, 0].tolist()) == expected


class Told(torch.nn.Module):
    """In the place of the head: the number of a patch says how sure it is."""

    def __init__(self, odds):
        super().__init__()
        self.odds = odds

    def forward(self, inputs):
        place = inputs.cells[..., 1] * 5 + inputs.cells[..., 2]
        return self.odds[place.clamp_min(0)]


def told(odds, **options):
    pruner = build_pruner("dtop", **options).eval()
    pruner.head = Told(odds)
    return pruner


@pytest.mark.parametrize(("kind", "layer"), TOWERS)
def test_who_stops_is_put_out_as_it_was(kind, layer):
    model, pixels = small_tower(kind), torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    tower = Tower(model, layer, has_cls=kind == "clip")
    pruner = told(torch.linspace(-3, 3, N), spare=0)
    bare = model(pixels, output_hidden_states=True).hidden_states
    output = run(model, tower, pruner, pixels, (9, 9))
    first, second = pruner.stages(tower.depth)
    assert output.valid.all() and output.features.shape[1] == N
    leaving = N - round(N * (9 / N) ** 0.5)  # behind the first; the surest have the highest numbers
    torch.testing.assert_close(
        output.features[:, -leaving:], bare[first + 1][:, tower.prefix :][:, -leaving:], rtol=1e-4, atol=1e-4
    )
    assert (output.features[:, :9] - bare[second + 1][:, tower.prefix :][:, :9]).abs().max() > 0.01


def test_with_a_threshold_only_the_sure_stop_and_keep_is_the_least_that_stay():
    odds = torch.full((N,), -2.0)
    odds[5:20] = 2.0
    counts = {}
    for keep in (1, 18):
        seen = []
        pruner = told(odds, threshold=0.8, spare=2, classes=3)
        score = pruner.score

        def watch(inputs, seen=seen, score=score):
            seen.append(inputs.asked[0])
            return score(inputs)

        pruner.score = watch
        model = small_tower("clip")
        run(model, Tower(model, -1), pruner, torch.randn(1, 3, 20, 20), (keep,))
        counts[keep] = seen
    # Of 15 that are sure the two surest of each of the clusters that they are in go on.
    assert 10 + 2 <= counts[1][0] <= 10 + 6 and counts[18][-1] == 18


def test_the_lesson_is_how_near_a_state_is_to_the_last_one():
    inputs, pruner = make_inputs(), build_pruner("dtop")
    signals = {**inputs.signals, "vision_states": inputs.features}
    inputs = type(inputs)(inputs.features, inputs.valid, inputs.cells, signals=signals, layer=1, depth=4)
    optimizer = torch.optim.Adam(pruner.parameters(), lr=0.1)
    first = pruner.lesson(inputs)
    for _ in range(50):
        optimizer.zero_grad()
        pruner.lesson(inputs).backward()
        optimizer.step()
    assert pruner.lesson(inputs) < 0.1 * first and (pruner.sure(inputs)[inputs.valid] > 0.8).all()
    assert pruner.learns_from(4) == ("vision_states",)


def test_depths_and_ranges():
    pruner = build_pruner("dtop")
    assert pruner.stages(24) == (7, 15) and pruner.stages(4) == (0, 2) and pruner.stages(1) == (0,)
    for bad in ({"threshold": 1.0}, {"hidden": 0}, {"classes": 0}, {"spare": -1}, {"attention": "mean"}):
        with pytest.raises(PruneZooError, match=f"{next(iter(bad))}=.*dtop"):
            build_pruner("dtop", **bad)
