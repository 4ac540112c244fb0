"""What the demo says: whether the pruner that it trained is above its rivals, and what three questions bring."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prunezoo import Pruner, attach
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import Item, load_suite

from .budgets import parse_budget
from .loading import load_vlm
from .methods import RIVALS
from .record import MEAN, select
from .sight import sight_note

SUITE = "scenes"
KEEP = "1/9"
ASKED = ("attribute", "reading", "dialogue")  # the first test item of each, whatever the answer turns out to be


def verdict(record: Mapping[str, Any], pruner: str) -> Text:
    """Whether the pruner is above every rival at the budget, in one line.

    Args:
        record: what `trainers.evaluate --json` wrote.
        pruner: the trained pruner, as named there.
    """
    mean = {row["pruner"]: row["retention"] for row in select(record, keep=KEEP, group=MEAN)}
    own, rivals = mean[pruner], {name: mean[name] for name in RIVALS if name in mean}
    if own is None:
        return Text("No comparison: ", "bold red").append(sight_note(record) or "nothing was retained.", "none")
    best = max(rivals, key=lambda name: rivals[name])
    gap = own - rivals[best]
    pairs = {row["rival"]: row for row in record["paired"] if row["pruner"] == pruner}
    low, high = pairs[best]["ci"]
    if own <= rivals[best]:
        said = Text("The freshly trained PPM is NOT above every rival:", "bold red")
    elif all(pairs[name]["ci"][0] > 0 for name in rivals):
        said = Text("The freshly trained PPM is above every rival:", "bold green")
    else:
        said = Text("The freshly trained PPM is above every rival, but an interval reaches 0:", "bold yellow")
    return said.append(
        f" mean retention {own:.1f} % at {KEEP} of the image tokens; the best rival, {best}, has "
        f"{rivals[best]:.1f} %: {gap:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}, {record['n']} questions).",
        "none",
    )


@torch.no_grad()
def answer(vlm: Any, processor: Any, item: Item) -> str:
    """What the model writes when asked; `generate` is called as ever, pruner or not."""
    batch = ConversationCollator(processor, answers=False)([item])
    batch = {name: value.to(vlm.device) for name, value in batch.items()}
    ids = vlm.generate(**batch, max_new_tokens=8, do_sample=False)
    return processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def ask(console: Console, vlm_source: str, pruner: Pruner, pictures: Path) -> None:
    """Answer sample questions with all tokens and with few, through the library as anybody would use it.

    Args:
        console: where the table is printed.
        vlm_source: folder of the model.
        pruner: the pruner.
        pictures: folder in which the pictures are left.
    """
    console.rule(Text("Three questions, with all image tokens and with few", style="bold"))
    console.print(
        "pruner = AutoPruner.from_pretrained(folder)\n"
        f"with attach(vlm, pruner, keep={KEEP}) as run:\n"
        '    vlm.generate(**processor(images=image, text=prompt, return_tensors="pt"))\n',
        style="cyan",
        highlight=False,
    )
    vlm, processor = load_vlm(vlm_source)
    suite = load_suite(SUITE, "test")
    table = Table("picture", "question", "reference", "all tokens", f"{KEEP} of them", "image tokens")
    for group in ASKED:
        item = next(item for item in suite if item.group == group)
        picture = pictures / f"{group}.png"
        pictures.mkdir(parents=True, exist_ok=True)
        item.image.save(picture)
        full = answer(vlm, processor, item)
        with attach(vlm, pruner, keep=parse_budget(KEEP).keep) as run:
            pruned = answer(vlm, processor, item)
        history = "".join(f"{question} {said}. " for question, said in item.turns[:-1])
        tokens = f"{run.stats.before[0]} -> {run.stats.after[0]}"
        table.add_row(str(picture), history + item.question, item.answer, full, pruned, tokens)
    console.print(table)
