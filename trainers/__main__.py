"""`python -m trainers` lists the commands; it imports none of them, so it answers at once."""

import ast
from pathlib import Path

OFTEN = ("list", "show", "fit", "evaluate", "benchmark", "cards", "publish")
"""What most people come for, which is listed first."""
HERE = Path(__file__).parent


def commands(folder: Path) -> dict[str, str]:
    """What can be run in a folder, files and rooms, each with the first words of what it says of itself."""
    found = {}
    for path in sorted([*folder.glob("[a-z]*.py"), *folder.glob("*/__main__.py")]):
        text = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__":' in text:
            first = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")
            name = path.parent.name if path.stem == "__main__" else path.stem
            found[name] = first.partition(": `")[0].partition(". ")[0].rstrip(".")
    return found


def main() -> None:
    """Print the commands of users, then those of maintainers."""
    print("usage: python -m trainers.COMMAND [--help]\n")
    own = commands(HERE)
    for name in dict.fromkeys((*OFTEN, *own)):
        print(f"  {name:<14} {own[name]}")
    print("\nfor maintainers: python -m trainers.upkeep.COMMAND [--help]\n")
    for name, words in commands(HERE / "upkeep").items():
        print(f"  {name:<14} {words}")


main()
