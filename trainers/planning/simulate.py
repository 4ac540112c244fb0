"""What a distillation step through a frozen language model needs, found out without its weights.

The model's own code runs on tensors that have a shape and a type and no contents; every allocation and release is
followed, and every operation counted. Decoders are stacks of one layer, so two shallow ones are run, and what a layer
more takes is carried on to the depth that is asked for.
"""

import copy
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from trainers.benchmarking.flops import counter

SHALLOW = (2, 4)
"""Depths that are run."""
ANSWER = 8
"""Answer tokens of a sample that are simulated."""


@dataclass(frozen=True)
class Pass:
    """What passes through the language model need, of one batch."""

    student_bytes: float  # at the peak of forward and backward pass, beyond the weights
    teacher_bytes: float  # at the peak of a forward pass without gradient
    forward_flops: float
    backward_flops: float

    def deeper(self, other: "Pass", depth: int) -> "Pass":
        """This one and that of a deeper model, carried on to a depth."""
        reach = (depth - SHALLOW[0]) / (SHALLOW[1] - SHALLOW[0])
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Pass(*(low + reach * (high - low) for low, high in pairs))


class Live(TorchDispatchMode):
    """Bytes of all tensors that are alive, but for those of a model.

    Args:
        model: Whose weights do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and look at what it made."""
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage())
        return out

    def note(self, storage: Any) -> None:
        """Count a storage until it is released."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.released, key, size)

    def released(self, key: int, size: int) -> None:
        """It is gone."""
        self.known.discard(key)
        self.bytes -= size


def simulate(
    text: Any,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    autocast: bool,
    fused: bool = True,
    recompute: bool = False,
) -> Pass:
    """Student's and teacher's passes.

    Args:
        text: Configuration of the language model, `config.get_text_config()`.
        dtype: That the frozen model is held in.
        batch: Samples at once.
        tokens: Of each.
        autocast: Whether the training runs under bfloat16 autocast.
        fused: Whether attention can be differentiated by its mask, in which soft gates stand, without keeping all its
            weights: GPUs have such a kernel, CPUs have none.
        recompute: Whether layers keep only what enters them.
    """
    passes = []
    for depth in SHALLOW:
        shallow = copy.deepcopy(text)
        shallow.num_hidden_layers = depth
        if getattr(shallow, "layer_types", None):
            shallow.layer_types = shallow.layer_types[:depth]
        passes.append(run(shallow, dtype, batch, tokens, autocast, fused))
    depth = text.num_hidden_layers
    if not recompute:
        return passes[0].deeper(passes[1], depth)
    one = passes[0].deeper(passes[1], 1)  # all of it is there for one layer at a time
    whole = passes[0].deeper(passes[1], depth)
    entering = depth * batch * tokens * text.hidden_size * dtype.itemsize
    backward = whole.backward_flops + whole.forward_flops
    return Pass(one.student_bytes + entering, whole.teacher_bytes, whole.forward_flops, backward)


def run(text: Any, dtype: torch.dtype, batch: int, tokens: int, autocast: bool, fused: bool = True) -> Pass:
    """The same at the depth of the configuration."""
    mixed = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with FakeTensorMode(), mixed:
        model = AutoModelForCausalLM.from_config(text, dtype=dtype).eval().requires_grad_(False)
        inputs = torch.empty(batch, tokens, text.hidden_size, dtype=dtype)
        positions = torch.arange(tokens).expand(batch, tokens)
        mask = torch.empty(batch, 1, tokens, tokens, dtype=dtype)  # that of soft gates
        flops = counter()

        def forward(embeddings: Tensor) -> Tensor:
            out = model(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False)
            return out.logits

        with torch.no_grad(), Live(model) as teacher, flops:
            forward(inputs)
        forward_flops = flops.get_total_flops()
        (inputs if fused else mask).requires_grad_()
        with Live(model) as student, flops:
            logits = forward(inputs)
            logits[:, -ANSWER:].float().log_softmax(-1).sum().backward()
        both = flops.get_total_flops()
    return Pass(student.peak, teacher.peak, forward_flops, both - forward_flops)


@dataclass(frozen=True)
class Weights:
    """Parameters of a model, by part."""

    vision: int  # all but the language model
    language: int
    layer: int  # of one decoder layer
    embedding: int  # the largest single matrix


def count_weights(config: Any) -> Weights:
    """Of a vision-language model, from its configuration."""
    with torch.device("meta"):
        vlm = AutoModelForImageTextToText.from_config(config)
    total = sum(p.numel() for p in vlm.parameters())
    decoder = vlm.get_decoder()
    head = vlm.get_output_embeddings().weight
    tied = head is vlm.get_input_embeddings().weight
    language = sum(p.numel() for p in decoder.parameters()) + (0 if tied else head.numel())
    layer = sum(p.numel() for p in decoder.layers[0].parameters())
    return Weights(total - language, language, layer, max(p.numel() for p in vlm.parameters()))


def vision_flops(weights: Weights, patches: int) -> float:
    """Of the tower on one picture, by its matrices alone: two for each weight and patch."""
    return 2.0 * weights.vision * patches
