"""Texts beside pictures, for the tokenizers that read one: words as the model of their training has them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from prunezoo.core.errors import PruneZooError
from prunezoo.tokenizers.base import Text, Tokenizer
from prunezoo.tokenizers.captions import embed_captions
from trainers.data.captioned import caption_files, read_caption
from trainers.evaluation.loading import load_vlm

Texts = Callable[[Tokenizer, Sequence[int]], Text | None]
"""Of a tokenizer and numbers of pictures: what it reads beside these, None where it reads nothing."""


def load_words(vlm: str) -> Callable[[Sequence[str]], Text]:
    """What gives B captions as a :class:`Text`: the words of a model, by folder or Hub id, in float32 on the CPU.

    Raises:
        PruneZooError: There is no such model.
    """
    model, processor = load_vlm(vlm, "cpu", "float32")
    return partial(embed_captions, model, processor.tokenizer)


def same_text(tokenizer: Tokenizer, said: str | None, vlm: str, pictures: int = 1) -> Text | None:
    """One text for each of some pictures, as `--text` says it; None for a tokenizer that reads none.

    Args:
        tokenizer: Which is to read it.
        said: May be empty: then nothing is said. None: not given.
        vlm: The model whose words they are; it is loaded only where a text is read.
        pictures: How many.

    Raises:
        PruneZooError: A text is read and not given, or the other way round.
    """
    if tokenizer.reads_text and said is None:
        raise PruneZooError(
            f"tokenizer '{tokenizer.name}' reads a text beside each picture: say what is on it, --text 'a red circle'"
        )
    if not tokenizer.reads_text and said is not None:
        raise PruneZooError(f"--text: tokenizer '{tokenizer.name}' reads no text: leave it out")
    return None if said is None else load_words(vlm)([said] * pictures)


def captions_for(
    tokenizers: Mapping[str, Tokenizer], pictures: Sequence[Path], images: Path, captions: Path | None, vlm: str
) -> Texts:
    """What the tokenizers read beside photographs.

    Args:
        tokenizers: By name.
        pictures: Paths of the photographs.
        images: The folder that they are in, at any depth.
        captions: A folder with a caption for each, see :func:`caption_files`; None: they lie beside the photographs.
        vlm: The model whose words they are; it is loaded only where a text is read.

    Raises:
        PruneZooError: A caption is missing or no text, or captions are named and no tokenizer reads them.
    """
    if not any(tokenizer.reads_text for tokenizer in tokenizers.values()):
        if captions is not None:
            raise PruneZooError(f"--captions {captions}: none of the tokenizers reads a text: leave it out")
        return lambda tokenizer, places: None
    said = [read_caption(file) for file in caption_files(pictures, images, captions)]
    words = load_words(vlm)
    return lambda tokenizer, places: words([said[place] for place in places]) if tokenizer.reads_text else None
