"""Train the embedded frozen VLM: `python -m trainers.pretrain --config configs/tiny_llava.yaml`.

Two phases (see trainers/pretraining/): the vision tower under dense supervision, then the language model. Each writes
checkpoints below `work` and goes on from the newest when the command is given again; the finished model goes to `out`.
"""

from jsonargparse import auto_cli

from trainers.cli.errors import command
from trainers.pretraining.train import train


@command
def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    auto_cli(train, args=argv, as_positional=False)


if __name__ == "__main__":
    main()
