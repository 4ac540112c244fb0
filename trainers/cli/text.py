"""Other people's texts on a terminal and in files that are passed on: control characters, and paths of a machine."""

import re
from pathlib import Path

from .names import ROOT

# controls but for tab and newline; half characters, which no terminal can show; ends of lines and of paragraphs that
# are none elsewhere; and what turns the direction of the text around it
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u202a-\u202e\u2066-\u2069]")
# `'/home/me/my data'` in quotes, `root: /home/me/my data` to the end of its line, `--out=/home/me/data` up to a space;
# what stands behind a letter or a colon is part of something else, such as an address
PATH = r"(?:file://|~[\w.-]*)?/|\b[A-Za-z]:[\\/](?!/)"
LOCAL = re.compile(
    rf"(?P<quote>['\"])(?P<quoted>(?:{PATH})[^'\"\n]*)(?P=quote)"
    rf"|(?<=: )(?P<value>(?:{PATH})[^'\",\[\]{{}}\n]*)$"
    rf"|(?<![\w/.:~\\-])(?P<word>(?:{PATH})[^\s'\",;|()\[\]{{}}<>`]*)",
    re.MULTILINE,
)


def visible(text: str) -> str:
    r"""A text whose control characters are written out, `\x1b`."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def in_figure(text: str) -> str:
    """A text as matplotlib takes it letter by letter: no formula, and nothing that its legend leaves out."""
    text = visible(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def shown_path(path: str | Path) -> str:
    """A path as others see it: within the repository from its root, elsewhere by its last name alone."""
    whole = Path(path).absolute().resolve()
    return str(whole.relative_to(ROOT)) if whole.is_relative_to(ROOT) else Path(path).name or whole.name


def without_folders(text: str) -> str:
    """A text whose absolute paths are written as others see them: command lines, recipes, and the like."""

    def shorten(found: re.Match[str]) -> str:
        path = found["quoted"] or found["value"] or found["word"]
        if path[0] == "/":
            short = shown_path(path) if path.strip("/") else path
        else:  # from a home, of Windows, or an address
            short = re.split(r"[\\/]", path.rstrip("\\/"))[-1]
        quote = found["quote"] or ""
        return f"{quote}{short}{quote}"

    return LOCAL.sub(shorten, text)
