"""`python -m trainers` lists the commands; it imports none of them, so it answers at once."""

import ast
from pathlib import Path

COMMANDS = (
    *("list", "show", "fit", "teacher", "evaluate", "benchmark", "cards", "publish", "codec"),
    *("convert", "adaptive", "pretrain", "demo"),
)


def main() -> None:
    """Print them with the first words of their files."""
    print("usage: python -m trainers.COMMAND [--help]\n")
    for name in COMMANDS:
        tree = ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))
        first = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ").partition(": `")[0]
        print(f"  {name:<10} {first.partition('. ')[0].rstrip('.')}")


main()
