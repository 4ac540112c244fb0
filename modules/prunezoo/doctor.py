"""What works on a model, and why the rest does not: every method of the zoo is tried on it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from .core.base_model import BaseModel
from .core.budgets import Keep
from .core.config import fit_width
from .core.contract import Pruner
from .core.errors import PruneZooError
from .core.registry import list_pruners, pruner_class
from .host import attach
from .host.families import find_family

BASELINES = ("full", "none")
"""Methods that every table has and nobody attaches; `combined` is several of the others."""


@dataclass(frozen=True)
class Finding:
    """One method on the model.

    Attributes:
        method: its registry name.
        stage: where it acts: input, vision, prompt or layer.
        learned: it has weights, which must be trained for this model; here it was tried untrained.
        works: nothing stood in its way.
        why: what did; empty where it works.
    """

    method: str
    stage: str
    learned: bool
    works: bool
    why: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`doctor` found; as a string, a table.

    Attributes:
        model: class of the model.
        family: what people call its family; empty where it is not supported.
        tried: True: the model was run under each method; False: each was only put on it.
        findings: one for each method, by stage and name; none where the family is not supported.
        why: why it is not; empty where it is.
    """

    model: str
    family: str
    tried: bool
    findings: tuple[Finding, ...] = ()
    why: str = ""

    @property
    def working(self) -> tuple[str, ...]:
        """Names of the methods that work."""
        return tuple(found.method for found in self.findings if found.works)

    def __str__(self) -> str:
        """A line for each method."""
        if self.why:
            return f"{self.model}: nothing works: {self.why}"
        how = "run under each" if self.tried else "not run: give inputs to be sure"
        lines = [f"{self.model} ({self.family}): {len(self.working)} of {len(self.findings)} methods work ({how})"]
        for found in self.findings:
            kind = "learned: train it for this model" if found.learned else "ready"
            said = f"yes  ({kind})" if found.works else f"no   {found.why}"
            lines.append(f"  {found.stage:<7} {found.method:<16} {said}")
        return "\n".join(lines)


def doctor(vlm: Any, inputs: Mapping[str, Any] | None = None, keep: Keep = 0.5) -> Diagnosis:
    """Try every method of the zoo on a model, which is as before afterwards.

    Args:
        vlm: A model of `transformers`, perhaps with PEFT adapters around it.
        inputs: What its processor makes of a prompt with a picture, on the model's device. With it the model is run
            once under each method, which finds all that is in the way; without it methods are only put on, which finds
            what can be told of the model alone.
        keep: What is kept of the picture, as :func:`attach` takes it.

    Returns:
        A finding for each method; learned ones are tried as small, untrained instances of the right width.
    """
    name = type(vlm).__name__
    try:
        family = find_family(vlm)
    except PruneZooError as error:
        return Diagnosis(name, "", inputs is not None, why=_one_line(error))
    model = BaseModel.describe(vlm)
    widths = model.width, model.tower_width
    methods = [method for method in list_pruners() if method not in (*BASELINES, "combined")]
    found = [_try_method(vlm, method, widths, inputs, keep) for method in methods]
    findings = tuple(sorted(found, key=lambda finding: (finding.stage, finding.method)))
    return Diagnosis(name, family.title, inputs is not None, findings)


def _try_method(
    vlm: Any, method: str, widths: tuple[int, int], inputs: Mapping[str, Any] | None, keep: Keep
) -> Finding:
    """One method; what it raises is what is in its way, whatever that is."""
    cls, learned, why = pruner_class(method), False, ""
    try:
        pruner = small_pruner(method, *widths)
        learned = any(True for _ in pruner.parameters())
        with attach(vlm, pruner, keep), torch.no_grad():
            if inputs is not None and not bool(vlm(**inputs).logits[:, -1].isfinite().all()):
                why = "the model's logits are not finite under it"
    except PruneZooError as error:
        why = _one_line(error)
    except Exception as error:  # of a model that nobody has tried yet: said, and the next method is tried
        why = f"failed with {type(error).__name__}: {_one_line(error)}"
    return Finding(method, cls.stage, learned, not why, why)


def small_pruner(method: str, width: int, tower_width: int | None = None) -> Pruner:
    """An untrained instance of a method for tokens, and a tower, of these widths: as it is, or small where its width is
    configured.
    """
    cls = pruner_class(method)
    names = {field.name for field in fields(cls.config_class)}
    config = cls.tiny_config(width, width) if {"width", "inner_config", "tower_width"} & names else {}
    if tower_width is not None and "tower_width" in names:
        config["tower_width"] = tower_width
    return fit_width(cls(**config), width).eval()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
