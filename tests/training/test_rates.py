"""DiffRate's rates learn, and towards their target."""

import pytest
import torch
from tiny_llava import make_image

from prunezoo import PruneZooError, build_pruner
from prunezoo.core.schedule import Schedule
from trainers.benchmarking.flops import counted_flops
from trainers.planning.costs import layer_costs, tower_costs
from trainers.training.gated_tower import cost_share
from trainers.training.rates import RatesModule


def module_of(tiny_llava, **options):
    pruner = build_pruner("diffrate", blocks=2, tokens=36)
    return RatesModule(str(tiny_llava.folder), pruner, vlm_dtype="float32", **options)


def batch_of(tiny_llava):
    batch = tiny_llava.batch(["<s> USER: <image> what color ? ASSISTANT: red"] * 2, [[make_image(0)], [make_image(1)]])
    labels = batch["input_ids"].clone()
    labels[:, :-1] = -100
    return {**batch, "labels": labels}


def step(module, batch):
    module.log = module.log_dict = lambda *_, **__: None
    module.total_steps = 10
    return module.training_step(dict(batch), 0)


def cost_of(module):
    return cost_share(module.vlm.config, torch.tensor(36.0), module.left(None)).item()  # the rates alone say it


def test_rates_learn_and_costs_come_nearer_to_the_target(tiny_llava):
    module, batch = module_of(tiny_llava, target=0.9, cost_weight=100.0), batch_of(tiny_llava)
    optimizer = torch.optim.AdamW(module.pruner.parameters(), lr=0.1, weight_decay=0)
    before = cost_of(module)
    for _ in range(15):
        optimizer.zero_grad()
        step(module, batch).backward()
        optimizer.step()
    assert abs(before - 0.9) > 0.1 and abs(cost_of(module) - 0.9) < abs(before - 0.9) / 3
    assert isinstance(module.pruner.as_schedule(), Schedule)
    assert all(parameter.grad is None for parameter in module.vlm.parameters())


def test_the_distance_to_the_target_can_wait(tiny_llava):
    waiting, batch = module_of(tiny_llava, free=0.5, target=0.1), batch_of(tiny_llava)
    pressing = module_of(tiny_llava, target=0.1)
    assert step(pressing, batch) > step(waiting, batch) + 1


def test_costs_are_shares_of_operations(tiny_llava):
    """All in front, 20 of 36 behind the second block's attention: untrained."""
    module, vlm = module_of(tiny_llava), tiny_llava.vlm
    vision, text = vlm.config.vision_config, vlm.config.text_config
    left = [36, 20]
    states = torch.randn(1, 20, vision.hidden_size)
    _, mlp = counted_flops(lambda: vlm.model.vision_tower.encoder.layers[0].mlp(states))
    behind = mlp / 20
    tower = 2 * (tower_costs(vision, 36) - 36 * behind) + sum(left) * behind
    ours = tower + text.num_hidden_layers * layer_costs(text, 20)
    whole = 2 * tower_costs(vision, 36) + text.num_hidden_layers * layer_costs(text, 36)
    assert cost_of(module) == pytest.approx(ours / whole, rel=1e-5)


def test_what_cannot_be_trained_is_refused(tiny_llava):
    for options in ({"target": 1.0}, {"free": 1.0}):
        with pytest.raises(PruneZooError, match=f"{next(iter(options))}=1.0"):
            module_of(tiny_llava, **options)
    with pytest.raises(PruneZooError, match=r"blocks=3: the tower runs 2"):
        RatesModule(str(tiny_llava.folder), build_pruner("diffrate", blocks=3, tokens=36), vlm_dtype="float32")
    other = RatesModule(str(tiny_llava.folder), build_pruner("diffrate", blocks=2, tokens=40), vlm_dtype="float32")
    with pytest.raises(PruneZooError, match=r"tokens=40: pictures have \[36\]"):
        step(other, batch_of(tiny_llava))
