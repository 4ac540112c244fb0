"""Train a pruner or tokenizer: `python -m trainers.fit --config configs/ppm_tiny.yaml [--ckpt_path=last]`.

LightningCLI without a subcommand: several `--config`s are merged, the later one wins; any key can be overridden;
`--print_config` shows the result; `--ckpt_path` resumes. `--out` becomes a folder that `from_pretrained` loads, with
logs and checkpoints of the training in its subfolder `training`.
"""

import re
import shlex
import sys
from pathlib import Path
from textwrap import fill
from typing import Any, Literal

import lightning as L
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from prunezoo.core.errors import PruneZooError
from trainers.cli.errors import check_output, command
from trainers.cli.lock import hold
from trainers.cli.moved import moved
from trainers.cli.names import CONFIGS, expand_configs
from trainers.cli.recipes import FLAG, bound_recipes, load_yaml, nearest_key
from trainers.training.callbacks import (
    Checkpoints,
    ExportPruner,
    GracefulStop,
    Progress,
    SeedSteps,
    StopAtNaN,
    WholeCheckpoints,
)
from trainers.training.precision import usable_precision
from trainers.training.resume import SameData, find_checkpoint, train
from trainers.training.run_record import RunRecord

Log = Literal["csv", "tensorboard", "wandb"]


SECTIONS = {"trainer": L.Trainer, "checkpoint": Checkpoints, "export": ExportPruner, "seeds": SeedSteps}
"""What a recipe sets beside its model and its data."""


class SaveRecipe(SaveConfigCallback):
    """Writes the whole recipe beside the log, as `config.yaml`, and into the log as its hyper-parameters."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Into the log."""
        recipe = load_yaml(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            logger.log_hyperparams(recipe)


class FitCLI(LightningCLI):
    """Model and data module are named in the config; what several parts must agree on is said once."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what Lightning's trainer does not know, and hand on what is shared."""
        parser.add_argument("--out", type=str, default="runs/fit", help="folder of the trained pruner")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to resume from, or 'last'")
        parser.add_argument("--logger", type=Log, default="csv", help="kind of the log, below --out")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(ExportPruner, "export")
        parser.add_lightning_class_args(SeedSteps, "seeds")
        parser.link_arguments("out", "trainer.default_root_dir", compute_fn=training_folder)
        parser.link_arguments("out", "checkpoint.dirpath", compute_fn=checkpoint_folder)
        parser.link_arguments("out", "export.folder")
        parser.link_arguments("seed_everything", "seeds.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        parser.link_arguments("model.init_args.vlm", "data.init_args.vlm")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Keep the words of the command line, for the run record."""
        self.words = sys.argv[1:] if args is None else [str(word) for word in args]
        super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """Take the precision that this machine has, so that log and run record say what was used."""
        trainer = self.config.trainer
        trainer.precision = usable_precision(trainer.precision, trainer.accelerator)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer; its log is what `--logger` says, unless one is built by `trainer.logger`."""
        config = self.config_init["trainer"]
        kwargs["plugins"] = [WholeCheckpoints(), *(config["plugins"] or [])]
        kwargs["callbacks"] = [GracefulStop(), StopAtNaN(), SameData(), self.run_record(), *(config["callbacks"] or [])]
        if config["logger"] in (None, True):
            kwargs["logger"] = open_logger(self.config_init["logger"], self.config_init["out"])
        if config["enable_progress_bar"] in (None, True):
            kwargs["callbacks"].append(Progress())
        trainer = super().instantiate_trainer(**kwargs)
        # It leaves from within a batch's end, which all others must have had: averages of weights would miss a step.
        trainer.callbacks.sort(key=lambda callback: isinstance(callback, GracefulStop))  # type: ignore[attr-defined]
        return trainer

    def run_record(self) -> RunRecord:
        """What is written down beside the pruner, for its card."""
        config = self.config
        data = config.data.init_args
        named = [
            str(data[key]) for key in ("suite", "json", "images", "dataset", "shards") if data.get(key) is not None
        ]
        named += data.get("suites", [])
        return RunRecord(
            folder=config.out,
            command=shlex.join(["python", "-m", "trainers.fit", *self.words]),
            recipe=self.parser.dump(config, skip_none=True),
            vlm=config.model.init_args.get("vlm"),
            data=f"{config.data.class_path.rsplit('.', 1)[-1]}({', '.join(named)})",
            seed=int(config.seed_everything),
        )


class HoldingCLI(FitCLI):
    """Takes the folder that is written to before the model is loaded: a second run is told so at once."""

    def instantiate_classes(self) -> None:
        """Check, lock, build."""
        check(self.config)
        hold("--out", Path(self.config.out), folder=True)
        super().instantiate_classes()


def open_logger(kind: Log, out: str) -> Logger:
    """A log below `--out`.

    Raises:
        PruneZooError: It needs a package that is not installed.
    """
    folder = training_folder(out)
    try:
        if kind == "wandb":
            Path(folder).mkdir(parents=True, exist_ok=True)  # where it is missing, W&B writes somewhere else
            return WandbLogger(name=Path(out).name, save_dir=folder, project="prunezoo")
        return TensorBoardLogger(folder, "logs") if kind == "tensorboard" else CSVLogger(folder, "logs")
    except ModuleNotFoundError as error:
        raise PruneZooError(f"--logger={kind} needs another package: pip install {kind}") from error


def training_folder(out: str) -> str:
    """Where logs and checkpoints of a run go."""
    return str(Path(out) / "training")


def checkpoint_folder(out: str) -> str:
    """Where its checkpoints go."""
    return str(Path(out) / "training" / "checkpoints")


def build(args: list[str] | None = None, cli: type["FitCLI"] | None = None) -> FitCLI:
    """Parse and instantiate.

    Args:
        args: Words of the command line; None: those of this process.
        cli: What does it, if not FitCLI itself.

    Raises:
        PruneZooError: A mistake in the configuration; it names the key.
    """
    if args is None:
        sys.argv[1:] = expand_configs(sys.argv[1:])  # there, so that the other processes of a run are given them too
    else:
        args = expand_configs(args)
    words = sys.argv[1:] if args is None else args
    bound_recipes(any_package=FLAG in words)
    if FLAG in words:  # which stays in `sys.argv`, for the other processes of a run
        args = [word for word in words if word != FLAG]
    try:
        return (cli or FitCLI)(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            run=False,
            args=args,
            seed_everything_default=1,
            save_config_callback=SaveRecipe,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"exit_on_error": False},
        )
    except (ArgumentError, ValueError, MisconfigurationException) as error:
        raise PruneZooError(root_message(error)) from error


def root_message(error: BaseException) -> str:
    """What jsonargparse is wrapped around, where that is an error of ours; else its own words, on one line."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, PruneZooError):
        inner = inner.__cause__ or inner.__context__
    if inner:
        return str(inner)
    names = moved(str(error))
    if names:
        return f"configuration: {names}; write so in the recipe"
    denied = re.search(r"Importing '([\w.]+)' is not allowed", str(error))
    if denied:
        return f"configuration: {denied[1]} is of no package that recipes name; if you trust its code, add {FLAG}"
    return f"configuration: {plain(str(error))}"


def plain(message: str) -> str:
    """What jsonargparse says, without the types it tried in vain and the whole configuration around the mistake."""
    noise = ("Does not validate", "Subtypes:", "Errors:", "Given value type:", "- Expected a <class 'NoneType'>")
    whole = ("Given value: Namespace(", "Given value: NestedArg(")
    lines = [line.strip() for line in message.splitlines()]
    said = " ".join(line for line in lines if not line.startswith((*noise, *whole))).replace(": - ", ": ")
    unknown = "is not accepted" in said or "unrecognized arguments" in said
    return f"{said}{nearest_key(said, SECTIONS)}; --print_config shows every key" if unknown else said


def check(config: Any) -> None:
    """Refuse what Lightning takes, and fails on or does something else with.

    Raises:
        PruneZooError: Nowhere to write to, no checkpoint to read, or a validation every 0 steps.
    """
    if not config.out:
        raise PruneZooError("--out is empty: name the folder of the trained pruner")
    check_output("--out", Path(config.out), folder=True)
    path = config.ckpt_path
    if path not in (None, "last") and not Path(path).is_file():
        raise PruneZooError(f"--ckpt_path={path}: no such file; name a checkpoint, or write last")
    if config.trainer.val_check_interval == 0:
        raise PruneZooError("trainer.val_check_interval=0: at least 1 step from one validation to the next")


def asks_for_help(args: list[str] | None) -> bool:
    """Whether a command line says nothing, or asks what can be said."""
    words = sys.argv[1:] if args is None else args
    return not words or "-h" in words or "--help" in words


def short_help() -> str:
    """What a person needs to begin; the whole help is hundreds of lines."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(CONFIGS.glob("*.yaml"))}
    recipes = ", ".join(name for name, text in texts.items() if "\nmodel:" in text)  # one is for trainers.pretrain
    return f"""usage: python -m trainers.fit --config RECIPE [--config MORE.yaml …] [--KEY=VALUE …]

Train a pruner beside a frozen model. A recipe is a YAML file, or one of configs/ by its name:
  {fill(recipes, 100, subsequent_indent="  ")}

What is often set:
  --out=runs/mine                    folder of the trained pruner, which from_pretrained loads
  --data.json=F --data.images=DIR    LLaVA-format data, for the recipes called …_llava
  --model.vlm=FOLDER_OR_HUB_ID       another frozen model
  --trainer.max_steps=100            any key of the recipe, likewise
  --trainer.devices=2 --trainer.strategy=ddp
  --ckpt_path=last                   go on where a run with the same --out stopped
  --logger=tensorboard               or wandb, or csv: the log, below --out
  --allow-code                       the recipe may name classes of other packages, which are run
  --print_config                     the whole recipe, after all files and overrides
  --help-all                         every option of trainer, model and data"""


@command
def main(args: list[str] | None = None) -> None:
    """Train."""
    words = sys.argv[1:] if args is None else args
    if asks_for_help(args):
        print(short_help())
        return
    if "--help-all" in words:
        args = ["--help"]
    cli = build(args, HoldingCLI)
    checkpoint = find_checkpoint(cli.config.ckpt_path, Path(cli.config.checkpoint.dirpath))
    train(cli.trainer, cli.model, checkpoint, datamodule=cli.datamodule)


if __name__ == "__main__":
    main()
