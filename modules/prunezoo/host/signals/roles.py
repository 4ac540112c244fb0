"""The markers of a chat template, found by having it write: two texts that share no word, and what stands around both.

Nothing of a template is read, so any works: what is the same whatever is said belongs to the template.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

from ...core.errors import PruneZooError
from ...core.roles import ChatMarkers, Ids, Role

TEXTS = ("what is left ?", "1 box")
"""They share neither their first nor their last word."""
Turn = tuple[str, str | None]  # role, and what is said; None: one of TEXTS
CONTEXTS: dict[Role, tuple[list[Turn], list[Turn]]] = {
    Role.QUESTION: ([("user", None)], [("user", "no"), ("assistant", "red"), ("user", None)]),
    Role.ANSWER: (
        [("user", "no"), ("assistant", None), ("user", "no")],
        [("user", "yes"), ("assistant", None), ("user", "yes")],
    ),
    Role.INSTRUCTION: ([("system", None), ("user", "no")], [("system", None), ("user", "yes")]),
}
"""Two conversations in which a text of the role stands, with other words in front of and behind it if there are any."""


def chat_markers(processor: Any) -> ChatMarkers:
    """What a processor's chat template puts around the texts of each role.

    Args:
        processor: Of a vision-language model, with a chat template and a tokenizer.

    Raises:
        PruneZooError: It has no chat template, or the template writes nothing in front of the user's text by which that
            could be found again.
    """
    if not getattr(processor, "chat_template", None):
        raise PruneZooError(f"{type(processor).__name__} has no chat template: roles cannot be told, leave markers out")
    opens: dict[Ids, Role] = {}
    closes: list[Ids] = []
    for role, contexts in CONTEXTS.items():
        try:
            (before, behind), (other_before, other_behind) = (_around(processor, turns) for turns in contexts)
        except TemplateError:  # a template without system texts
            continue
        opener = _shared(before[::-1], other_before[::-1])[::-1]
        if opener and opener not in opens:  # some write a system text as if it were somebody else's
            opens[opener] = role
            closes.append(_shared(behind, other_behind))
    if Role.QUESTION not in opens.values():
        raise PruneZooError("this chat template writes nothing in front of the user's text: leave markers out")
    special = set(processor.tokenizer.all_special_ids) - {processor.tokenizer.unk_token_id}  # that one is a word too
    return ChatMarkers(opens, tuple(filter(None, closes)), frozenset(special))


def _around(processor: Any, turns: Sequence[Turn]) -> tuple[Ids, Ids]:
    """The ids in front of and behind the text that is left open, as far as they are the same for any."""
    one, other = (processor.tokenizer(_write(processor, turns, text))["input_ids"] for text in TEXTS)
    return _shared(one, other), _shared(one[::-1], other[::-1])[::-1]


def _shared(one: Sequence[int], other: Sequence[int]) -> Ids:
    """What both begin with."""
    return tuple(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _write(processor: Any, turns: Sequence[Turn], text: str) -> str:
    """A conversation as the template writes it, up to where the assistant begins."""
    messages = [{"role": role, "content": [{"type": "text", "text": said or text}]} for role, said in turns]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
