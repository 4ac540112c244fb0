"""A folder that runs the page of `trainers.show` as a Space of the Hugging Face Hub, or in any container.

It holds all that the page needs: the code, and the model and pruners that are named by a folder; those named by a Hub
id are downloaded when it starts.
"""

import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData

from prunezoo.core.errors import PruneZooError
from trainers.cli.names import ROOT

CODE = ("modules/prunezoo", "trainers")
PORT = 7860
"""That a Space is asked on."""
APP = '''"""The page of `trainers.show`, as this Space serves it. `ADDRESS` and `PORT` in the environment say where."""

import os
import sys
from pathlib import Path

folder = Path(__file__).resolve().parent
os.chdir(folder)
sys.path[:0] = [str(folder), str(folder / "modules")]

from trainers.show import main  # noqa: E402 - found only now

words = {words!r}
words += ["--address", os.environ.get("ADDRESS", "0.0.0.0"), "--port", os.environ.get("PORT", "{port}")]
if host := os.environ.get("SPACE_HOST"):  # the name that browsers ask for, told by the Hub
    words += ["--allow-host", host]
sys.exit(main(words))
'''
DOCKERFILE = f"""FROM python:3.12-slim
RUN useradd --create-home --uid 1000 user
USER user
ENV PATH=/home/user/.local/bin:$PATH
WORKDIR /home/user/app
COPY --chown=user requirements.txt .
RUN pip install --no-cache-dir --user -r requirements.txt
COPY --chown=user . .
EXPOSE {PORT}
CMD ["python", "app.py"]
"""
TEXT = """
# What is kept

A frozen vision-language model, `{vlm}`, reads a picture with all its image tokens and with the few that a pruner keeps:
{pruners}. Choose a picture, ask, and see which tokens are read.

It is the page of `python -m trainers.show --serve` of prunezoo, made by `python -m trainers.show --space`. On your own
machine: `pip install -r requirements.txt && ADDRESS=127.0.0.1 python app.py`.
"""


def write_space(folder: Path, vlm: str, pruners: Sequence[str], beside: str | None) -> None:
    """Write the folder of a Space.

    Args:
        folder: where to; made if need be, and empty.
        vlm: folder or Hub id of the model.
        pruners: names, folders or Hub ids of what can be chosen.
        beside: the one that is shown next to the first; None: none.

    Raises:
        PruneZooError: the folder is not empty, or two different folders are called the same.
    """
    if folder.exists() and any(folder.iterdir()):
        raise PruneZooError(f"--space {folder}: not empty; name another")
    for name in CODE:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "LICENSE", folder)
    taken: dict[str, str] = {}
    own_vlm, *own = (_taken_along(name, folder, taken) for name in (vlm, *pruners))
    words = ["--serve", "--vlm", own_vlm, "--pruner", *own]
    words += [] if beside is None else ["--beside", _taken_along(beside, folder, taken)]
    (folder / "app.py").write_text(APP.format(words=words, port=PORT), encoding="utf-8")
    (folder / "Dockerfile").write_text(DOCKERFILE, encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
    data = SpaceCardData(title="prunezoo: what is kept", sdk="docker", app_port=PORT, license="apache-2.0", emoji="✂️")
    text = TEXT.format(vlm=own_vlm, pruners=", ".join(f"`{name}`" for name in own))
    SpaceCard(f"---\n{data.to_yaml()}\n---\n{text}").save(folder / "README.md")


def requirements() -> list[str]:
    """What the library and `trainers` need, as pyproject.toml says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["train"]]


def _taken_along(name: str, folder: Path, taken: dict[str, str]) -> str:
    """What a model or pruner is called in the folder, into which it is copied if it is one itself."""
    short, mark, options = name.partition("?")
    if not Path(short).is_dir():
        return name
    own = f"checkpoints/{Path(short).resolve().name}"
    if own not in taken:
        shutil.copytree(short, folder / own, ignore=shutil.ignore_patterns("training"))
        taken[own] = short
    elif taken[own] != short:
        raise PruneZooError(f"{taken[own]} and {short}: two folders of one name; rename one")
    return f"{own}{mark}{options}"
