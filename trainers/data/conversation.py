"""From suite items (pictures, turns of question and answer) to a batch that a vision-language model reads.

Works with any `transformers` processor that has a chat template, and never looks at how a family writes images into
text.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from prunezoo.core.errors import PruneZooError

from .pictures import BrokenImage
from .suite import Item


class RefusedImage(BrokenImage):
    """A picture that can be read, and that a model's processor refuses.

    Args:
        message: What to say.
        item: Whose picture it is.
    """

    def __init__(self, message: object, item: Item | None = None) -> None:
        super().__init__(message)
        self.item = item


IGNORED = -100
"""The label of a token that no loss looks at."""


class ConversationCollator:
    """Turns items into processor output: B conversations, L tokens of the longest.

    Args:
        processor: A `transformers` processor with a chat template.
        answers: With answers, for training and teacher-forced measuring: the last answer and its end token stand in the
            text and alone are labelled; padding on the right. Without, for generation: the text stops where the
            assistant is to speak; padding on the left, no labels. Earlier answers are history in both cases.
        max_length: Longest sequence in tokens, image tokens included. Longer conversations lose their oldest turns,
            and the pictures in them unless these are all; then the tail of their answer. None: no limit.

    What a text has of the tokenizer's special tokens, such as the placeholder of a picture, is text: a space goes into
    each, so that nothing takes it for one.
    """

    def __init__(self, processor: Any, answers: bool = True, max_length: int | None = None) -> None:
        if not getattr(processor, "chat_template", None):
            raise PruneZooError(f"{type(processor).__name__} has no chat template: add chat_template.jinja beside it")
        self.processor = processor
        self.answers = answers
        self.max_length = max_length
        self.reserved = re.compile("|".join(map(re.escape, sorted(reserved(processor), key=len, reverse=True))))

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Collate.

        Returns:
            The processor's output, `input_ids` (B, L), `attention_mask` (B, L), `pixel_values` …, and with answers
            `labels` (B, L), which is -100 all over but at the last answer and its end token.

        Raises:
            BrokenImage: The processor refuses a picture; the message names its item.
            PruneZooError: A prompt alone fills ``max_length``.
        """
        turns = [list(item.turns) for item in items]
        batch = self._process(items, turns)
        if self.max_length is None:
            return batch
        while too_long := [b for b, n in enumerate(self._prompt_lengths(batch)) if n >= self.max_length]:
            for b in too_long:
                if len(turns[b]) == 1:
                    raise PruneZooError(
                        f"{items[b].id}: the prompt alone fills max_length={self.max_length} tokens; raise max_length"
                    )
                del turns[b][0]
            batch = self._process(items, turns)
        length = batch["input_ids"].shape[1]
        if self.answers and length > self.max_length:  # only answers reach beyond: cut their tails
            cut = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and v.shape[1:] == (length,)}
            batch.update({name: tensor[:, : self.max_length] for name, tensor in cut.items()})
        return batch

    def _process(self, items: Sequence[Item], turns: list[list[tuple[str, str]]]) -> dict[str, Any]:
        shown = [pictures_left(item, len(left)) for item, left in zip(items, turns, strict=True)]
        places = [[turn for turn, _ in own] for own in shown]
        pictures = [[picture for _, picture in own] for own in shown]
        prompts = [self._render(t, place, answered=False) for t, place in zip(turns, places, strict=True)]
        texts = prompts
        if self.answers:
            texts = [self._render(t, place, answered=True) for t, place in zip(turns, places, strict=True)]
        try:
            batch = self._ask(texts, pictures)
        except Exception as error:  # processors raise whatever their own code happens to
            self._blame(items, texts, pictures)
            raise error
        if self.answers:
            batch["labels"] = self._labels(batch, prompts, texts)
        return batch

    def _ask(self, texts: list[str], pictures: Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
        """What the processor makes of texts with their pictures."""
        bos = self.processor.tokenizer.bos_token
        return dict(
            self.processor(
                text=texts,
                images=[[picture.convert("RGB") for picture in own] for own in pictures],
                padding=True,
                padding_side="right" if self.answers else "left",
                add_special_tokens=bos is None or not texts[0].startswith(bos),  # the template may have written it
                return_tensors="pt",
            )
        )

    def _blame(self, items: Sequence[Item], texts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> None:
        """Find the picture that the processor refuses, alone and with another picture not, whatever it raises.

        So a mistake in the processor, or in what it is asked, is none of a picture's: it would refuse any.

        Raises:
            RefusedImage: There is one.
        """
        for item, text, own in zip(items, texts, pictures, strict=True):
            others: list[Image.Image] = [Image.new("RGB", (256, 256))] * len(own)
            for number, picture in enumerate(own):
                try:
                    self._ask([text], [[*others[:number], picture, *others[number + 1 :]]])
                except Exception as error:  # as above
                    try:
                        self._ask([text], [others])
                    except Exception:  # no fault of this picture
                        return
                    raise RefusedImage(
                        f"{item.id}: {type(self.processor).__name__} refuses its picture of {picture.width} x "
                        f"{picture.height} pixels ({' '.join(str(error).split()):.200}); replace it or drop the entry",
                        item,
                    ) from error

    def _render(self, turns: Sequence[tuple[str, str]], places: Sequence[int], answered: bool) -> str:
        """The conversation as text, up to the last answer's end token (answered) or to where the assistant begins;
        pictures stand in the questions ``places``.
        """
        messages: list[dict[str, Any]] = []
        for number, (question, answer) in enumerate(turns):
            images = [{"type": "image"}] * places.count(number)
            asked, said = ({"type": "text", "text": self._plain(text)} for text in (question, answer))
            messages.append({"role": "user", "content": [*images, asked]})
            messages.append({"role": "assistant", "content": [said]})
        if not answered:
            return self.processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
        text = self.processor.apply_chat_template(messages).rstrip()
        # LLaVA-1.5's template, for one, writes no end token; without it nobody would learn, or measure, to stop
        ended = text.endswith(tuple(self.processor.tokenizer.all_special_tokens))
        return text if ended else text + self.processor.tokenizer.eos_token

    def _plain(self, text: str) -> str:
        """A text in which no special token stands."""
        return self.reserved.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def _labels(self, batch: dict[str, Any], prompts: list[str], texts: list[str]) -> torch.Tensor:
        """Labels (B, L): what the full text has beyond its prompt.

        Counted on the texts before image tokens are multiplied, as a difference of token lists: a tokenizer may join
        the end of the prompt and the beginning of the answer, so that tokenizing the answer alone would be wrong.
        """
        tokenizer = self.processor.tokenizer
        labels = torch.full_like(batch["input_ids"], IGNORED)
        pairs = zip(tokenizer(prompts)["input_ids"], tokenizer(texts)["input_ids"], strict=True)
        for row, (prompt, text) in enumerate(pairs):
            same = next((i for i, (p, t) in enumerate(zip(prompt, text, strict=False)) if p != t), len(prompt))
            end = int(batch["attention_mask"][row].sum())
            start = end - (len(text) - same)
            labels[row, start:end] = batch["input_ids"][row, start:end]
        return labels

    def _prompt_lengths(self, batch: dict[str, Any]) -> list[int]:
        """Number of tokens before the answer, for each conversation."""
        lengths = batch["attention_mask"].sum(1)
        if self.answers:
            lengths = lengths - (batch["labels"] != IGNORED).sum(1)
        return lengths.tolist()


def pictures_left(item: Item, turns: int) -> list[tuple[int, Image.Image]]:
    """The pictures of an item of which the last so many turns are left, with their turns among these.

    Those of turns that have gone go too; where none would be left, all stand in the first turn.
    """
    gone = len(item.turns) - turns
    left = [(turn - gone, picture) for turn, picture in item.pictures if turn >= gone]
    return left or [(0, picture) for _, picture in item.pictures]


def reserved(processor: Any) -> set[str]:
    """Strings that a processor or its tokenizer takes for something else than text."""
    own = {value for name, value in vars(processor).items() if name.endswith("_token") and isinstance(value, str)}
    added = {str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
    # a line feed, or a single letter, cannot be told from text
    return {token for token in own | added | set(processor.tokenizer.all_special_tokens) if len(token.strip()) > 1}
