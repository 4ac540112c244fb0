"""Measure methods on a suite: each picture is encoded once, then read again under every method and budget.

Accuracy is that of greedy decoding, but nothing is decoded: the reference answer is fed in (teacher forcing), and an
answer counts as right if the first choice is right at every one of its positions, the end token included. That is
exact, not an estimate. Greedy decoding writes the reference answer if and only if its first choice is the reference's
first token; then, having written that, if its next choice is the next token; and so on to the end token: the very
conditions which one teacher-forced pass checks all at once. (What it checks is the tokens of the answer. A model that
writes the same words in another case, or with a full stop, is counted as wrong.)

A suite with a scorer is measured otherwise: the model writes its answers, with the pruner attached, and its accuracy is
their mean score. All else is read off the same teacher-forced passes.

Where the items of a suite are steps of streams, methods that remember are measured apart, step after step; see
:mod:`streams`.

Agreement with the full model is defined on the same positions: 1 where the pruned model's first choices equal the full
model's first choices at every answer position, given the same reference before them. KL is KL(full || pruned) over the
vocabulary, averaged over these positions.

Letters: B items of a batch, L tokens, A answer positions of the whole batch, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunezoo.core.budgets import Keep
from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.memory import Memory
from prunezoo.core.registry import build_pruner
from prunezoo.host import Encoded, HostOutput, encode, full_forward
from prunezoo.host.families import find_family
from prunezoo.host.run import run_pruned
from trainers.cli.errors import one_line
from trainers.cli.names import BY_STEP
from trainers.data.conversation import IGNORED, ConversationCollator
from trainers.data.suite import Item, Suite

from .budgets import Budget
from .flops import flops_share
from .journal import Journal
from .methods import Method, View, view_of
from .processes import Processes
from .scores import ALL_TOKENS, FULL, NO_TOKENS, NONE, ItemScores, Key, Measurement
from .streams import Memories, steps_of
from .written import Judge

ALONE = Processes()
WINDOW = 16
"""Batches that are read ahead and sorted by length together, so that little is padded and little held in memory."""


@dataclass(frozen=True)
class Answers:
    """First choices and log-probabilities at the answer positions of a batch.

    Attributes:
        item: (A,) which item of the batch a position belongs to; items in order, positions of an item in order.
        target: (A,) the reference tokens.
        choice: (A,) the most likely tokens.
        log_probs: (A, V) float32.
    """

    item: Tensor
    target: Tensor
    choice: Tensor
    log_probs: Tensor

    @classmethod
    def read(cls, logits: Tensor, labels: Tensor) -> "Answers":
        """From logits (B, L, V) and labels (B, L), -100 outside the answer."""
        target = labels[:, 1:]
        here = target != IGNORED
        log_probs = logits[:, :-1][here].float().log_softmax(dim=-1)
        return cls(here.nonzero()[:, 0], target[here], log_probs.argmax(dim=-1), log_probs)

    def mean(self, values: Tensor, items: int) -> Tensor:
        """Mean of values (A,) over each item's positions: (B,)."""
        total = values.new_zeros(items).index_add_(0, self.item, values)
        return total / torch.bincount(self.item, minlength=items).clamp_min(1)

    def every(self, holds: Tensor, items: int) -> Tensor:
        """Whether holds (A,) bool is true at all positions of an item: (B,) float 0 or 1."""
        return (self.mean((~holds).float(), items) == 0).float()

    def compare(self, full: "Answers", items: int) -> tuple[Tensor, Tensor, Tensor]:
        """Correct, agreement and KL of each item against the full model, each (B,)."""
        kl = (full.log_probs.exp() * (full.log_probs - self.log_probs)).sum(dim=-1)
        return (
            self.every(self.choice == self.target, items),
            self.every(self.choice == full.choice, items),
            self.mean(kl, items).clamp_min(0),  # rounding may leave -1e-8
        )


def passes(methods: Sequence[Method], budgets: Sequence[Budget]) -> int:
    """Forward passes that one item takes, the full model and zero tokens included."""
    return 2 + len(budgets) * sum(method.replicas for method in methods)


@torch.no_grad()
def measure(
    vlm: Any,
    processor: Any,
    suite: Suite,
    methods: Sequence[Method],
    budgets: Sequence[Budget],
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda passes: None,
    journal: Journal | None = None,
    processes: Processes = ALONE,
) -> Measurement:
    """Measure every method at every budget on every item of a suite, beside the full model and zero tokens.

    Args:
        vlm: the frozen model, in eval mode.
        processor: its processor.
        suite: the items; they are read in order, in windows of some batches.
        methods: what to measure.
        budgets: at how many tokens.
        batch_size: B.
        advance: told after each forward pass how many items it took, for a progress bar.
        journal: where to note what is done after each window, and to read what was done before.
        processes: who share the batches; each has the whole result then, the same as one process alone.

    Raises:
        PruneZooError: an empty suite, a group that the suite does not announce, or a method that cannot cope.
    """
    if not len(suite):
        raise PruneZooError(f"suite {suite.name}: split {suite.split} has no items")
    followed = [method for method in methods if method.remembers and suite.streams]
    others = [method for method in methods if method not in followed]
    if followed and suite.scorer is not None:
        raise PruneZooError(
            f"--pruner {followed[0].name}: it remembers, and suite {suite.name} has its answers written, where streams "
            f"are not followed: say {BY_STEP}{followed[0].name}"
        )
    collate, memories = ConversationCollator(processor), Memories()
    keys: list[Key] = [(FULL, ALL_TOKENS), (NONE, NO_TOKENS)]
    keys += [(method.name, budget.label) for method in methods for budget in budgets]
    depth = find_family(vlm).decoder().depth
    scores = {key: ItemScores.empty(len(suite), depth) for key in keys}
    group_names: list[str] = [""] * len(suite)
    per_item = passes(methods, budgets)
    done = processes.first_says(journal.read(scores, group_names) if journal and processes.rank == 0 else 0)
    _gather(suite, range(done), scores, group_names, processes)
    advance(done * per_item)

    def put_down(key: Key, weight: float, places: Sequence[int], values: tuple[Tensor, ...]) -> None:
        for whole, part in zip(vars(scores[key]).values(), values, strict=True):
            whole[places] += weight * part.double().cpu().numpy()

    for begin in range(done, len(suite), WINDOW * batch_size):
        window = range(begin, min(begin + WINDOW * batch_size, len(suite)))
        to_go = len(window) * per_item
        for places, items in _batches(suite, window, batch_size, processes):
            sights = _sights(vlm, collate, items, others, suite.clips)
            judge = Judge(vlm, processor, suite, items) if suite.scorer is not None else None
            for key, weight, values in _passes(vlm, sights, others, budgets, judge):
                put_down(key, weight, places, values)
                advance(len(items))
                to_go -= len(items)
            for place, item in zip(places, items, strict=True):
                group_names[place] = item.group
        for step in steps_of(suite, window, batch_size, processes) if followed else ():
            memories.turn_to(step)
            sights = _sights(vlm, collate, step.items, followed, suite.clips)
            counted = [number for number, place in enumerate(step.places) if place >= begin]
            places = [step.places[number] for number in counted]
            for key, weight, values in _passes(vlm, sights, followed, budgets, memories=memories):
                if key[0] not in (FULL, NONE):  # which the other methods' batches have
                    put_down(key, weight, places, tuple(value[counted] for value in values))
                    advance(len(counted))
                    to_go -= len(counted)
        _gather(suite, window, scores, group_names, processes)
        if to_go:
            advance(to_go)
        if journal and processes.rank == 0:
            journal.write(scores, group_names, window.stop)

    return measurement_of(suite, group_names, scores)


def measurement_of(suite: Suite, group_names: Sequence[str], scores: Mapping[Key, ItemScores]) -> Measurement:
    """What was measured, when the group of every item is known."""
    groups = tuple(group for group in suite.groups if group in set(group_names))
    group_of = np.array([groups.index(name) for name in group_names], dtype=np.int64)
    return Measurement(groups, group_of, suite.chance, scores)


def check_groups(suite: Suite, names: Collection[str]) -> None:
    """PruneZooError where items are of a group that the suite does not announce; "" is not known yet."""
    unknown = set(names) - {*suite.groups, ""}
    if unknown:
        raise PruneZooError(f"suite {suite.name}: items of unknown group {', '.join(sorted(unknown))}")


@torch.no_grad()
def why_not(
    vlm: Any, processor: Any, item: Item, method: Method, budgets: Sequence[Budget], clips: bool = False
) -> str | None:
    """Why a model cannot have a method at these budgets, by running an item under it; None where it can.

    Args:
        vlm: the model.
        processor: its processor.
        item: any.
        method: which.
        budgets: at how many tokens.
        clips: whether the item's pictures are the frames of a clip.
    """
    items = [item]
    made = ConversationCollator(processor)(items)
    batch = {k: v.to(vlm.device) if isinstance(v, Tensor) else v for k, v in made.items()}
    try:
        encoded, view = see(vlm, batch, items, [method], method.needs, clips and not method.by_frame)
        for budget in budgets:
            run_pruned(vlm, encoded, method.pruner(view), method.amount(view, budget.keep), logits_to_keep=1)
    except PruneZooError as error:
        return one_line(error)
    return None


def see(
    vlm: Any,
    batch: dict[str, Any],
    items: Sequence[Item],
    methods: Sequence[Method],
    needs: tuple[str, ...],
    clips: bool = False,
) -> tuple[Encoded, View]:
    """A batch as methods see it: encoded with the signals ``needs``; with ``clips``, an item is one clip."""
    encoded = encode(vlm, batch, needs=needs, clips=clips)
    return encoded, view_of(vlm, batch, encoded, items, methods)


def _sights(
    vlm: Any, collate: ConversationCollator, items: Sequence[Item], methods: Sequence[Method], clips: bool
) -> dict[bool, tuple[Encoded, View]]:
    """A batch as methods see it that go by frame, if there are any, and others."""
    batch = {k: v.to(vlm.device) if isinstance(v, Tensor) else v for k, v in collate(items).items()}
    needs = tuple(sorted({signal for method in methods for signal in method.needs}))
    sights = {False: see(vlm, batch, items, [m for m in methods if not m.by_frame], needs, clips)}
    if by_frame := [method for method in methods if method.by_frame]:
        sights[True] = see(vlm, batch, items, by_frame, needs)
    return sights


def of_pruner(name: str, why: str) -> str:
    """A reason with the method in front, unless it names it or an option already."""
    return why if why.startswith((name, f"`{name}`", "--")) else f"--pruner {name}: {why}"


def _passes(
    vlm: Any,
    sights: Mapping[bool, tuple[Encoded, View]],
    methods: Sequence[Method],
    budgets: Sequence[Budget],
    judge: Judge | None = None,
    memories: Memories | None = None,
) -> Iterator[tuple[Key, float, tuple[Tensor, ...]]]:
    """Every forward pass over one batch, as methods see it that go by frame, and others; with a judge, right is what it
    says of the written answers, and with memories methods remember the steps before.

    Yields:
        Key, weight among its seeds, and what ItemScores holds: (B, layers), then (B,) four times.
    """
    encoded, view = sights[False]
    items = len(view.items)
    assert encoded.labels is not None  # the collator wrote them
    # logits only from the position before the earliest answer on; a shorter prompt ends where the long one does
    tail = encoded.labels.shape[1] - int((encoded.labels != IGNORED).any(dim=0).int().argmax()) + 1

    def answers(output: HostOutput) -> Answers:
        assert output.labels is not None
        return Answers.read(output.logits, output.labels[:, -tail:])

    full = answers(full_forward(vlm, encoded, logits_to_keep=tail))
    depth = find_family(vlm).decoder().depth
    everything = by_item(encoded, encoded.tokens[:, None].expand(-1, depth))
    right, agreement, kl = full.compare(full, items)
    share = flops_share(vlm, encoded, None)
    yield (FULL, ALL_TOKENS), 1.0, (everything, judge() if judge else right, agreement, kl, share)

    def prune(pruner: Pruner, keep: Keep, by_frame: bool = False, memory: Memory | None = None) -> tuple[Tensor, ...]:
        encoded = sights[by_frame][0]
        run = run_pruned(vlm, encoded, pruner, keep, memory=memory, logits_to_keep=tail)
        right, agreement, kl = answers(run.host).compare(full, items)
        share = flops_share(vlm, encoded, run)
        right = judge(pruner, keep, by_frame) if judge else right
        return by_item(encoded, run.layers), right, agreement, kl, share

    yield (NONE, NO_TOKENS), 1.0, prune(build_pruner(NONE).eval(), 1)
    for method in methods:
        for budget in budgets:
            for replica in range(method.replicas):
                view, who = sights[method.by_frame][1], (method.name, budget.label, replica)
                amount, memory = method.amount(view, budget.keep), memories.of(who) if memories else None
                values = prune(method.pruner(view, replica), amount, method.by_frame, memory)
                yield (method.name, budget.label), 1 / method.replicas, values


def by_item(encoded: Encoded, tokens: Tensor) -> Tensor:
    """Sums ``(B, ...)`` of ``tokens (R, ...)`` over the pictures of each item."""
    rows = torch.tensor(encoded.rows, dtype=torch.long)
    return tokens.new_zeros(len(encoded.real), *tokens.shape[1:]).index_add(0, rows.to(tokens.device), tokens)


def _batches(
    suite: Suite, window: range, batch_size: int, processes: Processes
) -> Iterator[tuple[list[int], list[Item]]]:
    """This process' batches of items of like length, with their places in the suite; all processes cut them alike."""
    lengths, made = suite.lengths(window), dict[int, Item]()
    if lengths is None:
        made = {place: suite[place] for place in window}
        lengths = [sum(len(text) for turn in item.turns for text in turn) for item in made.values()]
    order = [place for _, place in sorted(zip(lengths, window, strict=True))]
    for places in processes.share([order[first : first + batch_size] for first in range(0, len(order), batch_size)]):
        yield places, [made[place] if made else suite[place] for place in places]


def _gather(
    suite: Suite, window: range, scores: Mapping[Key, ItemScores], group_names: list[str], processes: Processes
) -> None:
    """Bring together what the processes found in a window.

    Raises:
        PruneZooError: a group that the suite does not announce.
    """
    here = slice(window.start, window.stop)
    check_groups(suite, group_names[here])
    if processes.world == 1:
        return
    numbers = np.array([suite.groups.index(name) + 1 if name else 0 for name in group_names[here]], dtype=np.float64)
    group_names[here] = [suite.groups[int(number) - 1] for number in processes.sum(numbers)]
    for of in scores.values():
        for values in vars(of).values():
            values[here] = processes.sum(values[here])
