"""Convert published One-D-Piece weights: `python -m trainers.upkeep.convert weights.safetensors FOLDER`.

The folder is what `OneDPiece.from_pretrained` loads. Where the weights are published as a pickle,
`trainers.upkeep.unpickle` makes safetensors of them first.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from prunezoo.tokenizers.official import read_official
from trainers.cli.errors import command


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Convert."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.upkeep.convert", description="Convert published tokenizer weights."
    )
    p.add_argument("source", type=Path, help="safetensors file in the layout of One-D-Piece or of TiTok's later code")
    p.add_argument("folder", type=Path, help="where to write the tokenizer")
    p.add_argument(
        "--reshape", choices=("legacy", "right"), help="how latents were reshaped; by default as the head suggests"
    )
    p.add_argument(
        "--codes",
        choices=("unit", "free"),
        help="of length 1 or of any, use_l2_norm in the published config; by default as the head suggests",
    )
    args = p.parse_args(argv)
    legacy = None if args.reshape is None else args.reshape == "legacy"
    tokenizer = read_official(args.source, legacy, None if args.codes is None else args.codes == "unit")
    tokenizer.save_pretrained(args.folder)
    shown = ", ".join(f"{key}={value}" for key, value in tokenizer.config.to_dict().items())
    print(f"{args.folder}: {sum(p.numel() for p in tokenizer.parameters()):,} parameters; {shown}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
