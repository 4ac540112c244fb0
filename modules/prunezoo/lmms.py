"""prunezoo as a model of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), for any of its image tasks.

    lmms-eval --model prunezoo --model_args pretrained=V,pruner=P,keep=64 --tasks mme --batch_size 8

lmms-eval finds it by its entry point once prunezoo is installed beside it (`pip install prunezoo[eval]`). Written
against lmms-eval 0.7.
"""

import inspect
import json
from collections.abc import Sequence
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from .core.errors import PruneZooError
from .core.near import near
from .core.registry import load_pruner
from .host import attach
from .host.parts.loading import default_device, default_dtype, load_vlm
from .host.stages.prompt import Positions

try:
    from lmms_eval.api.model import lmms
except ImportError:  # imported without the extra: there is nothing here to use then, but nothing breaks either
    lmms = object

NEW_TOKENS = 1024
"""Longest answer where the task sets no limit, as in lmms-eval's own models."""


def manifest() -> Any:
    """What lmms-eval asks the entry point for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="prunezoo", chat_class_path=f"{__name__}.PruneZooModel")


def parse_keep(text: object) -> int | float:
    """`64` is tokens per image; `1/9` or `0.25` a share of them.

    Raises:
        PruneZooError: neither.
    """
    try:
        value = Fraction(str(text).strip())
    except (ValueError, ZeroDivisionError):
        raise PruneZooError(f"keep={text}: write tokens (64), a fraction (1/9) or a share (0.25)") from None
    return int(value) if str(text).strip().lstrip("+-").isdigit() else float(value)


class PruneZooModel(lmms):
    """A frozen vision-language model under a pruner.

    Args:
        pretrained: Local folder or Hub id of a `transformers` image-text-to-text model.
        pruner: What :func:`load_pruner` takes; "full" keeps all tokens.
        keep: Tokens per image, or a share of them; see :func:`parse_keep`.
        batch_size: Questions at once.
        device: By default a GPU if there is one.
        dtype: By default float32 on a CPU, bfloat16 on a GPU.
        positions: "original" or "compact", as `attach` takes it.
        revision: Of the pruner, for a Hub id.
        stats: File to write the tokens to that the language model read of a picture, mean over pictures and layers, as
            ``{"images": …, "tokens": …}``.

    Raises:
        PruneZooError: An unknown option, or what `load_pruner` and `attach` refuse.
    """

    is_simple = False  # asks for messages, not for a text and pictures

    def __init__(
        self,
        pretrained: str,
        pruner: str = "full",
        keep: str | float = 1.0,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        positions: Positions = "original",
        revision: str | None = None,
        stats: str | None = None,
        max_batch_size: int | None = None,  # lmms-eval passes it; it is for batch sizes that it finds by itself
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            name, known = min(unknown), inspect.signature(type(self)).parameters.keys() - {"unknown"}
            raise PruneZooError(f"--model_args: '{name}' is unknown{near(name, known)}")
        device = device or default_device()
        self.vlm, self.processor = load_vlm(pretrained, device, dtype or default_dtype(device))
        self.pruner = load_pruner(pruner, revision, vlm=self.vlm)
        self.keep, self.positions, self.batch_size = parse_keep(keep), positions, int(batch_size)
        self.stats, self.tokens = stats, list[float]()  # of each picture
        with attach(self.vlm, self.pruner, self.keep, self.positions):
            pass  # refuses here and now what it cannot do

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, in the order of the requests; those in a row with equal options are batched."""
        answers: list[str] = []
        for _, group in groupby(requests, key=lambda request: repr(sorted(request.args[2].items(), key=str))):
            same = list(group)
            for start in range(0, len(same), self.batch_size):
                answers += self._answer(same[start : start + self.batch_size])
        if self.stats is not None:
            mean = sum(self.tokens) / max(len(self.tokens), 1)
            Path(self.stats).write_text(json.dumps({"images": len(self.tokens), "tokens": mean}), encoding="utf-8")
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: lmms-eval gives models that ask for messages no such requests."""
        raise PruneZooError("prunezoo answers generate_until tasks only; choose such a version of the task")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise PruneZooError("prunezoo answers generate_until tasks only; choose such a version of the task")

    @torch.no_grad()
    def _answer(self, requests: Sequence[Any]) -> list[str]:
        texts, pictures = [], []
        for request in requests:
            _, doc_to_messages, _, number, task, split = request.args
            messages, images = read_messages(doc_to_messages(self.task_dict[task][split][number]))
            texts.append(self.processor.apply_chat_template(messages, add_generation_prompt=True))
            pictures.append(images)
        start = self.processor.tokenizer.bos_token
        inputs = self.processor(
            text=texts,
            images=pictures if any(pictures) else None,
            padding=True,
            padding_side="left",
            add_special_tokens=start is None or not texts[0].startswith(start),  # the template may have written it
            return_tensors="pt",
        ).to(self.vlm.device)
        options = dict(requests[0].args[2])
        stops = options.pop("until", None) or []
        with attach(self.vlm, self.pruner, self.keep, self.positions) as run:
            ids = self.vlm.generate(**inputs, **generation_options(options))
        self.tokens += run.stats.tokens
        said = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for stop in [stops] if isinstance(stops, str) else stops:
            said = [text.split(stop)[0] if stop else text for text in said]
        return [text.strip() for text in said]


def read_messages(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """lmms-eval's messages as a chat template takes them, and their pictures in order.

    Raises:
        PruneZooError: A clip or sound.
    """
    images: list[Any] = []
    shown = []
    for message in messages:
        content = []
        for part in message["content"]:
            if part["type"] == "image":
                images.append(part["url"].convert("RGB"))
                content.append({"type": "image"})
            elif part["type"] == "text":
                content.append({"type": "text", "text": part["text"]})
            else:
                raise PruneZooError(f"prunezoo reads pictures in lmms-eval, no {part['type']}: choose another task")
        shown.append({"role": message["role"], "content": content})
    return shown, images


def generation_options(options: dict[str, Any]) -> dict[str, Any]:
    """A task's options as `generate` takes them: greedy unless the task sets a temperature above 0."""
    greedy = not options.get("temperature")
    wanted = {"max_new_tokens": options.get("max_new_tokens", NEW_TOKENS), "num_beams": options.get("num_beams", 1)}
    if greedy:
        return {**wanted, "do_sample": False}
    return {**wanted, "do_sample": True, "temperature": options["temperature"], "top_p": options.get("top_p")}
