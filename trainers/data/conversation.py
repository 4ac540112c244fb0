"""From suite items (picture, turns of question and answer) to a batch that a vision-language model reads.

Works with any `transformers` processor that has a chat template, and never looks at how a family writes images into
text.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from prunezoo.core.errors import PruneZooError

if TYPE_CHECKING:
    from .suite import Item

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
            then the tail of their answer. None: no limit.
    """

    def __init__(self, processor: Any, answers: bool = True, max_length: int | None = None) -> None:
        if not getattr(processor, "chat_template", None):
            raise PruneZooError(f"{type(processor).__name__} has no chat template: add chat_template.jinja beside it")
        self.processor = processor
        self.answers = answers
        self.max_length = max_length

    def __call__(self, items: Sequence["Item"]) -> dict[str, Any]:
        """Collate.

        Returns:
            The processor's output, `input_ids` (B, L), `attention_mask` (B, L), `pixel_values` …, and with answers
            `labels` (B, L), which is -100 all over but at the last answer and its end token.
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

    def _process(self, items: Sequence["Item"], turns: list[list[tuple[str, str]]]) -> dict[str, Any]:
        prompts = [self._render(t, answered=False) for t in turns]
        texts = [self._render(t, answered=True) for t in turns] if self.answers else prompts
        bos = self.processor.tokenizer.bos_token
        batch = dict(
            self.processor(
                text=texts,
                images=[[item.image.convert("RGB")] for item in items],
                padding=True,
                padding_side="right" if self.answers else "left",
                add_special_tokens=bos is None or not texts[0].startswith(bos),  # the template may have written it
                return_tensors="pt",
            )
        )
        if self.answers:
            batch["labels"] = self._labels(batch, prompts, texts)
        return batch

    def _render(self, turns: Sequence[tuple[str, str]], answered: bool) -> str:
        """The conversation as text, up to the last answer's end token (answered) or to where the assistant begins."""
        messages: list[dict[str, Any]] = []
        for number, (question, answer) in enumerate(turns):
            image = [{"type": "image"}] if number == 0 else []
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        if not answered:
            return self.processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
        text = self.processor.apply_chat_template(messages).rstrip()
        # LLaVA-1.5's template, for one, writes no end token; without it nobody would learn, or measure, to stop
        ended = text.endswith(tuple(self.processor.tokenizer.all_special_tokens))
        return text if ended else text + self.processor.tokenizer.eos_token

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
