"""A hook of mkdocs: links of pages to files of the repository outside of docs/ lead to them on the repository's site.

The pages are read there and in a clone as well, where these links are relative. `REPOSITORY` in the environment is the
address of the repository's files, such as https://github.com/ORG/prunezoo/blob/main; without it, only the text of such
a link is left.
"""

import os
import posixpath
import re
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s:]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text, with such links turned; blocks of code stay as they are."""
    folder = posixpath.dirname(page.file.src_uri)
    blocks = re.split(r"(^```.*?^```$)", markdown, flags=re.S | re.M)
    return "".join(
        block if block.startswith("```") else LINK.sub(lambda m: _turned(m, folder), block) for block in blocks
    )


def _turned(link: re.Match[str], folder: str) -> str:
    text, target = link.groups()
    place = posixpath.normpath(posixpath.join("docs", folder, target.partition("#")[0]))
    if target.startswith("#") or (place.startswith("docs/") and place.endswith(".md")):
        return link.group()
    address = os.environ.get("REPOSITORY")
    return f"[{text}]({address.rstrip('/')}/{place})" if address else text
