"""What is published: the files of a checkpoint that loads strictly and was measured with these very weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from rich.console import Console
from rich.table import Table

from prunezoo.core.bounds import file_inside
from prunezoo.core.errors import PruneZooError
from prunezoo.core.files import read_object
from prunezoo.core.hub import CONFIG_FILE, Pretrained, file_names, read_method
from prunezoo.core.registry import load_pruner
from prunezoo.core.source import Source
from prunezoo.core.upload import check_public, check_repo
from prunezoo.learned.patch_classifier import PatchClassifier
from prunezoo.tokenizers.base import list_tokenizers, load_tokenizer
from trainers.cards import cells as cells_card
from trainers.cards.cards import render_card
from trainers.cards.parts import (
    CARD_FILE,
    METRICS_FILE,
    PICTURE_FILE,
    POLICY_FILE,
    SPEED_FILE,
    STOP_FIGURE,
    STOP_FILE,
    weights_digest,
)
from trainers.cli.errors import one_line
from trainers.cli.text import without_folders
from trainers.compression import card as tokenizer_card
from trainers.evaluation.record import read_record
from trainers.training.run_record import RUN_FILE


@dataclass(frozen=True)
class Kind:
    """How one kind of checkpoint is loaded, and what its card rests on.

    Attributes:
        load: it, strictly, from its folder.
        read: the record `metrics.json`.
        measured: SHA-256 of the weights that a record measured.
        render: the card of a folder, by its record and Hub id.
        required: files that every card shows or rests on.
        optional: those that some do.
        how: the command that writes them, into `{folder}`.
    """

    load: Callable[[Path], Pretrained]
    read: Callable[[Path], dict[str, Any]]
    measured: Callable[[Mapping[str, Any]], set[str]]
    render: Callable[[Path, Mapping[str, Any], str], ModelCard]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    how: str


PRUNER = Kind(
    load_pruner,
    read_record,
    lambda metrics: set(metrics["weights"].values()),
    render_card,
    (METRICS_FILE,),
    (RUN_FILE, SPEED_FILE, PICTURE_FILE, STOP_FILE, STOP_FIGURE, POLICY_FILE),
    "python -m trainers.evaluate … --card {folder}",
)
TOKENIZER = Kind(
    load_tokenizer,
    tokenizer_card.read_measurement,
    tokenizer_card.measured_weights,
    tokenizer_card.render_card,
    (METRICS_FILE, tokenizer_card.CURVES, tokenizer_card.PICTURES),
    (RUN_FILE,),
    "python -m trainers.codec card {folder} …",
)

CELLS = Kind(
    load_pruner,
    cells_card.read_measurement,
    cells_card.measured_weights,
    cells_card.render_card,
    (METRICS_FILE, RUN_FILE),
    (),
    "python -m trainers.upkeep.cells {folder}",
)


def kind_of(folder: Path) -> Kind:
    """A tokenizer, a classifier of cells that was trained for no model, or a pruner of one."""
    method = read_method(Source(folder))
    if method in list_tokenizers():
        return TOKENIZER
    stored = read_object(folder / CONFIG_FILE, what="a config", remedy="save it again")
    return CELLS if method == PatchClassifier.name and "base_model" not in stored else PRUNER


@dataclass(frozen=True)
class Package:
    """What would be uploaded.

    Attributes:
        folder: the checkpoint folder.
        repo: ORG/NAME.
        files: contents of the files, by their names in the repository.
        module: the pruner or tokenizer, loaded strictly.
        card: the metadata of its card.
    """

    folder: Path
    repo: str
    files: dict[str, bytes]
    module: Pretrained
    card: ModelCardData


def check(folder: Path, repo: str) -> Package:
    """Make sure that a folder may be published, and render its card.

    Raises:
        PruneZooError: a bad name, a missing file, weights that do not load strictly, or not those that were measured.
    """
    check_repo(repo)
    if not folder.is_dir():
        raise PruneZooError(f"{folder}: no such folder")
    kind = kind_of(folder)
    module = kind.load(folder)
    how = f"write it with `{kind.how.format(folder=folder)}`"
    for name in kind.required:
        if not (folder / name).is_file():
            raise PruneZooError(f"{folder}: {name} is missing; {how}")
    for name in (*kind.required, *kind.optional):
        if (folder / name).exists():
            file_inside(folder, name)  # before any of them is read
    check_public(module.base_model, str(folder / CONFIG_FILE))
    metrics = kind.read(folder / METRICS_FILE)
    try:
        if kind.measured(metrics) != {weights_digest(folder)}:
            raise PruneZooError(f"{folder / METRICS_FILE}: measured with other weights than lie there now; {how}")
        card = kind.render(folder, metrics, repo)
    except PruneZooError:
        raise
    except Exception as error:  # whatever a record that is not whole makes the template stumble over
        why = f"{type(error).__name__}: {one_line(error)}"
        raise PruneZooError(f"{folder}: its records are not what a card rests on ({why}); {how}") from error
    names = (*file_names(module), *kind.required, *(name for name in kind.optional if (folder / name).is_file()))
    files = {name: file_inside(folder, name).read_bytes() for name in names}
    for name in {METRICS_FILE, *kind.optional} & files.keys():
        if name.endswith(".json"):  # of what was done on this machine, whose folders are nobody's business
            files[name] = without_folders(files[name].decode()).encode()
    files[CARD_FILE] = str(card).encode(errors="backslashreplace")
    assert isinstance(card.data, ModelCardData)
    return Package(folder, repo, files, module, card.data)


def show(package: Package, console: Console) -> None:
    """Print what is uploaded and what is left."""
    table = Table(title=f"{package.folder} → {package.repo}", title_justify="left")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    for name, content in package.files.items():
        table.add_row(name, f"{len(content):,}")
    console.print(table)
    parameters = sum(p.numel() for p in package.module.parameters())
    results = package.card.eval_results or []
    console.print(
        f"method {package.module.name}, {parameters:,} parameters; the card has {len(results)} measured results"
    )
    uploaded = {Path(name).parts[0] for name in package.files}
    left = sorted(p.name for p in package.folder.iterdir() if p.name not in uploaded)
    if left:
        console.print(f"left here: {', '.join(left)}")
