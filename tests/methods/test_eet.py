"""EET against loops over heads, in a tower walked by hand."""

import math

import pytest
import torch
from tower_walk import Done, best, walk
from towers import small_tower
from vision_runs import N, run

from prunezoo import PruneZooError, build_pruner
from prunezoo.host.parts.tower import Tower


def by_hand(left, places, with_cls):
    def act(seen):
        tokens, prefix = range(len(seen.alive)), seen.prefix
        if seen.block not in places:
            return Done(list(tokens))
        scores = []
        for t in tokens:
            norms = [math.hypot(*head[prefix + t].tolist()) for head in seen.given]
            score = 0.0
            for head, norm in zip(seen.weights, norms, strict=True):
                column = head[:, prefix + t]
                looks = float(column[0]) if with_cls else float(column[prefix:].mean())
                score += looks * norm / (sum(norms) + 1e-8)
            scores.append(score)
        return Done(best(scores, left[places.index(seen.block)]))

    return act


@pytest.mark.parametrize(("kind", "attention"), [("clip", "cls"), ("siglip", "received"), ("clip", "received")])
@pytest.mark.parametrize("keep", [(2, 9), (12, 25)], ids=str)
def test_by_hand(kind, attention, keep):
    model, pixels = small_tower(kind), torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(2))
    tower, pruner = Tower(model, -1, has_cls=kind == "clip"), build_pruner("eet", attention=attention)
    output, places = run(model, tower, pruner, pixels, keep), list(pruner.stages(4))
    assert places == [0, 2]
    for row in range(2):
        left = [int(s) for s in pruner.schedule(torch.tensor([keep[row]]), torch.tensor([N]), 4)]
        act = by_hand(left, places, attention == "cls")
        alive, states = walk(model, tower, pixels[row], act, after_block=True)
        assert output.index[row, : keep[row]].tolist() == alive
        torch.testing.assert_close(output.features[row, : keep[row]], states, rtol=1e-3, atol=1e-3)


def test_the_papers_tower_has_the_papers_blocks_and_counts():
    pruner = build_pruner("eet")
    assert pruner.stages(12) == (3, 7, 9) and pruner.stages(24) == (7, 15, 19) and pruner.stages(1) == (0,)
    steps = pruner.schedule(torch.tensor([12, 64]), torch.tensor([196, 576]), 12)
    assert [int(step[0]) for step in steps] == [98, 49, 12] and int(steps[-1][1]) == 64
    assert build_pruner("eet", blocks=(1, 2)).stages(4) == (1, 2)


def test_a_head_with_nothing_to_say_has_no_vote():
    pruner = build_pruner("eet")
    signals = {
        "cls_head_attention": torch.tensor([[[0.9, 0.1], [0.1, 0.5]]]),
        "vision_outputs": torch.tensor([[[[0.0], [2.0]], [[0.0], [3.0]]]]),
    }
    inputs = type("Seen", (), {"signal": lambda self, name: signals[name]})()
    torch.testing.assert_close(pruner.score(inputs), torch.tensor([[0.1, 0.5]]))


def test_a_tower_without_cls_is_told_what_works_and_words_are_checked():
    tower = Tower(small_tower("siglip"), -1, has_cls=False)
    with pytest.raises(PruneZooError, match=r"no CLS token.*'received_attention'"):
        run(tower.model, tower, build_pruner("eet"), torch.randn(1, 3, 20, 20), (3,))
    with pytest.raises(PruneZooError, match=r"attention='mean' of eet"):
        build_pruner("eet", attention="mean")
