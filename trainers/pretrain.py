"""Train an embedded frozen VLM: `python -m trainers.pretrain --config configs/tiny_llava.yaml`, or `small_llava.yaml`.

Phases (see trainers/pretraining/): the vision tower under dense supervision, then the language model, for pages in
stages. Each writes checkpoints below `work` and goes on from the newest when the command is given again; the finished
model goes to `out`.
"""

from jsonargparse import ArgumentError, auto_cli

from prunezoo.core.errors import PruneZooError
from trainers.cli.errors import command
from trainers.cli.recipes import bound_recipes
from trainers.fit import root_message
from trainers.pretraining.train import train


@command
def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    bound_recipes()
    try:
        auto_cli(train, args=argv, as_positional=False, exit_on_error=False)
    except ArgumentError as error:
        raise PruneZooError(root_message(error)) from error


if __name__ == "__main__":
    main()
