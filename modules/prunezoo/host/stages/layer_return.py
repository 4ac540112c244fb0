"""The layer stage, on a prompt whose tokens come back: each of its stages chooses anew among all that there were.

A pruner asks for it by `comes_back`, a property where it depends on the config. In front of a stage the prompt gets its
whole width again. Tokens that the layers in front have read come as they are; the others, `PruneInputs.away`, as they
entered layer 0 ("raw"), or as they were when they left ("last"). Signals are read, the pruner is asked and the cut is
made on that; so layers behind a stage may hold more of the prompt in their cache than those in front.

Letters: B samples, C copies of a sample (beams), R images, N image tokens that the first stage finds, K of them left,
L columns of the prompt, S columns left of it, Q columns of a forward, D width.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...core.contract import PruneOutput
from .layer_prompt import Drop


class Return(Drop):
    """The prompt gets shorter, and longer again."""

    def __init__(self, *parts: Any) -> None:
        """As :class:`layer_prompt.Drop`."""
        super().__init__(*parts)
        self.whole, self.places = self.encoded, (self.columns, self.origin)
        self.states: Tensor | None = None  # (B * C, L, D) in which those come back that are away
        self.found = self.encoded.tokens  # (R,) by the stage that we stand at

    def arrive(self, layer: int, hidden: Tensor) -> Tensor:
        """All columns again, in front of a stage."""
        if self.states is None:  # at layer 0, or at the first stage
            self.states = hidden[:, : self.real.shape[1]]
        if layer not in self.plan.stages:
            return hidden
        self.found = self.encoded.tokens
        hidden = self.widen(hidden)
        if self.outputs:
            self.encoded = replace(self.whole, inputs=replace(self.whole.inputs, **self.latest()))
            self.columns, self.origin = self.places
            self.memo, self.segment = {}, None
        return hidden

    def widen(self, hidden: Tensor) -> Tensor:
        """``(B * C, L + …, D)``: states of all columns, for those of the ``S + …`` that are here."""
        assert self.states is not None
        (rows, length), width = self.states.shape[:2], self.columns.shape[1]
        at = self.columns.masked_fill(~self.encoded.mask, length).repeat_interleave(rows // len(self.columns), 0)
        states = torch.cat([self.states, self.states[:, :1]], 1)  # the last column takes the filler
        states = states.scatter(1, at[..., None].expand(-1, -1, states.shape[-1]), hidden[:, :width])[:, :length]
        if self.plan.pruner.comes_back == "last":
            self.states = states
        return torch.cat([states, hidden[:, width:]], 1)

    def latest(self) -> dict[str, Any]:
        """Of all tokens: which are away; and the signals, of each as last read, 0 where it never was."""
        whole, inputs = self.whole.inputs, self.encoded.inputs
        count = whole.valid.shape[1]
        at = self.origin.masked_fill(~inputs.valid, count)  # (R, K)

        def spread(values: Tensor, onto: Tensor) -> Tensor:
            onto = torch.cat([onto, onto[:, :1]], 1)
            places = at.view(*at.shape, *[1] * (values.dim() - 2)).expand_as(values)
            return onto.scatter(1, places, values)[:, :count]

        signals = {}
        for name, values in inputs.signals.items():
            never = values.new_zeros(len(at), count, *values.shape[2:])
            signals[name] = spread(values, whole.signals.get(name, never))
        return {"signals": signals, "away": spread(torch.zeros_like(inputs.valid), whole.valid)}

    def ask(self, layer: int, hidden: Tensor) -> PruneOutput:
        """As :meth:`layer_prompt.Prompt.ask`; signals and carry are remembered of those that leave, too."""
        output = super().ask(layer, hidden)
        inputs = replace(self.whole.inputs, signals=self.encoded.inputs.signals, carry=output.carry)
        self.whole = replace(self.whole, inputs=inputs)
        return output

    def note(self, layer: int, before: Tensor, after: Tensor) -> None:
        """What a stage found is what the layers in front of it had read."""
        super().note(layer, self.found, after)
