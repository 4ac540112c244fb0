"""Short names: `ppm` for `checkpoints/ppm-tiny`, `tiny-llava` for `checkpoints/tiny-llava`, `ppm_tiny` for a recipe.

Commands take a short name wherever they take a path of what ships; a path that is there, or a Hub id, stays as it is.
"""

from collections.abc import Sequence
from pathlib import Path

from prunezoo.core.errors import PruneZooError
from prunezoo.core.files import read_object
from prunezoo.core.hub import CONFIG_FILE
from prunezoo.core.near import near
from prunezoo.core.registry import list_pruners, pruner_class

ROOT = Path(__file__).parent.parent.parent
CHECKPOINTS, CONFIGS = ROOT / "checkpoints", ROOT / "configs"
TINY = "-tiny"
"""What ends the names of the pruners that were trained for an embedded model."""
EMBEDDED = "tiny-llava"
"""The one of `scenes`, with which most of the pruners that ship were trained."""
BY_FRAME = "frames:"
"""In front of a method's name, where methods are measured: it sees the frames of a clip one by one."""
BY_STEP = "steps:"
"""Likewise: it sees the steps of a stream one by one, each as if it were the first."""
RANDOM_AT = "random@"
"""Likewise, of a method inside the tower: random tokens at its places, as many as it leaves there."""
FIXED = "fixed:"
"""Likewise, of a method that sets budgets: at `auto:64` every image keeps 64 tokens, as where a method sets none."""
FRONTS = (BY_FRAME, BY_STEP, RANDOM_AT, FIXED)


def methods_shipped() -> dict[str, str]:
    """The pruners and tokenizers in `checkpoints/`: folder name to method, sorted."""
    found = {}
    for path in sorted(CHECKPOINTS.glob(f"*/{CONFIG_FILE}")):
        method = read_object(path, what="a config", remedy="save it again").get("method")
        if method is not None:
            found[path.parent.name] = str(method)
    return found


def pruners_shipped(vlm: str = EMBEDDED) -> dict[str, str]:
    """Those of them that were trained for an embedded model and are in its league; no tokenizers.

    Nor those of the input stage, which spare the tower too: in front of the tower is a table of its own. Nor those
    under which the tower puts out every patch again, so that the language model reads all of them. Nor those for
    another model, as of clips.
    """
    known = list_pruners()
    return {
        name: method
        for name, method in methods_shipped().items()
        if method in known and fits_league(method) and trained_for(name) in ("any", vlm)
    }


def trained_for(folder: str) -> str:
    """The name of the model that what lies in a folder of `checkpoints/` was trained for; "any": it does not say."""
    path = CHECKPOINTS / folder / CONFIG_FILE
    stored = read_object(path, what="a config", remedy="save it again") if path.is_file() else {}
    return str(stored.get("base_model", {}).get("name", "any")).rpartition("/")[2]


def fits_league(method: str) -> bool:
    """Whether a method leaves the language model fewer tokens, and acts behind the first block of the tower."""
    cls = pruner_class(method)
    return cls.stage != "input" and not cls.restore


def find_pruner(name: str) -> str:
    """What a name on a command line stands for.

    Args:
        name: a path, a Hub id, a method without weights, a diagnostic (`attention@2`), all of which stay as they are;
            the folder name of a shipped pruner (`m3-lora-tiny`) or its method (`ppm`). Config fields may follow
            (`?k=v`). `frames:`, `steps:`, `random@` and `fixed:` in front stay there.

    Raises:
        PruneZooError: nothing is called so, or several shipped pruners are of that method.
    """
    for front in FRONTS:
        if name.startswith(front):
            return front + find_pruner(name.removeprefix(front))
    short, mark, query = name.partition("?")
    if "/" in short or "@" in short or Path(short).exists() or short in ("oracle", "relevance"):
        return name
    shipped = methods_shipped()
    of_method = [folder for folder, method in shipped.items() if method == short]
    named = short.replace("_", "-")  # a folder called as its method comes before others of it
    of_method = next(([own] for own in (short, named, named + TINY) if own in shipped), of_method)
    if not of_method:
        if short not in list_pruners():
            raise PruneZooError(f"no pruner is called '{short}'{near(short, [*list_pruners(), *shipped])}")
        if has_weights(short):
            raise PruneZooError(f"'{short}' is learned and none is shipped: give the folder or Hub id of a trained one")
        return name
    if len(of_method) > 1:
        raise PruneZooError(f"several '{short}' are shipped: say {' or '.join(of_method)}")
    return f"{shown(CHECKPOINTS / of_method[0])}{mark}{query}"


def folder_named(name: str) -> str:
    """The folder, Hub id or method in the name of what is measured: `runs/ppm` in `fixed:runs/ppm?hidden=8`."""
    while front := next((front for front in FRONTS if name.startswith(front)), ""):
        name = name.removeprefix(front)
    return name.partition("?")[0]


def find_vlm(name: str) -> str:
    """The path of a shipped model; a path that is there, a Hub id and `random:…` stay as they are.

    Raises:
        PruneZooError: nothing is called so.
    """
    if "/" in name or ":" in name or Path(name).exists():
        return name
    if not (CHECKPOINTS / name).is_dir():
        models = [path.parent.name for path in CHECKPOINTS.glob("*/tokenizer.json")]
        raise PruneZooError(f"no model is called '{name}'{near(name, models)}; a Hub id is written org/name")
    return shown(CHECKPOINTS / name)


def find_folder(name: str) -> Path:
    """The folder that a name stands for: a path that is there, anything in `checkpoints/`, or as `find_pruner` says."""
    if not Path(name).exists() and (CHECKPOINTS / name).is_dir():
        return Path(shown(CHECKPOINTS / name))
    return Path(name) if Path(name).exists() else Path(find_pruner(name))


def find_config(name: str) -> str:
    """The path of a recipe, `ppm_tiny` or `ppm_tiny.yaml`; a path that is there stays as it is.

    Raises:
        PruneZooError: there is no such recipe.
    """
    if Path(name).exists() or "/" in name:
        return name
    path = CONFIGS / (name if name.endswith(".yaml") else f"{name}.yaml")
    if not path.is_file():
        known = [one.stem for one in CONFIGS.glob("*.yaml")]
        raise PruneZooError(f"no recipe is called '{name}'{near(name, known, listed=False)}; they are in configs/")
    return shown(path)


def expand_configs(words: Sequence[str]) -> list[str]:
    """The words of a command line, with the short names behind `--config` written out."""
    out: list[str] = []
    for word in words:
        if out and out[-1] == "--config":
            out.append(find_config(word))
        elif word.startswith("--config="):
            out.append(f"--config={find_config(word.removeprefix('--config='))}")
        else:
            out.append(word)
    return out


def has_weights(method: str) -> bool:
    """Whether a method is learned, wherever its file is: its smallest instance has parameters, or needs settings."""
    cls = pruner_class(method)
    try:
        smallest = cls(**cls.tiny_config(32, 32))
    except PruneZooError:
        return True
    return any(True for _ in smallest.parameters())


def shown(path: Path) -> str:
    """A path of the repository as people write it where they stand, from its root if they stand there."""
    return str(path.relative_to(ROOT)) if Path.cwd() == ROOT else str(path)
