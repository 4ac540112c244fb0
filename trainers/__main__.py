"""`python -m trainers` lists the commands; it imports none of them, so it answers at once."""

import ast
from pathlib import Path

OFTEN = ("list", "show", "fit", "evaluate", "benchmark", "cards", "publish")
"""What most people come for, which is listed first."""


def main() -> None:
    """Print all files here that can be run, with the first words of each."""
    print("usage: python -m trainers.COMMAND [--help]\n")
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))}
    names = [name for name, text in texts.items() if 'if __name__ == "__main__":' in text]
    for name in dict.fromkeys((*OFTEN, *names)):
        first = (ast.get_docstring(ast.parse(texts[name])) or "").split("\n\n")[0].replace("\n", " ")
        print(f"  {name:<14} {first.partition(': `')[0].partition('. ')[0].rstrip('.')}")


main()
