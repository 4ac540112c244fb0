"""Compiled networks choose what they chose; what has no network is refused."""

import copy

import pytest
import torch
from made_inputs import ALL, build, make_inputs

from prunezoo import PruneZooError, compile_pruner
from prunezoo.core.compiled import networks

PLAIN = [name for name in ALL if not any(networks(build(name)))]
ASKED = ("ppm", "policy", "tail_drop", "explain_cnn", "m3")
"""Of the prompt stage; others have the same blocks."""


@pytest.mark.parametrize("name", ASKED)
def test_what_is_compiled_chooses_the_same(name):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    pruner, inputs = build(name), make_inputs(pad=3)
    twin = compile_pruner(copy.deepcopy(pruner), backend=backend)
    assert twin.state_dict().keys() == pruner.state_dict().keys()
    with torch.no_grad():
        ours, theirs = pruner(inputs, 7), twin(inputs, 7)
    assert graphs
    assert torch.equal(ours.index, theirs.index)
    torch.testing.assert_close(ours.kept_features(inputs), theirs.kept_features(inputs))


@pytest.mark.parametrize("name", PLAIN)
def test_without_a_network_it_is_refused(name):
    with pytest.raises(PruneZooError, match=f"'{name}' has no network"):
        compile_pruner(build(name))
