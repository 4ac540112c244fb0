"""Classes that recipes and checkpoints of before name by a path at which they no longer are."""

import re

from .names import ROOT

PATHS = re.compile(r"\b(?:modules|trainers)\.[a-z_0-9.]+\.[A-Za-z_]\w*")
ROOTS = (ROOT, ROOT / "modules")
"""Folders that modules are imported from."""


def moved(text: str) -> str:
    """`old is now new` for each class that a text names by a path of before; empty, where there is none.

    Args:
        text: A message or a recipe. Large and small letters of a class' name do not matter.
    """
    found = {old: where_now(old) for old in dict.fromkeys(PATHS.findall(text))}
    return ", ".join(f"{old} is now {new}" for old, new in found.items() if new not in (None, old))


def where_now(path: str) -> str | None:
    """The path of a class today, by the name of the class, rather in a file of the same name; None: nowhere."""
    module, _, name = path.rpartition(".")
    head = re.compile(rf"^class ({re.escape(name)})\b", re.IGNORECASE | re.MULTILINE)
    places = []
    for root in ROOTS:
        for file in sorted([*root.glob("trainers/**/*.py"), *root.glob("prunezoo/**/*.py")]):
            if there := head.search(file.read_text(encoding="utf-8")):
                parts = file.relative_to(root).with_suffix("").parts
                places.append((file.stem != module.rpartition(".")[2], ".".join((*parts, there.group(1)))))
    return min(places)[1] if places else None
