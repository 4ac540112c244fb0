"""LoRA (Hu et al., arXiv 2106.09685) on the language model of a frozen vision-language model, through PEFT.

The matrices live outside of the model. They act only inside :meth:`Lora.ready`, and there only while switched on: then
PEFT's layers stand in the place of the model's own linear maps, which they hold and call. Off, or after leaving, the
model's own maps are back, the very same objects; nothing is merged, so nothing has to be undone by arithmetic.

Saved in PEFT's own format (``adapter_config.json``, ``adapter_model.safetensors``), which names modules as they are
called in the whole vision-language model: ``PeftModel.from_pretrained(vlm, folder)`` reads it without this library.
"""

import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...core.errors import PruneZooError
from ...core.files import read_json, read_tensors
from ...core.hub import Part
from .decoder import Decoder

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before the name of a module


class Lora(Part):
    """Low-rank updates of the attention and feed-forward maps of a language model.

    Empty until :meth:`fit` gives it the sizes of a model, or :meth:`load` its weights; empty, it changes nothing.

    Args:
        rank: Of the updates, >= 1.
        alpha: The update is ``alpha / rank`` times the product of the two matrices.
    """

    files = (CONFIG_FILE, WEIGHTS_FILE)

    def __init__(self, rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha
        # "<module>/lora_A" (rank, in) and "<module>/lora_B" (out, rank); dots are not allowed in names of parameters
        self.weights = nn.ParameterDict()
        self.base = ""  # folder or Hub id of the model that it was made for
        self._layers: dict[str, Any] = {}  # PEFT's, by module; between uses they hold nothing of a model
        self._ready: ref[Ready] | None = None  # that of :meth:`ready`; weak: one that an interrupt lost is none

    def fit(self, vlm: PreTrainedModel) -> None:
        """Take the sizes of a model and start anew: A at random, B zero, so that nothing changes before training."""
        self.base = vlm.name_or_path
        self.weights, self._layers = nn.ParameterDict(), {}
        for name, linear in find_targets(vlm).items():
            a = torch.empty(self.rank, linear.in_features)
            nn.init.kaiming_uniform_(a, a=5**0.5)
            self._add(name, a, torch.zeros(linear.out_features, self.rank))

    def _add(self, name: str, a: Tensor, b: Tensor) -> None:
        key = name.replace(".", "/")
        self.weights[f"{key}/lora_A"], self.weights[f"{key}/lora_B"] = nn.Parameter(a), nn.Parameter(b)

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        key = name.replace(".", "/")
        return self.weights[f"{key}/lora_A"], self.weights[f"{key}/lora_B"]

    def ready(self, vlm: PreTrainedModel) -> AbstractContextManager[None]:
        """Be able to :meth:`switch` on a model, off at first; on leaving the model is what it was.

        Raises:
            PruneZooError: On entering: the matrices do not fit the model, or are in use already, or peft is not
                installed.
        """
        return Ready(self, vlm) if len(self.weights) else nullcontext()

    def switch(self, on: bool) -> None:
        """Turn the updates on or off; without effect outside of :meth:`ready`."""
        ready = self._ready() if self._ready is not None else None
        if ready is not None:
            ready.switch(on)

    def _build(self, linears: dict[str, nn.Linear]) -> dict[str, Any]:
        """PEFT's layers around linear maps, by name, without weights."""
        peft = import_peft()
        # PEFT is given a list of the maps, not the model, of which nothing but `requires_grad` is then its to change.
        listed = nn.ModuleDict({name.replace(".", "/"): linear for name, linear in linears.items()})
        trainable = [parameter for parameter in listed.parameters() if parameter.requires_grad]
        config = peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(listed))
        peft.inject_adapter_in_model(config, listed, low_cpu_mem_usage=True)
        for parameter in trainable:
            parameter.requires_grad_(True)
        return {name: listed[name.replace(".", "/")] for name in linears}

    def _check(self, linears: dict[str, nn.Linear]) -> None:
        """Refuse a model that has other maps, or other sizes, than the one that this was made for."""
        ours = {key.rpartition("/")[0].replace("/", ".") for key in self.weights}
        made_for = f"made for {self.base or 'another model'}"
        for name in sorted(ours ^ linears.keys()):
            whose = "this LoRA has no matrices for it" if name in linears else "the model has no such map"
            raise PruneZooError(f"LoRA {made_for}: '{name}': {whose}; use the model that it was trained with")
        for name, linear in linears.items():
            a, b = self._pair(name)
            if (b.shape[0], a.shape[1]) != (linear.out_features, linear.in_features):
                raise PruneZooError(
                    f"LoRA {made_for}: '{name}' maps {a.shape[1]} to {b.shape[0]} numbers there, "
                    f"{linear.in_features} to {linear.out_features} in this model; use the model it was trained with"
                )

    def save(self, folder: Path) -> None:
        """Write PEFT's two files."""
        names = [key.replace("/", ".") for key in self.weights]
        if not names:
            raise PruneZooError("a LoRA without weights cannot be saved: train it, or build the pruner without one")
        decoder = names[0].partition(".layers.")[0]
        config = import_peft().LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=rf"{re.escape(decoder)}\.layers\..*\.({'|'.join(TARGETS)})",
            base_model_name_or_path=self.base,
            inference_mode=True,
        )
        config.save_pretrained(folder)
        tensors = (parameter.detach().cpu().contiguous() for parameter in self.weights.values())
        state = {f"{PREFIX}{name}.weight": tensor for name, tensor in zip(names, tensors, strict=True)}
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        """Read PEFT's two files, strictly.

        Raises:
            PruneZooError: Another kind, rank or alpha of adapter, an unknown, unpaired, misshapen or NaN tensor, a
                broken file, or peft is not installed.
        """
        import_peft()  # said now, not when the model runs
        path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
        wanted = {"peft_type": "LORA", "r": self.rank, "lora_alpha": self.alpha, "use_rslora": False, "use_dora": False}
        config = read_json(path)
        try:
            stored = {key: config[key] for key in wanted}
        except (KeyError, TypeError) as error:
            raise PruneZooError(f"{path}: not a LoRA config of PEFT ({error}); download it again") from error
        for key, value in wanted.items():
            if stored[key] != value:
                raise PruneZooError(
                    f"{path}: {key} is {stored[key]}, but this pruner asks for {value}; download it again"
                )
        self.base = str(config.get("base_model_name_or_path") or "")
        self.weights, self._layers = nn.ParameterDict(), {}
        pairs: dict[str, dict[str, Tensor]] = {}
        for key, tensor in read_tensors(weights_path).items():
            match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_A|lora_B)\.weight", key)
            if match is None:
                raise PruneZooError(f"{weights_path}: unexpected tensor '{key}'; written by another version?")
            if tensor.dim() != 2 or tensor.shape[match[2] == "lora_B"] != self.rank:
                raise PruneZooError(
                    f"{weights_path}: tensor '{key}' has shape {tuple(tensor.shape)}, not rank {self.rank}"
                )
            if not tensor.is_floating_point():
                raise PruneZooError(f"{weights_path}: tensor '{key}' is {tensor.dtype}, no weight; download it again")
            pairs.setdefault(match[1], {})[match[2]] = tensor
        for name, pair in pairs.items():
            if len(pair) < 2:
                raise PruneZooError(f"{weights_path}: '{name}' has {next(iter(pair))} only; the file is not whole")
            self._add(name, pair["lora_A"], pair["lora_B"])


class Ready:
    """A LoRA at hand on a model. It can be left at any moment, more than once: an interrupt leaves nothing behind."""

    def __init__(self, lora: Lora, vlm: PreTrainedModel) -> None:
        self.lora, self.vlm = lora, vlm
        self.own: dict[str, nn.Linear] = {}  # the model's maps
        self.tuned: dict[str, Any] = {}  # PEFT's, around them
        self.is_on = False

    def __enter__(self) -> None:
        """Put PEFT's layers together, off at first."""
        lora = self.lora
        if lora._ready is not None and lora._ready() is not None:
            raise PruneZooError("this pruner's LoRA is in use already: leave that block, or load the pruner twice")
        own = find_targets(self.vlm)
        lora._check(own)
        tuned = lora._layers = lora._layers or lora._build(own)
        for name, layer in tuned.items():
            layer.base_layer = own[name]
            layer.lora_A["default"].weight, layer.lora_B["default"].weight = lora._pair(name)
        self.own, self.tuned = own, tuned
        lora._ready = ref(self)

    def switch(self, on: bool) -> None:
        """Put the maps with or without updates in place."""
        if on != self.is_on:
            self.is_on = True  # until all are the model's own again
            for name, linear in (self.tuned if on else self.own).items():
                self.vlm.set_submodule(name, linear)
            self.is_on = on

    def __exit__(self, *_: object) -> None:
        """The model's own maps are back."""
        self.switch(False)
        for layer in self.tuned.values():
            layer.base_layer = None
        if self.lora._ready is not None and self.lora._ready() is self:
            self.lora._ready = None


def find_targets(vlm: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear maps of the language model that LoRA updates, by their names in the whole model.

    Raises:
        PruneZooError: One of them is no plain linear map, as where another adapter is on the model.
    """
    decoder = Decoder(vlm).model
    prefix = next(name for name, module in vlm.named_modules() if module is decoder)
    targets = {}
    for name, module in decoder.named_modules():
        if name.startswith("layers.") and name.rpartition(".")[2] in TARGETS:
            if not isinstance(module, nn.Linear):
                raise PruneZooError(
                    f"'{prefix}.{name}' is a {type(module).__name__}, not a linear map: unload the adapter on the model"
                )
            targets[f"{prefix}.{name}"] = module
    return targets


def import_peft() -> Any:
    """The peft library, which only pruners with a LoRA need."""
    try:
        import peft
    except ImportError:
        raise PruneZooError("a pruner with a LoRA needs peft: pip install peft") from None
    return peft
