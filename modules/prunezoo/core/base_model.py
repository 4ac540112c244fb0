"""The frozen model that a pruner was trained for, as its ``config.json`` notes it, and whether another is built alike.

A pruner reads tokens of one width, made by one tower, on their way into one family of language models. Weights may
differ (a fine-tuned model is still of the same build), so the name is for people and is not compared.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from .errors import PruneZooError


@dataclass(frozen=True)
class BaseModel:
    """What matters of a vision-language model to a pruner that was trained beside it."""

    name: str  # Hub id or folder, as the training named it
    family: str  # the model's `config.model_type`
    width: int  # of the language model's input embeddings
    depth: int  # decoder layers
    tower: str  # `model_type` of its vision tower
    tower_width: int  # of the tower's hidden states

    @classmethod
    def describe(cls, vlm: Any) -> Self:
        """Of a `transformers` model, perhaps inside wrappers that hand on its ``config``."""
        text, vision = vlm.config.get_text_config(), vlm.config.vision_config
        return cls(
            name=public_name(vlm.name_or_path),
            family=vlm.config.model_type,
            width=text.hidden_size,
            depth=text.num_hidden_layers,
            tower=vision.model_type,
            tower_width=vision.hidden_size,
        )

    @classmethod
    def from_dict(cls, values: object, where: str = "") -> Self:
        """From what :meth:`to_dict` gave; PruneZooError names ``where`` and the key that is wrong."""
        known = {f.name: f.type for f in fields(cls)}
        if not isinstance(values, Mapping) or values.keys() != known.keys():
            raise PruneZooError(f"{where}key 'base_model' must be an object of {', '.join(known)}")
        for key, kind in known.items():
            if type(values[key]) is not kind:
                raise PruneZooError(f"{where}'base_model' has no right {key}; download it again")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    def differences(self, other: "BaseModel") -> list[str]:
        """In what two models are not built alike, in words; empty where a pruner of one fits the other."""
        words = {
            "family": "family",
            "width": "width",
            "depth": "decoder layers",
            "tower": "vision tower",
            "tower_width": "width of the tower",
        }
        return [
            f"{word} {getattr(self, key)} and {getattr(other, key)}"
            for key, word in words.items()
            if getattr(self, key) != getattr(other, key)
        ]


def public_name(name: str) -> str:
    """The name of a model without the folders of a machine, which are nobody's business; a Hub id as it is."""
    path = Path(name)
    local = path.is_absolute() or len(path.parts) > 2 or name.startswith((".", "~")) or "\\" in name
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1] if local else name


def check_base_model(method: str, trained_for: BaseModel | None, vlm: Any) -> None:
    """Refuse a pruner of another model; one that was trained for none in particular goes with any.

    Raises:
        PruneZooError: They are not built alike; it names both models and where they differ.
    """
    if trained_for is None:
        return
    here = BaseModel.describe(vlm)
    differences = trained_for.differences(here)
    if differences:
        raise PruneZooError(
            f"this '{method}' was trained for {trained_for.name or 'another model'}, "
            f"not for {here.name or 'this one'}: {', '.join(differences)}; "
            "take a pruner of this model, or load it with any_model=True"
        )
