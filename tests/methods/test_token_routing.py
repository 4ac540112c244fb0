"""Token routing against loops over patches: who goes on, who joins whom, who stops; and its training path."""

import math

import pytest
import torch
from made_inputs import make_inputs
from tiny_llava import make_image
from towers import small_tower
from vision_runs import N, patches, run

from prunezoo import PruneZooError, build_pruner
from prunezoo.host.parts.tower import Tower
from prunezoo.host.stages.vision_relaxed import RelaxedTower
from prunezoo.learned.token_routing import gate
from trainers.training.routing import RoutingModule


class Told(torch.nn.Module):
    """In the place of a gate: f ``(B, N)`` as it is, or ``(N,)`` of each patch by its place in the picture."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def forward(self, inputs):
        if self.values.dim() == 2:
            return self.values
        return self.values[(inputs.cells[..., 1] * 5 + inputs.cells[..., 2]).clamp_min(0)]


def told(on, down, **options):
    pruner = build_pruner("token_routing", **options).eval()
    pruner.on, pruner.down = Told(on), Told(down)
    return pruner


def slow_gate(value):
    return max(0.0, math.tanh(float(value)))


def test_a_gate_that_is_shut_is_exactly_0():
    values = torch.tensor([-3.0, -1e-6, 0.0, 1e-3, 2.0])
    assert gate(values).tolist() == pytest.approx([slow_gate(value) for value in values])
    assert gate(values)[:3].tolist() == [0.0] * 3


@pytest.mark.parametrize("sized", [False, True])
@torch.no_grad()
def test_who_stops_joins_the_highest_of_its_cell_or_nobody(sized):
    random = torch.Generator().manual_seed(3)
    inputs, pruner = make_inputs(grids=((5, 5), (4, 5)), pad=2), build_pruner("token_routing").eval()
    shape = inputs.valid.shape
    on, down = (torch.randn(shape, generator=random) for _ in range(2))
    pruner.on, pruner.down = Told(on), Told(down)
    sizes = torch.randint(1, 5, shape, generator=random).float() if sized else None
    inputs = type(inputs)(**{**vars(inputs), "sizes": sizes})
    output = pruner(inputs, 8)
    joined = 0
    for row in range(2):
        tokens = inputs.valid[row].nonzero()[:, 0].tolist()
        kept = sorted(sorted(tokens, key=lambda t, row=row: -float(on[row, t]))[:8])
        assert output.index[row].tolist() == kept
        groups = {t: [] for t in kept}
        for t in set(tokens) - set(kept):
            cell = [int(x) // 2 for x in inputs.cells[row, t, 1:]]
            mates = [k for k in kept if [int(x) // 2 for x in inputs.cells[row, k, 1:]] == cell]
            if mates and down[row, t] > 0:
                groups[max(mates, key=lambda k, row=row: float(on[row, k]))].append(t)
        for column, (k, others) in enumerate(groups.items()):
            size = [1.0 if sizes is None else float(sizes[row, t]) for t in (k, *others)]
            weights = [size[0], *(s * slow_gate(down[row, t]) for s, t in zip(size[1:], others, strict=True))]
            mean = sum(w * inputs.features[row, t] for w, t in zip(weights, (k, *others), strict=True)) / sum(weights)
            torch.testing.assert_close(output.features[row, column], mean, rtol=1e-4, atol=1e-5)
            assert float(output.sizes[row, column]) == pytest.approx(sum(weights), rel=1e-4)
            assert {t for t in tokens if output.groups[row, t] == column} == {k, *others}
            joined += len(others)
    assert joined > 3


@torch.no_grad()
def test_training_puts_out_what_use_does():
    """The same patches go on where as many have open gates as are asked for; those that stopped change nothing."""
    model, pixels = small_tower("clip"), torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(5))
    tower, random = Tower(model, -1), torch.Generator().manual_seed(6)
    on, down = torch.randn(N, generator=random), torch.randn(N, generator=random)
    open_ = int((on > 0).sum())
    pruner = told(on, down, by_gate=True)
    with RelaxedTower(tower, pruner, "token_routing", patches(2), log_eps=1e-30) as relaxed:
        states = model(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    alive = (on > 0).nonzero()[:, 0].tolist()
    assert [gates.nonzero()[:, 0].tolist() for gates in relaxed.gates] == [alive] * 2
    assert [counts.tolist() for counts in relaxed.left] == [[25, 25], *[[open_, open_]] * 3]
    output = run(model, tower, pruner, pixels, (1, 1))
    assert output.counts == (open_, open_)
    for row in range(2):  # where the middle of what was joined is, which need not be where the highest is
        made = {tuple(state.tolist()) for state in states[row, alive].round(decimals=2)}
        assert {tuple(state.tolist()) for state in output.features[row].round(decimals=2)} == made


def test_with_identity_what_stopped_is_put_out_as_it_was():
    model, pixels = small_tower("clip"), torch.randn(1, 3, 20, 20)
    on, down = torch.linspace(-1, 1, N), torch.full((N,), -1.0)
    output = run(model, Tower(model, -1), told(on, down, identity=True, first=3), pixels, (20,))
    assert output.index.tolist() == [list(range(N))] and output.groups is None
    inside = {}
    handle = model.encoder.layers[3].layer_norm2.register_forward_pre_hook(lambda _m, a: inside.update(h=a[0]))
    with torch.no_grad():
        model(pixels)
    handle.remove()
    torch.testing.assert_close(output.features[0, :5], inside["h"][0, 1:6], rtol=1e-4, atol=1e-4)


def test_every_gate_learns_and_the_cost_comes_nearer_to_the_target(tiny_llava):
    torch.manual_seed(0)
    module = RoutingModule(
        str(tiny_llava.folder),
        build_pruner("token_routing", first=0),
        "float32",
        target=0.3,
        cost_weight=20.0,
        settling=0.0,
    )
    seen = {}
    module.log, module.log_dict, module.total_steps = lambda name, value, **_: seen.update({name: value}), None, 0
    batch = tiny_llava.batch(["<s> USER: <image> what color ? ASSISTANT: red"] * 2, [[make_image(0)], [make_image(1)]])
    labels = batch["input_ids"].clone()
    labels[:, :-1] = -100
    module.log_dict = lambda *_, **__: None
    optimizer = torch.optim.Adam(module.pruner.parameters(), lr=0.03)
    costs, reached = [], set()
    for _ in range(40):
        optimizer.zero_grad()
        module.training_step({**batch, "labels": labels}, 0).backward()
        costs.append(float(seen["train/operations"]))
        reached |= {k for k, p in module.pruner.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    assert costs[0] > 0.6 and abs(costs[-1] - 0.3) < abs(costs[0] - 0.3) / 2
    assert reached == {key for key, _ in module.pruner.named_parameters()}
    assert all(parameter.grad is None for parameter in module.vlm.parameters())


def test_places_and_ranges(tiny_llava):
    assert build_pruner("token_routing").stages(4) == (1, 2, 3) and build_pruner("token_routing").stages(1) == (0,)
    for bad in ({"hidden": 0}, {"first": -1}, {"attention": "mean"}):
        with pytest.raises(PruneZooError, match=f"{next(iter(bad))}=.*token_routing"):
            build_pruner("token_routing", **bad)
    for bad in ({"target": 1.0}, {"settling": 2.0}):
        with pytest.raises(PruneZooError, match=f"{next(iter(bad))}="):
            RoutingModule(str(tiny_llava.folder), build_pruner("token_routing"), "float32", **bad)
