"""`tiny-llava-multi`: the language model of `tiny-llava`, taught to read several pictures; its tower stays as it is.

The model begins as `tiny-llava`: the tower with the positions of its upper left 6×6 patches, since pictures are
smaller, and the language model with more layers behind its own, in which what was found in several pictures can be
compared.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration

from prunezoo.core.errors import PruneZooError
from trainers.data import scenes, several_icl, several_steps, several_video
from trainers.data.scenes_dense import as_pixels
from trainers.data.several_dense import GROUPS, KINDS, PATCHES, SCENES, Bank, fill
from trainers.data.several_render import PATCH, SIDE

from .build import World, tower_of
from .language import LanguageModule

NEW_WORDS = {"up": "above", "down": "below", "word": "what", "way": "where"}
"""Words that begin as one that is known already."""
SEVERAL = World(
    tuple(dict.fromkeys((*scenes.WORDS, *several_icl.WORDS, *several_video.WORDS, *several_steps.WORDS))), SIDE, PATCH
)
_AT_ONCE = 32  # scenes whose pictures the tower encodes together


@dataclass(frozen=True)
class SeveralStage:
    """A part of the language model's curriculum; each begins a schedule of its own.

    Attributes:
        name: of its folder below `work`.
        steps: optimiser steps.
        shares: how often a batch of each of KINDS is drawn.
        keep: patches left of each picture of a batch, and how often; what shows something stays first.
        batch_size: sequences of a step.
        lr: peak learning rate.
        held: share of the steps before it goes down, to 3 %.
        hidden: highest share of patches beside the point that a question may not see.
        value: weight of a loss by which, in worked examples and the question behind them, the colour or shape is to be
            found on the way, in front of the last layers; so that these have something to compare.
    """

    name: str
    steps: int
    shares: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 1.0))
    keep: dict[int, float] = field(default_factory=lambda: {6: 0.7, 36: 0.3})
    batch_size: int = 16
    lr: float = 1e-3
    held: float = 1.0
    hidden: float = 0.9
    value: float = 0.0

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size"):
            if getattr(self, key) < 1:
                raise PruneZooError(f"{key}={getattr(self, key)} of stage {self.name}: at least 1")
        for kind in self.shares:
            if kind not in KINDS:
                raise PruneZooError(f"stage {self.name}: no kind is called {kind!r}; there are {', '.join(KINDS)}")
        for count in self.keep:
            if not 1 <= count <= PATCHES:
                raise PruneZooError(f"stage {self.name}: keep={count} must lie in 1 to {PATCHES}")


@dataclass(frozen=True)
class BankSizes:
    """How many scenes of each kind are encoded before training."""

    icl: int = 3000
    moving: int = 600
    staying: int = 400
    steps: int = 400
    coming: int = 400


@torch.no_grad()
def start_from(vlm: LlavaForConditionalGeneration, folder: str) -> None:
    """Begin as another frozen model of equal widths, whose words are the first of this one.

    Args:
        vlm: changed in place; layers that the other lacks stay as they are.
        folder: the other model's.

    Raises:
        PruneZooError: it is of other widths, or has more layers.
    """
    other: Any = LlavaForConditionalGeneration.from_pretrained(Path(folder), dtype=torch.float32)
    for name in ("text_config", "vision_config"):
        theirs, ours = (getattr(model.config, name) for model in (other, vlm))
        if (theirs.hidden_size, theirs.intermediate_size) != (ours.hidden_size, ours.intermediate_size):
            raise PruneZooError(f"start={folder} has other widths than sizes: leave these out")
        if theirs.num_hidden_layers > ours.num_hidden_layers:
            layers = f"{theirs.num_hidden_layers} layers in its {name}"
            raise PruneZooError(f"start={folder} has {layers}: sizes must have no fewer")
    known = other.state_dict()
    place, words = "embeddings.position_embedding.weight", vlm.get_input_embeddings().weight
    grid, own = (round((len(tower_of(of).embeddings.position_embedding.weight) - 1) ** 0.5) for of in (other, vlm))
    known_words = other.get_input_embeddings().weight
    for name in list(known):
        if name.endswith(place):
            corner = known[name][1:].unflatten(0, (grid, grid))[:own, :own].flatten(0, 1)
            known[name] = torch.cat([known[name][:1], corner])
        elif (len(known[name]) == len(known_words) and "embed_tokens" in name) or name == "lm_head.weight":
            del known[name]
    vlm.load_state_dict(known, strict=False)
    words[: len(known_words)] = known_words
    for word, like in NEW_WORDS.items():
        words[SEVERAL.word_ids[word]] = words[SEVERAL.word_ids[like]]


def make_bank(
    vlm: LlavaForConditionalGeneration, sizes: dict[str, int], split: str, folder: Path, apart: int
) -> tuple[Bank, Tensor]:
    """A bank of scenes, and what the tower says of their pictures, (P, 36, D) bfloat16.

    What the tower says is kept in the folder, so that it is asked once; the scenes are made anew.
    """
    bank, tokens = Bank(), []
    for kind in SCENES:
        path, before = folder / f"{split}-{kind}.safetensors", len(bank.firsts)
        said = [load_file(path)["tokens"]] if path.exists() else []
        for numbers in torch.arange(sizes[kind]).split(_AT_ONCE):
            pictures = [np.asarray(p) for number in numbers.tolist() for p in fill(bank, kind, number, split, apart)]
            if not path.exists():
                said.append(look(vlm, torch.from_numpy(np.stack(pictures))))
        tokens.append(torch.cat(said))
        if len(tokens[-1]) != len(bank.firsts) - before:
            raise PruneZooError(f"{path}: is of another bank; remove it")
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"tokens": tokens[-1]}, path)
    return bank, torch.cat(tokens)


@torch.no_grad()
def look(vlm: LlavaForConditionalGeneration, pictures: Tensor) -> Tensor:
    """(P, 36, D) bfloat16: image tokens of pictures (P, 48, 48, 3) uint8."""
    model = vlm.model
    pixels = as_pixels(pictures.permute(0, 3, 1, 2)).to(model.vision_tower.device)
    seen = model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    return model.multi_modal_projector(seen).to(torch.bfloat16).cpu()


LAST_LAYERS = 2
"""Layers behind the place where values are to be found."""


class SeveralLanguage(LanguageModule):
    """Trains ``vlm.model.language_model`` on batches of `DenseSeveral`.

    Args:
        vlm: the model; trained in place.
        stage: how long.
    """

    groups = GROUPS

    def __init__(self, vlm: LlavaForConditionalGeneration, stage: SeveralStage) -> None:
        super().__init__(vlm, stage.steps, stage.lr)
        self.held, self.value = stage.held, stage.value
        if self.value:
            self.said = torch.nn.Linear(vlm.config.text_config.hidden_size, vlm.config.text_config.hidden_size)

    def answers(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits (M, V) and targets (M,) at the answers' tokens, where those are (B, L - 1); and the loss of values."""
        ids, segment, (_, length) = batch["ids"], batch["segment"], batch["ids"].shape
        words = self.language.get_input_embeddings()
        image = (ids == self.vlm.config.image_token_id)[..., None]
        embeds = torch.where(image, batch["tokens"].to(words.weight.dtype), words(ids.masked_fill(image[..., 0], 0)))
        with torch.no_grad():
            mine = (segment[:, :, None] == segment[:, None]) | (segment[:, None] == 0)
            hidden = batch["hidden"].gather(1, segment.clamp_min(0)[..., None].expand(-1, -1, length))
            allowed = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril() & mine & ~hidden
            allowed |= torch.eye(length, dtype=torch.bool, device=ids.device)
            mask = torch.zeros_like(allowed, dtype=torch.float32).masked_fill_(~allowed, -1e9)[:, None]
            if torch.is_autocast_enabled(self.device.type):
                mask = mask.to(torch.get_autocast_dtype(self.device.type))
        out = self.language(inputs_embeds=embeds, attention_mask=mask, position_ids=batch["place"], use_cache=False,
                            output_hidden_states=self.value > 0)  # fmt: skip
        asked, known = batch["targets"][:, 1:] >= 0, batch["values"] >= 0
        loss = out.last_hidden_state.new_zeros(())
        if self.value and known.any():
            found = self.said(out.hidden_states[-1 - LAST_LAYERS][known]) @ words.weight.T
            loss = self.value * cross_entropy(found, batch["values"][known])
        logits = out.last_hidden_state[:, :-1][asked].float() @ words.weight.T
        return logits, batch["targets"][:, 1:][asked], asked, loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One step."""
        logits, targets, _, found = self.answers(batch)
        loss = cross_entropy(logits, targets)
        self.log_dict({"loss": loss, "loss/values": found}, prog_bar=True)
        return loss + found

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Share of right answers and loss, by group."""
        logits, targets, asked, _ = self.answers(batch)
        self.log_answers(batch, logits, targets, asked)
        each = cross_entropy(logits, targets, reduction="none")
        group = batch["group"][:, 1:][asked]
        for index, name in enumerate(GROUPS):
            if (group == index).any():
                self.log(f"loss/{name}", each[group == index].mean(), batch_size=int((group == index).sum()))
