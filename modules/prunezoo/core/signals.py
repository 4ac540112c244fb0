"""The names of the signals that pruners may ask for in `Pruner.needs`, and how a name says where it is taken.

A name is ``kind``, perhaps ``@where``, perhaps ``+norope``, perhaps ``+images``: ``cls_attention``,
``received_attention@8`` (vision block 8), ``last_attention@previous`` (the decoder layer before the one in front of
which the pruner stands), ``prompt_attention@2+norope+images``. The kinds, with their shapes and what they are, stand in
:data:`KINDS`.

Vision kinds: ``@b`` is a block, from 0, or from the end of those up to the projected one if negative; ``@9/24`` is the
ninth of the tower's 24 blocks, and of a tower with another number of them the one as far in; ``@next`` is the one
behind the projected one, which runs too if the tower has it; without it the block whose output is projected, and in the
vision stage, which knows no other, the one inside which the pruner stands.
Decoder kinds: ``@l`` is a layer, from 0; without it layer 0 in the prompt stage, and in the layer stage the one in
front of which the pruner stands; ``@previous`` (layer stage only) the one before that. ``+norope`` leaves the rotary
embedding out of queries and keys. ``+images`` (what words attend to) takes the softmax over the image's own tokens
alone, so that each head and each word counts as much as any other, however little of it goes to the image.
The other kinds are taken nowhere in particular.

A token of the language model that is made of several patches has the mean of theirs, in both directions of a map; only
its pixels are those of all of them. Values on padding are finite.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from .errors import PruneZooError
from .near import near
from .plan import gather_rows


@dataclass(frozen=True)
class Kind:
    """What a kind of signal is.

    Axes: R images, N image tokens (wherever it stands, that axis follows the tokens: as some go, it gets shorter), T
    words of the prompt in the columns of `PruneInputs.text`, D width of the language model, H heads, d width of a head,
    F neurons of an MLP, C channels of a picture or a tower, p pixels, E width of a text encoder; a digit is a length.
    """

    axes: str
    text: str


VISION_KINDS = {
    "cls_attention": Kind("R N", "what CLS attends to in a vision block, mean over heads"),
    "cls_head_attention": Kind("R N H", "the same of each of its heads"),
    "cls_joint_attention": Kind("R N", "what CLS attends to in a vision block whose heads are taken as one"),
    "cls_query": Kind("R N H d", "the query of CLS in a vision block: of the CLS of the picture that a token is from"),
    "cls_value": Kind("R N H d", "the value of CLS likewise"),
    "received_attention": Kind("R N", "what a patch receives in a vision block, mean over heads and all rows"),
    "vision_attention": Kind("R N N", "what a patch (row) attends to of the others in a vision block, mean over heads"),
    "vision_head_attention": Kind("R N N H", "the same of each of its heads"),
    "vision_keys": Kind("R N H d", "keys of a vision block"),
    "vision_values": Kind("R N H d", "values likewise"),
    "vision_outputs": Kind("R N H d", "what each head of a vision block gives a patch, before they are joined"),
    "vision_inputs": Kind("R N C", "what a vision block is given; of the first, what the patch embedding puts out"),
    "vision_states": Kind("R N C", "what a vision block puts out, not in the vision stage: before the projector"),
}
"""Read of one block of the tower. A patch sees nothing of pictures (or windows) that are not its own: 0."""

ATTENTION_KINDS = {
    "prompt_attention": Kind("R N", "what the prompt's words behind the image attend to in a decoder layer, mean"),
    "prompt_head_attention": Kind("R N H", "the same of each of its heads"),
    "last_attention": Kind("R N", "what the prompt's last token attends to in a decoder layer, mean over heads"),
    "self_attention": Kind(
        "R N",
        "what an image token receives in a decoder layer, mean over heads and over the image's tokens that see it",
    ),
}
MAP_KINDS = {
    "layer_attention": Kind("R N N", "what an image token (row) attends to of its image in a decoder layer, head mean"),
    "layer_head_attention": Kind("R N N H", "the same of each head"),
    "word_attention": Kind("R N T", "what each word of the prompt attends to in a decoder layer, mean over heads"),
    "word_head_attention": Kind("R N T H", "the same of each head"),
    "seen_word_head_attention": Kind("R N T H", "what an image token attends to of each word, of each head"),
    "among_words_head_attention": Kind("R T T H", "what a word (row) attends to of the others, of each head"),
    "word_rotation": Kind("R N T", "how far the rotary embedding turns each word away from an image token: the mean "
                          "over frequencies of the angle's cosine, 1 where it does not"),
}  # fmt: skip
"""Maps of a decoder layer, whole; rows are normalised over all that they see. 0 for words that are filler."""

_STATES = {
    "hidden_states": ("D", "as they enter a decoder layer"),
    "normed_states": ("D", "the same through the norm that stands behind the last layer"),
    "layer_keys": (
        "H d",
        "keys of a decoder layer, rotated to where the model puts the token (with padding, further on)",
    ),
    "attention_change": ("2", "what a decoder layer's attention gives over what it takes: norms' ratio, and cosine"),
    "mlp_change": ("2", "the same of its MLP"),
    "mlp_activations": ("F", "neurons of a decoder layer's MLP, act(gate) * up: what its last projection reads"),
}
STATE_KINDS = {name: Kind(f"R N {axes}", f"image tokens: {text}") for name, (axes, text) in _STATES.items()}
WORD_KINDS = {f"word_{name}": Kind(f"R T {axes}", f"words: {text}") for name, (axes, text) in _STATES.items()}
"""Of each image token, and of each word of the prompt that it belongs to."""

OTHER_KINDS = {
    "relevance": Kind("R N", "gradient-weighted attention, rolled out over all decoder layers"),
    "pixels": Kind("R N C p p", "the square of the picture that a token is made of, as the tower is given it; C counts "
                   "the channels of each frame that a token spans"),
    "frame": Kind("R N", "number of the frame (step of time) of a clip, long; 0 in still pictures"),
    "text_features": Kind("R E", "what the `text_encoder` given to `attach` or `encode` makes of the question"),
    "image_features": Kind("R N E", "what its method `image_features` makes of `vision_states`: in the same space"),
    "word_behind": Kind("R T", "1 for words of the prompt that stand behind the image, else 0"),
    "word_match": Kind("R T", "which of the words behind the image its tokens are most like, as both enter the "
                       "language model: softmax over those words of the dot product, mean over tokens; 0 for others"),
}  # fmt: skip

KINDS: Mapping[str, Kind] = {
    **VISION_KINDS, **ATTENTION_KINDS, **MAP_KINDS, **STATE_KINDS, **WORD_KINDS, **OTHER_KINDS
}  # fmt: skip
"""All of them, by name."""

VISION_SIGNALS = tuple(VISION_KINDS)
INSIDE_SIGNALS = tuple(kind for kind in VISION_KINDS if kind != "vision_states")
"""What the vision stage has, in which a block is not at its end."""
TOWER_ATTENTION = {"cls": "cls_attention", "received": "received_attention"}
"""What a patch is rated by in a tower with CLS, and in any: the option `attention` of several methods."""
ATTENTION_SIGNALS = (*ATTENTION_KINDS, *MAP_KINDS)
WORD_SIGNALS = ("prompt_attention", "prompt_head_attention", "last_attention")
DECODER_SIGNALS = (*ATTENTION_SIGNALS, *STATE_KINDS, *WORD_KINDS)
ROTATED = (*(name for name in ATTENTION_SIGNALS if name != "word_rotation"), "layer_keys", "word_layer_keys")
SIGNALS = tuple(KINDS)
PREVIOUS, NEXT = "previous", "next"


@dataclass(frozen=True)
class Signal:
    """A signal's name, taken apart."""

    kind: str
    at: int | Fraction | str | None = None  # block or layer; share of the tower; "previous", "next"; None: the default
    rotary: bool = True
    images: bool = False  # whether the softmax is over the image's own tokens alone

    @property
    def number(self) -> int | None:
        """The layer, where it is given by number."""
        return self.at if isinstance(self.at, int) else None

    @property
    def block(self) -> int | Fraction | None:
        """The vision block, by number or as a share of the tower; None: the one whose output is projected."""
        return None if isinstance(self.at, str) else self.at

    @property
    def is_vision(self) -> bool:
        """Whether it comes from a block of the vision tower."""
        return self.kind in VISION_SIGNALS

    @property
    def axes(self) -> tuple[str, ...]:
        """Of :class:`Kind`, one each."""
        return tuple(KINDS[self.kind].axes.split())


@cache
def parse_signal(name: str) -> Signal:
    """Take a signal's name apart.

    Raises:
        PruneZooError: Not a signal's name; the message lists the kinds.
    """
    match = re.fullmatch(r"([a-z_]+)(?:@(-?\d+|\d+/[1-9]\d*|previous|next))?(\+norope)?(\+images)?", name)
    if match is None or match[1] not in SIGNALS:
        hint = near(re.split("[@+]", name)[0], SIGNALS)
        raise PruneZooError(f"unknown signal '{name}', which is written 'kind' or 'kind@where'{hint}")
    kind, where, norope, images = match.groups()
    at = where if where in (None, PREVIOUS, NEXT) else Fraction(where) if "/" in where else int(where)
    if norope and kind not in ROTATED:
        raise PruneZooError(f"signal '{name}': +norope is for {', '.join(ROTATED)}")
    if images and kind not in WORD_SIGNALS:
        raise PruneZooError(f"signal '{name}': +images is for {', '.join(WORD_SIGNALS)}")
    misplaced = at == PREVIOUS if kind in VISION_SIGNALS else at == NEXT or isinstance(at, Fraction)
    if misplaced or (kind in OTHER_KINDS and at is not None):
        raise PruneZooError(f"signal '{name}': '@{where}' means nothing for {kind}")
    if kind in DECODER_SIGNALS and isinstance(at, int) and at < 0:
        raise PruneZooError(f"signal '{name}': decoder layers are counted from 0")
    return Signal(kind, at, not norope, bool(images))


def follow_tokens(name: str, values: Tensor, index: Tensor) -> Tensor:
    """What a signal has of the tokens that are left.

    Args:
        name: Of the signal.
        values: It, with the axes of its kind.
        index: ``(R, K)`` slots that are left.

    Returns:
        The same with K in the place of each N.
    """
    for place, axis in enumerate(parse_signal(name).axes):
        if axis == "N":
            values = gather_rows(values.movedim(place, 1), index).movedim(1, place)
    return values


def join_images(name: str, items: Sequence[Tensor]) -> Tensor:
    """A signal of several images as that of one with the tokens of all, which see nothing of one another.

    Args:
        name: Of the signal.
        items: Of each image, with the axes of its kind but R.
    """
    own = [place for place, axis in enumerate(parse_signal(name).axes[1:]) if axis == "N"]
    if len(own) < 2:
        return torch.cat(list(items), own[0]) if own else items[0]
    shape = list(items[0].shape)
    for place in own:
        shape[place] = sum(item.shape[place] for item in items)
    whole, start = items[0].new_zeros(shape), 0
    for item in items:
        part = whole
        for place in own:
            part = part.narrow(place, start, item.shape[place])
        part.copy_(item)
        start += item.shape[own[0]]
    return whole


def stack_images(items: Sequence[Tensor]) -> Tensor:
    """``(R, ...)``: tensors of R images, each filled up with 0 at the end of every axis to the longest."""
    lengths = zip(*(item.shape for item in items), strict=True)
    whole = items[0].new_zeros(len(items), *(max(own) for own in lengths))
    for row, item in zip(whole, items, strict=True):
        row[tuple(slice(length) for length in item.shape)] = item
    return whole
