"""What a training needs: memory of a GPU by part, operations, hours, tokens, sizes of caches."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from prunezoo.core.config import fit_width
from prunezoo.core.hub import DTYPES
from prunezoo.core.prefill import Prefill

from .simulate import ANSWER, Pass, Weights, count_weights, simulate, vision_flops

TERA = 1e12
LIVE = 10**9
"""Parameters that ZeRO-3 lets lie gathered, its default."""
BACKWARD = ("relevance", "lrp", "grad_attention")
"""Guides that take a backward pass; counted once, though the last one takes it for each token of the answer."""


@dataclass(frozen=True)
class Job:
    """What is to be planned."""

    recipe: Any  # the parsed configuration
    config: Any  # of the frozen model
    gpus: int
    tokens: int  # of a sample
    image_tokens: int

    @property
    def model(self) -> Any:
        """The recipe's model."""
        return self.recipe.model.init_args

    @property
    def batch(self) -> int:
        """Samples of a GPU at once."""
        return self.recipe.data.init_args.batch_size

    @property
    def samples(self) -> int:
        """Of a step of all GPUs together."""
        return self.batch * self.gpus * self.recipe.trainer.accumulate_grad_batches

    @property
    def dtype(self) -> torch.dtype:
        """That the frozen model is held in."""
        named = self.model.vlm_dtype
        stored = str(getattr(self.config, "dtype", None) or "bfloat16").removeprefix("torch.")
        return DTYPES[stored if named == "auto" else named]

    @property
    def strategy(self) -> str:
        """`single`, `ddp`, `zero1` to `zero3` or `fsdp2`."""
        strategy = self.recipe.trainer.strategy
        if strategy in (None, "auto"):
            return "single" if self.gpus == 1 else "ddp"
        if isinstance(strategy, str):
            return strategy
        name = strategy.class_path.rpartition(".")[2].lower()
        return f"{name}{strategy.init_args.stage}" if name == "zero" else name


def pruner_size(recipe: Any, config: Any) -> int:
    """Parameters that are trained, of a pruner that suits the model of a configuration."""
    said = recipe.model.init_args.pruner.as_dict()
    place, _, name = said["class_path"].rpartition(".")
    cls = getattr(import_module(place), name)
    with torch.device("meta"):
        pruner = cls(**(said.get("init_args", {}).get("config") or {}))
        widths = config.get_text_config().hidden_size, config.vision_config.hidden_size
        pruner = fit_width(pruner, *widths, Prefill.of(config))
    return sum(p.numel() for p in pruner.parameters() if p.requires_grad)


def memory(job: Job, weights: Weights, passes: Pass, trained: int) -> dict[str, float]:
    """Bytes of one GPU, by part."""
    share, size = job.gpus, job.dtype.itemsize
    everything = (weights.vision + weights.language) * size
    sharded = job.strategy in ("zero3", "fsdp2")
    stage = {"zero1": 1, "zero2": 2, "zero3": 3, "fsdp2": 3}.get(job.strategy, 0)
    gathered = {"zero3": min(LIVE * size, everything), "fsdp2": 2 * weights.embedding * size}.get(job.strategy, 0)
    return {
        "frozen model": everything / share if sharded else everything,
        "frozen model, gathered for the moment": gathered,
        "pruner": 4 * trained / (share if stage >= 3 else 1),
        "gradients": 4 * trained / (share if stage >= 2 else 1),
        "AdamW": 8 * trained / (share if stage >= 1 else 1),
        "activations, logits, losses": max(passes.student_bytes, passes.teacher_bytes),
    }


def step_flops(job: Job, passes: Pass, vision: float) -> tuple[float, float, float]:
    """Operations of a step of one GPU: in the first stage, in the second, in the second with the cache of answers."""
    through = passes.forward_flops + passes.backward_flops
    first = job.batch * vision + (through if job.model.guide in BACKWARD else passes.forward_flops)
    guided = job.model.guide_weight > 0
    teacher = (through if job.model.guide in BACKWARD else passes.forward_flops) if guided else passes.forward_flops
    second = job.batch * vision + teacher + through
    cached = second if guided else job.batch * vision + through
    times = job.recipe.trainer.accumulate_grad_batches
    return times * first, times * second, times * cached


def plan(job: Job, tflops: float, items: int | None) -> dict[str, Any]:
    """All numbers."""
    weights, trained = count_weights(job.config), pruner_size(job.recipe, job.config)
    text = job.config.get_text_config()
    autocast = job.recipe.trainer.precision == "bf16-mixed"
    passes = simulate(text, job.dtype, job.batch, job.tokens, autocast, recompute=job.model.recompute)
    vision = job.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    first, second, cached = step_flops(job, passes, vision_flops(weights, patches))
    steps, share = job.recipe.trainer.max_steps, job.model.guide_share
    count = items or steps * job.samples
    flops = steps * (share * first + (1 - share) * second)
    with_cache = steps * (share * first + (1 - share) * cached)
    return {
        "parameters": {"vision": weights.vision, "language": weights.language, "trained": trained},
        "memory": memory(job, weights, passes, trained),
        "flops_per_step": {"first stage": first, "second stage": second, "second stage, cached answers": cached},
        "steps": steps,
        "tokens": steps * job.samples * job.tokens,
        "hours": flops / (tflops * TERA) / 3600,
        "hours_cached": with_cache / (tflops * TERA) / 3600,
        "items": count,
        "caches": {
            "answers, 64 likeliest tokens": count * (16 + ANSWER * (6 * 64 + 4)),
            "one hidden state of them": count * ANSWER * 2 * text.hidden_size,
            "relevance maps": count * (16 + 8 * job.image_tokens),
        },
    }
