"""ToP-ViM against loops over patches: the response, what is carried on; and its alignment."""

import math

import pytest
import torch
from made_inputs import make_inputs
from tiny_llava import make_image
from towers import small_tower
from vision_runs import run

from prunezoo import PruneZooError, build_pruner
from prunezoo.host.parts.tower import Tower
from trainers.training.alignment import AlignmentModule


def moved(pruner):
    """As after some training."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in pruner.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return pruner.eval()


@torch.no_grad()
def test_the_strongest_stay_and_get_of_those_in_front_of_them():
    inputs, pruner = make_inputs(pad=2), moved(build_pruner("top_vim"))
    signals = {**inputs.signals, "vision_outputs": inputs.signals["vision_outputs"] - 0.5}  # of both signs
    inputs = type(inputs)(**{**vars(inputs), "signals": signals})
    output, factor = pruner(inputs, 8), float(pruner.fading.sigmoid())
    shares = pruner.head(inputs).sigmoid()
    carried = 0
    for row, valid in enumerate(inputs.valid):
        tokens = valid.nonzero()[:, 0].tolist()
        response = {t: sum(max(0.0, float(y)) for y in signals["vision_outputs"][row, t].flatten()) for t in tokens}
        kept = sorted(sorted(tokens, key=lambda t, response=response: -response[t])[:8])
        assert output.index[row].tolist() == kept
        for column, t in enumerate(kept):
            run_of = range(kept[column - 1] + 1 if column else 0, t)
            state = inputs.features[row, t]
            if len(run_of):
                weights = [factor ** (t - i) for i in run_of]
                mean = sum(w * inputs.features[row, i] for w, i in zip(weights, run_of, strict=True)) / sum(weights)
                state = state + float(shares[row, t]) * (mean - state)
                carried += 1
            torch.testing.assert_close(output.features[row, column], state, rtol=1e-4, atol=1e-4)
    assert carried > 5 and math.isfinite(factor)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_what_has_nothing_in_front_of_it_is_not_touched(kind):
    inputs, pruner = make_inputs(grids=((3, 3),)), moved(build_pruner("top_vim"))
    pruner.score = lambda seen: -torch.arange(9.0)[None]  # the first stay
    output = pruner(inputs, 4)
    assert torch.equal(output.features[0], inputs.features[0, :4])
    model = small_tower(kind)
    made = run(
        model,
        Tower(model, -1, has_cls=kind == "clip"),
        moved(build_pruner("top_vim")),
        torch.randn(2, 3, 20, 20),
        (6, 9),
    )
    assert made.counts == (6, 9) and made.features.isfinite().all()


def test_alignment_brings_the_shorter_tower_nearer_to_the_whole_one(tiny_llava):
    torch.manual_seed(0)
    module = AlignmentModule(str(tiny_llava.folder), build_pruner("top_vim"), "float32", keep=(0.3, 0.3))
    module.log = lambda *_, **__: None
    batch = tiny_llava.batch(["<s> USER: <image> what ? ASSISTANT:"] * 3, [[make_image(i)] for i in range(3)])
    optimizer = torch.optim.Adam(module.pruner.parameters(), lr=0.02)
    losses, reached = [], set()
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(module.training_step(dict(batch), 0))
        losses[-1].backward()
        reached |= {k for k, p in module.pruner.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    assert losses[-1] < losses[0] and reached == {key for key, _ in module.pruner.named_parameters()}
    assert all(parameter.grad is None for parameter in module.vlm.parameters())


def test_places_and_ranges(tiny_llava):
    assert build_pruner("top_vim").stages(24) == (4, 9, 14) and build_pruner("top_vim").stages(1) == (0,)
    for bad in ({"hidden": 0}, {"attention": "mean"}):
        with pytest.raises(PruneZooError, match=f"{next(iter(bad))}=.*top_vim"):
            build_pruner("top_vim", **bad)
    with pytest.raises(PruneZooError, match="keep must be two shares"):
        AlignmentModule(str(tiny_llava.folder), build_pruner("top_vim"), "float32", keep=(0.5, 0.1))
