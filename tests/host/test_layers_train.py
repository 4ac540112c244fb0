"""Training through the layer stage: gates against the drop, exact gradients, gradient checkpointing."""

import pytest
import torch
from layer_oracle import Watch
from layer_pruners import RAGGED, Ranked, Scripted, Together, scripted
from tiny_llava import make_llava

from prunezoo import PruneZooError, attach, build_pruner, encode, full_forward
from prunezoo.core.contract import PruneOutput
from prunezoo.host import run_gated, run_pruned


def test_gates_equal_the_drop_and_reach_every_stage(deep_llava, mixed):
    vlm = deep_llava.vlm
    encoded = encode(vlm, mixed)
    for pruner in (scripted(2), scripted(1, 3), Together(Ranked(), scripted(1, 3))):
        hard = run_pruned(vlm, encoded, pruner.eval(), RAGGED)
        host, outputs = run_gated(vlm, encoded, pruner.train(), RAGGED, log_eps=1e-8)
        torch.testing.assert_close(host.logits[:, -1], hard.host.logits[:, -1], rtol=0, atol=5e-5)
        assert torch.equal(outputs[-1].index.sort()[0], hard.output.index.sort()[0])
        assert host.logits.shape[1] == mixed["input_ids"].shape[1]
        assert (host.logits - full_forward(vlm, encoded).logits)[:2, -1].abs().max() > 1e-3


class Weighted(Scripted):
    """Soft gates from a learned weight a stage."""

    exact = False

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.layers = (1, 3)

    def reduce(self, inputs, keep):
        output = super().reduce(inputs, keep)
        gates = (self.score(inputs) + self.weight[inputs.step]).sigmoid() * inputs.valid
        return PruneOutput(output.index, output.valid, gates=gates) if self.training else output


@pytest.mark.parametrize("checkpointing", [False, True])
def test_soft_gates_multiply_and_get_exact_gradients(mixed, checkpointing):
    vlm = make_llava(num_hidden_layers=4).double()
    if checkpointing:
        vlm.gradient_checkpointing_enable()
        vlm.train()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in mixed.items()}
    encoded, pruner = encode(vlm, batch), Weighted().double().train()

    def loss():
        host, outputs = run_gated(vlm, encoded, pruner, 5)
        assert all(output.gates.shape == (4, 36) for output in outputs)  # what is ajar is still there
        return host.logits[:, -1].square().sum()

    loss().backward()
    for number in range(2):
        with torch.no_grad():
            pruner.weight[number] += 0.05  # norms compute in float32 whatever the type of the model, so no smaller
            high = loss()
            pruner.weight[number] -= 0.1
            low = loss()
            pruner.weight[number] += 0.05
        assert float(pruner.weight.grad[number]) == pytest.approx(float(high - low) / 0.1, rel=0.02)
        assert pruner.weight.grad[number].abs() > 1e-6


def test_what_has_no_gates_is_refused(deep_llava, mixed):
    encoded = encode(deep_llava.vlm, mixed)
    with pytest.raises(PruneZooError, match="'scripted' gave no gates"):
        run_gated(deep_llava.vlm, encoded, scripted(1), 5)
    with pytest.raises(PruneZooError, match="'uniform' gave no gates"):
        run_gated(deep_llava.vlm, encoded, build_pruner("uniform").train(), 5)


def test_hooks_run_once_under_gradient_checkpointing(mixed):
    vlm = make_llava(num_hidden_layers=4)
    projector = vlm.model.multi_modal_projector.linear_2.weight.requires_grad_()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            vlm.gradient_checkpointing_enable()
        vlm.train()
        projector.grad, pruner = None, scripted(1, 3)
        with attach(vlm, pruner, keep=RAGGED) as run, Watch(pruner) as watch:
            vlm(**mixed, use_cache=False).logits[:, -1].sum().backward()
        assert len(watch.calls) == 2 and run.stats.after == RAGGED.tolist()
        gradients.append(projector.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)
