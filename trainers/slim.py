"""Make a pruner small: weights set to zero, or heads and inner units taken out, beside a recipe.

    python -m trainers.slim --config ppm_tiny --pruner ppm --method magnitude --sparsity 0.5 --out=runs/half
    python -m trainers.slim --config ppm_tiny --pruner ppm --method sweep --sweep.file=runs/sweep.json

What training takes (data, model, steps, rates) is the recipe's. Stopped, the same command goes on where it was.
"""

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LightningArgumentParser

from prunezoo.core.contract import PruneInputs, Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.hub import CONFIG_FILE
from prunezoo.core.registry import load_pruner, split_options
from prunezoo.host import encode, encode_needs
from trainers.cards.parts import weights_digest
from trainers.cli.errors import check_output, command
from trainers.cli.lock import hold
from trainers.cli.names import find_pruner
from trainers.cli.terminal import Terminal
from trainers.fit import FitCLI, asks_for_help, build
from trainers.slimming.iss_p import ShrinkWeights
from trainers.slimming.lrp import References
from trainers.slimming.lth import Tickets
from trainers.slimming.methods import METHODS, STRUCTURED
from trainers.slimming.note import begin, write_note
from trainers.slimming.precrop import Costs
from trainers.slimming.sweeping import sweep_all
from trainers.slimming.weights import ALL, check_sparsity
from trainers.training.frozen import load_frozen
from trainers.training.resume import find_checkpoint, train
from trainers.training.run_record import RUN_FILE, RunRecord

Method = Literal["magnitude", "sweep", "iss_p", "lth", "lrp", "consensus", "precrop"]
PRUNER = "--model.init_args.pruner"
"""Where recipes name what is trained."""

HELP = """usage: python -m trainers.slim --config RECIPE --method METHOD --sparsity SHARE [--pruner P] [--KEY=VALUE …]

Make a pruner small. METHOD is one of these; see docs/slim.md:
  magnitude    the smallest weights of a trained pruner become zero
  sweep        the same by part and sparsity, measured: how much each part bears
  iss_p        small weights shrink while it is trained, then become zero
  lth          train, take the smallest away, rewind to an early step, train again
  lrp          heads and inner units that contribute least go
  consensus    gates learn which heads and inner units to take out
  precrop      widths from costs alone, then the recipe's training

  --sparsity=0.5                     share that goes: of the weights, or of the parameters
  --pruner=ppm                       a trained one to begin with: shipped, folder or Hub id
  --out=runs/slim                    folder of the small pruner
  --tune=0                           steps of training behind magnitude and lrp
  --part=all --even=false            magnitude: of which part; the same share of every matrix
  --sweep.grid=[0.2,0.4,0.6,0.8,0.9] sparsities
  --sweep.file=runs/sweep.json       the table; and .keep (budget), .limit (questions), .drop (points that are a cliff)
  --iss_p.group=20                   and .factor .share .skip
  --lth.rewind=0.05                  and .each
  --lrp.batches=4                    and .keep .step
  --consensus.agree=1                and .polarise .ramp
  --precrop.of=parameters            or operations, with .tokens .words"""


class SlimCLI(FitCLI):
    """Makes nothing of a recipe, and takes what slimming needs."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add that."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--method", type=Method, required=True, help="how it is made small")
        parser.add_argument("--sparsity", type=float, default=0.5, help="share that goes")
        parser.add_argument("--pruner", type=str | None, default=None, help="a trained one to begin with")
        parser.add_argument("--tune", type=int, default=0, help="steps of training behind magnitude and lrp")
        parser.add_argument("--part", type=str, default=ALL, help="magnitude: of which part")
        parser.add_argument("--even", type=bool, default=False, help="magnitude: the same share of every matrix")
        parser.add_argument("--sweep.grid", type=list[float], default=[0.2, 0.4, 0.6, 0.8, 0.9], help="sparsities")
        parser.add_argument("--sweep.keep", type=str, default="1/9", help="budget")
        parser.add_argument("--sweep.limit", type=int, default=420, help="questions of the validation split")
        parser.add_argument("--sweep.drop", type=float, default=1.0, help="points of retention that are a cliff")
        parser.add_argument("--sweep.file", type=str, default="runs/sweep.json", help="the table")
        parser.add_class_arguments(ShrinkWeights, "iss_p", skip={"sparsity"}, instantiate=False)
        parser.add_class_arguments(Tickets, "lth", instantiate=False)
        parser.add_class_arguments(References, "lrp", instantiate=False)
        parser.add_class_arguments(Costs, "precrop", instantiate=False)
        parser.add_argument("--consensus.agree", type=float, default=1.0, help="draws to the share that is to stay")
        parser.add_argument("--consensus.polarise", type=float, default=1.0, help="draws the samples together")
        parser.add_argument("--consensus.ramp", type=int, default=200, help="steps over which that one rises")

    def instantiate_classes(self) -> None:
        """Nothing."""


class TrainCLI(SlimCLI):
    """Makes all of a recipe."""

    def instantiate_classes(self) -> None:
        """As `trainers.fit`."""
        super(SlimCLI, self).instantiate_classes()


class DataCLI(SlimCLI):
    """Makes the data module of a recipe alone."""

    def instantiate_classes(self) -> None:
        """Not the rest."""
        self.datamodule = self.parser.instantiate(self.config)["data"]


class Slimming:
    """One command: its words, its recipe, and training by that.

    Args:
        words: Of the command line.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.line = shlex.join(["python", "-m", "trainers.slim", *words])
        self.config: Any = build(self.words, SlimCLI).config
        self.out = Path(self.config.out)

    def start(self) -> Pruner | None:
        """The trained pruner to begin with, if one is named."""
        return None if self.config.pruner is None else load_pruner(find_pruner(self.config.pruner)).eval()

    def recipes(self) -> Pruner:
        """The recipe's own pruner, untrained."""
        return build(self.words, TrainCLI).model.pruner

    def train(
        self,
        out: Path,
        callbacks: Sequence[L.Callback] = (),
        point: Path | None = None,
        start: Pruner | None = None,
        settings: dict[str, Any] | None = None,
        kind: str | None = None,
        steps: int | None = None,
    ) -> Pruner:
        """Train by the recipe, or go on with that.

        Args:
            out: Folder of the pruner.
            callbacks: Ours.
            point: Checkpoint to begin at, where there is no newer one.
            start: Whose sizes and weights to begin with; None: the one that is named, if any.
            settings: Config fields of the recipe's pruner that are others.
            kind: Its class, if another.
            steps: Of the training, if others.
        """
        given = start or self.start()
        fields = {**({} if given is None else given.config.to_dict()), **(settings or {})}
        # the last state: one of before has no zeros, or no sub-network
        words = [*self.words, f"--out={out}", "--export.monitor=null"]
        words += [f"{PRUNER}.class_path={kind}"] if kind else []
        said = {name: value for name, value in fields.items() if value is not None}
        words += [f"{PRUNER}.init_args.config.{name}={json.dumps(value)}" for name, value in said.items()]
        words += [f"--trainer.max_steps={steps}"] if steps else []
        cli = build(words, TrainCLI)
        module, trainer, folder = cli.model, cli.trainer, Path(cli.config.checkpoint.dirpath)
        if trainer.num_devices * trainer.num_nodes > 1:
            raise PruneZooError("trainer.devices: a pruner is made small in one process; set --trainer.devices=1")
        if given is not None:
            give_weights(module.pruner, given)
        trainer.callbacks[:0] = callbacks  # type: ignore[attr-defined]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunRecord):
                callback.facts["command"] = self.line
        begun = find_checkpoint("last", folder) if any(folder.glob("*.ckpt")) else point
        train(trainer, module, None if begun is None else str(begun), datamodule=cli.datamodule)
        if not (out / CONFIG_FILE).is_file():  # it was stopped behind its last step
            module.pruner.save_pretrained(out)
        return load_pruner(str(out))

    def keep_as_it_is(self, pruner: Pruner) -> Pruner:
        """Save without training, with the record of how it was trained before."""
        pruner.mass = None  # its calibration was of the pruner that it was
        pruner.save_pretrained(self.out)
        source = Path(split_options(find_pruner(self.config.pruner))[0])
        if (source / RUN_FILE).is_file():
            shutil.copyfile(source / RUN_FILE, self.out / RUN_FILE)
        return pruner

    def references(self, pruner: Pruner, batches: int) -> list[PruneInputs]:
        """The first batches of the recipe's training data, as the pruner sees them.

        Raises:
            PruneZooError: The recipe has several frozen models.
        """
        if not isinstance(self.config.model.init_args.vlm, str):
            raise PruneZooError("model.vlm: this method reads batches of one frozen model; take a recipe that has one")
        settings, data = self.config.model.init_args, build(self.words, DataCLI).datamodule
        vlm = load_frozen(settings.vlm, settings.get("vlm_dtype", "auto"))
        data.setup("fit")
        tensors = (
            {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
            for batch in islice(data.train_dataloader(), batches)
        )
        with torch.no_grad():
            return [encode(vlm, batch, encode_needs(pruner)).inputs for batch in tensors]


def give_weights(pruner: Pruner, start: Pruner) -> None:
    """Begin with the weights of another pruner of the same sizes.

    Raises:
        PruneZooError: It is another method, or of another size.
    """
    ours, theirs = (dict(one.state_dict()) for one in (pruner, start))
    alike = [name for name in theirs if name in ours and ours[name].shape == theirs[name].shape]
    if pruner.name != start.name or len(alike) < len(theirs):
        raise PruneZooError(f"--pruner is a '{start.name}' and the recipe's a '{pruner.name}', or of other sizes")
    pruner.load_state_dict(theirs, strict=len(ours) == len(theirs))


@command
def main(args: Sequence[str] | None = None) -> None:
    """Make a pruner small, or say how small it may become."""
    words = sys.argv[1:] if args is None else list(args)
    if asks_for_help(words):
        print(HELP)
        return
    sys.argv[1:] = []  # a command builds several trainings, and LightningCLI warns of words that it was not given
    run, console = Slimming(words), Terminal()
    config = run.config
    if config.method == "sweep":
        check_output("--sweep.file", Path(config.sweep.file))
        hold("--sweep.file", Path(config.sweep.file))
        sweep_all(run, console)
        return
    check_sparsity(config.sparsity)
    check_output("--out", run.out, folder=True)
    hold("--out", run.out, folder=True)
    start = None if config.pruner is None else weights_digest(split_options(find_pruner(config.pruner))[0])
    if not begin(run.out, {"words": [word for word in words if not word.startswith("--out")], "start": start}):
        console.print(f"{run.out}: is finished", soft_wrap=True)
        return
    pruner = METHODS[config.method](run)
    facts = {"method": config.method, "sparsity": config.sparsity, "command": run.line, "start": config.pruner}
    note = write_note(run.out, pruner, config.method in STRUCTURED, facts)
    console.print(
        f"{run.out}: {note['parameters']:,} parameters, {note['not_zero']:,} not zero; {note['speed']}", soft_wrap=True
    )


if __name__ == "__main__":
    main()
