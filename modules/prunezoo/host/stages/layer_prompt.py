"""The layer stage, on a prompt: signals read, pruner asked, tokens dropped or gated, in front of some decoder layers.

Letters: B samples, C copies of a sample (beams), R images, N image tokens alive, T words, L columns of the prompt,
S columns left of it, Q columns of a forward (the prompt's, and any behind), D width.
"""

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...core.budgets import counts_of
from ...core.checks import Check, deferred
from ...core.contract import PruneOutput
from ...core.errors import PruneZooError
from ...core.memory import Memory
from ...core.plan import gather_rows
from ...core.signals import Signal
from ..encoded import Encoded, put
from ..parts.decoder import take_columns, take_tokens
from ..signals.entry import Entry
from ..signals.language import read_layer
from .cut import Cut, Timer
from .layer_cache import Keywords, Past, Segment, cut_mask
from .layer_plan import LayerPlan
from .prompt import gate_weights

BY_TOKEN = ("per_layer_input", "moe_mm_token_type_ids")
"""Keywords of layers that have a value for each column, another one in each layer."""


class Prompt:
    """A prompt on its way through the layers."""

    def __init__(self, plan: LayerPlan, encoded: Encoded) -> None:
        self.plan, self.decoder = plan, plan.decoder
        self.encoded = replace(encoded, deep=())  # what is left of it
        self.schedule = list(encoded.planned)
        if not plan.begun:
            self.encoded = replace(self.encoded, inputs=replace(encoded.inputs, carry={}))  # of a pruner before
            counts = encoded.inputs.counts
            asked, found = (torch.tensor(numbers) for numbers in (counts_of(plan.keep, counts), counts))
            self.schedule = plan.pruner.steps(asked, found, self.decoder.depth)
        self.origin = torch.arange(encoded.slots.shape[1], device=encoded.slots.device).expand_as(
            encoded.slots
        )  # (R, N)
        self.outputs: list[PruneOutput] = []  # by stage, each in slots of the tokens it found
        self.cuts: list[Cut] = []
        self.checks: list[Check] = []  # to be settled when the forward is done
        self.timer = Timer(encoded.slots.device)  # of signals and pruner since the last cut
        self.memo: dict[Any, Keywords] = {}
        self.memory: Memory | None = None  # of the streams, for a pruner that remembers

    @property
    def output(self) -> PruneOutput:
        """What is left at the end, in slots of the tokens that came; scores and gates only if there was one stage."""
        last = self.outputs[-1]
        if len(self.outputs) == 1:
            return last
        return PruneOutput(self.origin.masked_fill(~last.valid, 0), last.valid, last.features)

    def layer(self, layer: int, hidden: Tensor, kwargs: Keywords) -> tuple[Tensor, Keywords]:
        """What a layer is given, for what the decoder hands it: ``hidden (B * C, S, D)`` and keywords for Q columns."""
        if not self.cuts:
            self.check(layer, hidden, kwargs.get("past_key_values"))
        hidden = self.arrive(layer, hidden)
        self.read(layer, True, hidden, kwargs)
        if layer in self.plan.stages:
            hidden = self.cut(layer, hidden, kwargs)
        self.read(layer, False, hidden, kwargs)
        return hidden, self.adjust(layer, hidden, kwargs)

    def check(self, layer: int, hidden: Tensor, cache: Any) -> None:
        """Refuse what cannot be shortened."""
        filled = cache is not None and not self.decoder.recurrent(layer) and cache.get_seq_length(layer)
        if hidden.shape[1] < self.encoded.mask.shape[1] or filled:
            raise PruneZooError("the layer stage needs the whole prompt in one forward: leave prefill_chunk_size unset")
        if cache is not None and cache.is_compileable:
            raise PruneZooError("the layer stage shortens the KV cache, a static one cannot be: use a dynamic cache")
        module = self.decoder.layers[layer]
        if type(module).__call__ is not nn.Module.__call__ and module.training and module.gradient_checkpointing:
            # It is around the hooks, which would prune a second time when the forward is computed again.
            raise PruneZooError(
                "gradient checkpointing in the layer stage needs a release of transformers that wraps only the forward "
                "of a layer, as 5.23 does: upgrade it"
            )

    def adjust(self, layer: int, hidden: Tensor, kwargs: Keywords) -> Keywords:
        """The keywords as they must be behind the cuts so far; made once for all layers of a type."""
        key = self.decoder.layer_type(layer), self.decoder.source(layer) == layer
        if key not in self.memo:
            self.memo[key] = self.replacements(layer, hidden, kwargs)
        return {**kwargs, **self.memo[key]}

    def arrive(self, layer: int, hidden: Tensor) -> Tensor:
        """What comes to a layer, before anything is read or asked: the hidden states, if need be of more tokens."""
        return hidden

    def replacements(self, layer: int, hidden: Tensor, kwargs: Keywords) -> Keywords:
        """Those keywords that change."""
        raise NotImplementedError

    def cut(self, layer: int, hidden: Tensor, kwargs: Keywords) -> Tensor:
        """Ask the pruner and do what it says; returns the hidden states that enter the layer."""
        raise NotImplementedError

    def once(self, values: Tensor, dim: int = 0) -> Tensor:
        """The first copy of each sample: B of the B * C along ``dim``; a single one for all stays."""
        copies = max(1, values.shape[dim] // len(self.encoded.mask))
        return values.unflatten(dim, (-1, copies)).select(dim % values.dim() + 1, 0)

    def read(self, layer: int, own: bool, hidden: Tensor, kwargs: Keywords) -> None:
        """Read the signals that are made of a layer's input."""
        signals = self.plan.readings.get((layer, own))
        if signals is None:
            return
        kwargs = self.adjust(layer, hidden, kwargs)
        with self.timer.running():
            self._read(signals, layer, self.once(hidden), kwargs)

    def _read(self, signals: dict[str, Signal], layer: int, hidden: Tensor, kwargs: Keywords) -> None:
        """Of what enters the layer for one copy of each sample, ``(B, S, D)``."""
        hidden, mask, given = self.once(hidden), kwargs["attention_mask"], kwargs["position_embeddings"]
        rotary: Any = self.once(given) if isinstance(given, Tensor) else tuple(self.once(t, dim=-3) for t in given)
        entry = Entry(hidden, rotary, None if mask is None else self.once(mask))
        images = self.encoded.sample, self.encoded.slots, self.encoded.inputs.valid
        values = {
            name: read_layer(self.decoder, signal, layer, entry, self.encoded.words, *images)
            for name, signal in signals.items()
        }
        inputs = self.encoded.inputs
        self.encoded = replace(self.encoded, inputs=replace(inputs, signals={**inputs.signals, **values}))

    def ask(self, layer: int, hidden: Tensor) -> PruneOutput:
        """Call the pruner on what stands in front of a layer."""
        step, hidden, encoded = len(self.cuts), self.once(hidden), self.encoded
        columns, real = encoded.words
        inputs = replace(
            encoded.inputs,
            features=gather_rows(hidden[encoded.sample], encoded.slots),
            text=gather_rows(hidden, columns)[encoded.sample],
            text_valid=real[encoded.sample],
            layer=layer,
            depth=self.decoder.depth,
            step=step + self.plan.begun,
        )
        whose = encoded.rows, len(encoded.real)
        if self.memory is not None:
            inputs = self.memory.recall(self.plan.pruner, inputs, *whose)
        with self.timer.running(), deferred() as checks:
            asked = self.schedule[step].minimum(torch.tensor(inputs.counts)).clamp_min(1)
            output = self.plan.pruner(inputs, self.plan.pruner.step(inputs, asked, len(self.schedule) - 1 - step))
        if self.memory is not None:
            self.memory.note(self.plan.pruner, inputs, output, *whose)
        self.checks += checks
        self.outputs.append(output)
        self.encoded = replace(encoded, inputs=inputs)
        return output

    def note(self, layer: int, before: Tensor, after: Tensor) -> None:
        """Note a cut, ``(R,)`` tokens found and left."""
        self.cuts.append(Cut("layer", layer, before, after, self.timer))
        self.timer = Timer(self.timer.device)


class Drop(Prompt):
    """The prompt gets shorter."""

    def __init__(
        self,
        plan: LayerPlan,
        encoded: Encoded,
        labels: Tensor | None,
        pasts: WeakKeyDictionary[Any, Past],
    ) -> None:
        super().__init__(plan, encoded)
        self.labels, self.real, self.pasts = labels, encoded.mask, pasts
        self.columns = torch.arange(self.real.shape[1], device=self.real.device).expand_as(self.real)  # (B, S) original
        self.behind = 0  # columns of the forward behind the prompt
        self.segments: list[Segment] = []
        self.segment: Segment | None = None  # that of the layer we stand at

    def cut(self, layer: int, hidden: Tensor, kwargs: Keywords) -> Tensor:
        """Ask the pruner and drop."""
        output, encoded, copies = self.ask(layer, hidden), self.encoded, len(hidden) // len(self.real)
        self.behind = hidden.shape[1] - encoded.mask.shape[1]
        if output.features is not None:
            slots = gather_rows(encoded.slots, output.index)
            for copy in range(copies):
                rows = encoded.sample * copies + copy
                hidden = put(hidden, rows, slots, output.valid, output.features.to(hidden.dtype))
        plan, lines = encoded.plan(output)
        self.origin = gather_rows(self.origin, output.index)
        self.encoded = encoded.after(output, plan, lines, {"attention_mask": plan.valid})
        self.note(layer, encoded.tokens, self.encoded.tokens)
        if not plan.identity or self.segments:  # all of them may have come back
            self.columns = plan.take(self.columns, 0)
            width, index = encoded.mask.shape[1], plan.index.repeat_interleave(copies, 0)
            hidden = torch.cat([gather_rows(hidden[:, :width], index), hidden[:, width:]], 1)
            self.memo, self.segment = {}, self.make_segment(layer, copies)
            self.segments.append(self.segment)
            if self.labels is not None and self.encoded.labels is not None:
                self.labels.data = self.encoded.labels
        if kwargs.get("past_key_values") is not None:
            past = Past(self.real.shape[1], tuple(self.segments))
            self.pasts[kwargs["past_key_values"]] = past
        return hidden

    def make_segment(self, layer: int, copies: int) -> Segment:
        """What the layers from this one on have."""
        valid = self.encoded.mask
        if 0 in self.encoded.real:
            raise PruneZooError(
                f"pruner '{self.plan.pruner.name}' left nothing of a prompt in front of layer {layer}: "
                "put words beside its images"
            )
        moved = self.real.cumsum(1).gather(1, self.columns) - valid.cumsum(1)
        full = set(self.encoded.real) == {valid.shape[1]}  # else there is filler or padding
        columns, valid, moved = (part.repeat_interleave(copies, 0) for part in (self.columns, valid, moved))
        return Segment(layer, columns, valid, full, moved.masked_fill(~valid, 0))

    def adjust(self, layer: int, hidden: Tensor, kwargs: Keywords) -> Keywords:
        """Also what the decoder hands over anew to each layer."""
        given = {name: kwargs[name] for name in BY_TOKEN if isinstance(kwargs.get(name), Tensor)}
        changed = super().adjust(layer, hidden, kwargs)
        if self.segment is not None and given and self.handed(kwargs) == self.real.shape[1] + self.behind:
            columns, _ = self.left(self.segment, hidden)
            given = {name: take_tokens(values, columns) for name, values in given.items()}
        return {**changed, **given}

    def handed(self, kwargs: Keywords) -> int:
        """How many columns, the last ones, the decoder means: where layers borrow keys, those with a logit."""
        rotary = kwargs["position_embeddings"]
        return int((rotary if isinstance(rotary, Tensor) else rotary[0]).shape[-2])

    def left(self, segment: Segment, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of the forward that are left, and which of them may be seen."""
        # Behind the prompt there may be candidates of assisted decoding, or words written without a cache.
        return segment.extend(self.real.shape[1], segment.valid.new_ones(len(hidden), self.behind))

    def replacements(self, layer: int, hidden: Tensor, kwargs: Keywords) -> Keywords:
        """Mask and positions of the columns that are left."""
        segment, mask = self.segment, kwargs["attention_mask"]
        if segment is None:
            return {}
        columns, seen = self.left(segment, hidden)
        if self.decoder.recurrent(layer):  # it is told of padding only
            return {"attention_mask": None if segment.full else seen.long()}
        if self.handed(kwargs) < self.real.shape[1] + self.behind:
            return self.last_replacements(layer, hidden, kwargs, columns, seen)
        if mask is not None and mask.dim() == 4:
            if self.decoder.flash:
                raise PruneZooError("flash attention takes no mask of four dimensions: use attn_implementation 'sdpa'")
            mask = mask.expand(len(hidden), -1, -1, -1)
            mask = mask.gather(2, columns[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
            mask = take_keys(mask, columns, seen)
        else:
            mask = cut_mask(self.decoder, layer, hidden, columns, columns, seen, segment.full)
        changed: Keywords = {"attention_mask": mask}
        if self.plan.positions == "compact" or self.decoder.scales_by_position:
            positions = kwargs["position_ids"].expand(len(hidden), -1).gather(1, columns)
        if self.plan.positions == "compact":
            positions = positions - torch.cat([segment.moved, segment.moved[:, -1:].expand(-1, self.behind)], 1)
            changed["position_embeddings"] = self.decoder.rotary(hidden, positions, layer)
        else:
            changed["position_embeddings"] = take_columns(kwargs["position_embeddings"], columns)
        # Most layers rotate by the embeddings; then position ids are for kernels only that look for seams in them.
        plain = torch.arange(columns.shape[1], device=columns.device)[None]
        changed["position_ids"] = positions if self.decoder.scales_by_position else plain
        return changed

    def last_replacements(
        self, layer: int, hidden: Tensor, kwargs: Keywords, columns: Tensor, seen: Tensor
    ) -> Keywords:
        """Of a layer that attends to another's keys, and is given the last columns only: those with a logit."""
        count, width, mask = self.handed(kwargs), self.real.shape[1] + self.behind, kwargs["attention_mask"]
        last = torch.arange(width - count, width, device=columns.device)
        if count > columns.shape[1] or not bool((columns[:, -count:] == last).all()):
            raise PruneZooError(
                f"logits of the last {count} columns are asked for, and the layer stage took image tokens out of them: "
                "leave logits_to_keep, or put words behind the images"
            )
        if mask is None:
            return {"attention_mask": cut_mask(self.decoder, layer, hidden, columns[:, -count:], columns, seen, False)}
        return {"attention_mask": take_keys(mask.expand(len(hidden), -1, -1, -1), columns, seen)}


def take_keys(mask: Tensor, columns: Tensor, seen: Tensor) -> Tensor:
    """A mask ``(B * C, 1, Q, M)``, bool or to add, of keys ``columns (B * C, S)``; what is not ``seen`` is hidden."""
    mask = mask.gather(3, columns[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
    filler = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(~seen[:, None, None], filler)


class Gate(Prompt):
    """Nothing gets shorter; the image tokens weigh as much in every attention as the gates so far say."""

    def __init__(self, plan: LayerPlan, encoded: Encoded, leak: float) -> None:
        super().__init__(plan, encoded)
        self.leak = leak
        self.bias: Tensor | None = None  # (B, L) log of the gates' product

    def cut(self, layer: int, hidden: Tensor, kwargs: Keywords) -> Tensor:
        """Ask the pruner and remember its gates."""
        output, name = self.ask(layer, hidden), self.plan.pruner.name
        if output.gates is None or output.features is not None:
            raise PruneZooError(f"pruner '{name}' gave no gates: put it in training mode; merging has none")
        bias = gate_weights(self.encoded, output.gates, self.leak).log()
        self.bias = bias if self.bias is None else self.bias + bias
        self.origin, self.memo = output.index, {}
        before, self.encoded = self.encoded.tokens, self.encoded.still_open(output)
        self.note(layer, before, self.encoded.tokens)
        return hidden

    def replacements(self, layer: int, hidden: Tensor, kwargs: Keywords) -> Keywords:
        """The mask with the logarithm of the gates in it."""
        if self.bias is None:
            return {}
        mask, length, lowest = kwargs["attention_mask"], hidden.shape[1], torch.finfo(hidden.dtype).min
        if mask is None:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=hidden.device).tril()
        if mask.dtype == torch.bool:
            mask = torch.zeros((), dtype=hidden.dtype, device=hidden.device).where(mask, lowest)
        return {"attention_mask": (mask + self.bias[:, None, None]).clamp_min(lowest).to(hidden.dtype)}
