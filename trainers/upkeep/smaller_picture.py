"""Measure the rival of the input stage on the embedded model: a smaller picture with as many tokens from the start.

    python -m trainers.upkeep.smaller_picture [--keep 3/4 1/2 1/4] [--limit 2100] [--json F]

The tower has learned positions for one size; `transformers` interpolates them (`interpolate_pos_encoding` of CLIP), and
then it reads a picture of fewer patches. So the whole scene is seen, less sharply, and by a tower that never saw that
size, as it never saw gaps. Beside it the same picture scaled up again: as blurred, with all tokens.

Letters: B items of a batch.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from prunezoo.host.families import find_family
from trainers.cli.errors import check_output, command
from trainers.cli.names import find_vlm
from trainers.cli.options import add_option
from trainers.cli.terminal import Terminal
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import Item, Suite, load_suite
from trainers.evaluation.budgets import Budget, parse_budget
from trainers.evaluation.loading import load_vlm
from trainers.evaluation.measure import Answers, measure
from trainers.evaluation.record import build_record, write_record
from trainers.evaluation.scores import ItemScores, Key
from trainers.evaluation.tables import print_record

SMALLER, BLURRED = "smaller_picture", "blurred_picture"
Size = tuple[int, int]


def size_of(share: Fraction, side: int) -> Size:
    """Rows and columns of patches of the smallest nearly square picture that has at least this share of side² patches.

    Args:
        share: In (0, 1].
        side: Patches along the whole picture.
    """
    sizes = [(rows, columns) for rows in range(1, side + 1) for columns in (rows, rows + 1) if columns <= side]
    return min((size for size in sizes if size[0] * size[1] >= share * side**2), key=lambda size: size[0] * size[1])


@contextmanager
def any_size(vlm: Any) -> Iterator[None]:
    """Let a CLIP tower read pictures of any number of patches."""

    def ask(_embeddings: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, {**kwargs, "interpolate_pos_encoding": True}

    handle = vlm.model.vision_tower.embeddings.register_forward_pre_hook(ask, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def pictures_of(processor: Any, high: int, wide: int) -> Iterator[None]:
    """Let a processor make pictures of so many pixels."""
    maker = processor.image_processor
    before, size = (maker.size, maker.crop_size), {"height": high, "width": wide}
    maker.size = maker.crop_size = size
    try:
        yield
    finally:
        maker.size, maker.crop_size = before


class Reader:
    """The bare model reads pictures of several sizes.

    Args:
        vlm: LLaVA with a CLIP tower.
        processor: Its processor.
    """

    def __init__(self, vlm: Any, processor: Any) -> None:
        vision = vlm.config.vision_config
        if find_family(vlm).title != "LLaVA" or vision.model_type != "clip_vision_model":
            raise PruneZooError(f"--vlm: LLaVA with a CLIP tower reads smaller pictures, not {vlm.config.model_type}")
        self.vlm, self.processor, self.patch = vlm, processor, vision.patch_size
        self.side = vision.image_size // vision.patch_size

    @torch.no_grad()
    def read(self, items: Sequence[Item], size: Size | None = None) -> tuple[Answers, Tensor]:
        """What the model says to pictures of so many patches, or to whole ones; and how many tokens each had (B,)."""
        rows, columns = size or (self.side, self.side)
        with any_size(self.vlm), pictures_of(self.processor, rows * self.patch, columns * self.patch):
            made = ConversationCollator(self.processor)(items)
            batch = {key: value.to(self.vlm.device) for key, value in made.items()}
            labels = batch.pop("labels")
            out = self.vlm(**batch, use_cache=False)
        return Answers.read(out.logits, labels), (batch["input_ids"] == self.vlm.config.image_token_index).sum(1)

    def blurred(self, item: Item, size: Size) -> Item:
        """The same with its picture brought to that size, and left for the processor to scale up again."""
        rows, columns = size
        small = item.image.resize((columns * self.patch, rows * self.patch), Image.Resampling.BICUBIC)
        return replace(item, image=small)


def measure_all(reader: Reader, suite: Suite, budgets: Sequence[Budget], batch_size: int) -> dict[Key, ItemScores]:
    """Scores of both rivals at each budget."""
    depth = find_family(reader.vlm).decoder().depth
    scores = {(name, b.label): ItemScores.empty(len(suite), depth) for name in (SMALLER, BLURRED) for b in budgets}
    for begin in range(0, len(suite), batch_size):
        place = slice(begin, min(begin + batch_size, len(suite)))
        items = [suite[number] for number in range(place.start, place.stop)]
        full, _ = reader.read(items)
        for budget in budgets:
            size = size_of(Fraction(budget.label), reader.side)
            blurred = [reader.blurred(item, size) for item in items]
            for name, read in ((SMALLER, reader.read(items, size)), (BLURRED, reader.read(blurred))):
                answers, tokens = read
                own = scores[name, budget.label]
                own.layers[place] = tokens[:, None].cpu().numpy()
                fields = zip((own.correct, own.agreement, own.kl), answers.compare(full, len(items)), strict=True)
                for field, values in fields:
                    field[place] = values.double().cpu().numpy()
                own.flops[place] = float("nan")
    return scores


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the record."""
    argv = sys.argv[1:] if argv is None else list(argv)
    p = argparse.ArgumentParser(
        prog="python -m trainers.upkeep.smaller_picture", description="Measure smaller pictures, bare model."
    )
    add_option(p, "keep", default=["3/4", "1/2", "1/4"], help="shares of the patches, as 1/2")
    for name, options in {"vlm": {"default": "tiny-llava"}, "suite": {"default": "scenes"}, "split": {}}.items():
        add_option(p, name, **options)
    add_option(p, "limit", default=2100)
    for name in ("batch-size", "device", "dtype", "json"):
        add_option(p, name)
    args = p.parse_args(argv)
    check_output("--json", args.json)
    budgets = [parse_budget(keep) for keep in args.keep]
    if wrong := [b.label for b in budgets if "/" not in b.label]:
        raise PruneZooError(f"--keep {wrong[0]}: write a share, as 1/2")
    suite, model = load_suite(args.suite, args.split, args.limit), find_vlm(args.vlm)
    vlm, processor = load_vlm(model, args.device, args.dtype)
    reader = Reader(vlm, processor)
    whole = measure(vlm, processor, suite, [], [], args.batch_size)
    scores = measure_all(reader, suite, budgets, args.batch_size)
    header: Mapping[str, Any] = {
        "vlm": model, "suite": args.suite, "suite_version": suite.version, "split": args.split,
        "seed": 0,
        "command": shlex.join(["python", "-m", "trainers.upkeep.smaller_picture", *argv]),
    }  # fmt: skip
    record = build_record(replace(whole, scores={**whole.scores, **scores}), [SMALLER], header)
    if args.json:
        write_record(record, args.json)
    print_record(record, Terminal())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
