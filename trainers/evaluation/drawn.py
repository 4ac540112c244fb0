"""Measure what a frozen model answers from subsets of image tokens that are drawn, beside those that a pruner chooses.

Of every question G subsets are drawn by the pruner's scores, one token after the other without replacement
(Plackett-Luce, see `prunezoo.core.subsets`; drawn so in training by TwigVLM++, arXiv 2503.14075 v3), and G by lot. Each
is really pruned and read. The best of G counts a question as right where any of its draws is: what one who knew the
answers would choose among them, so no pruner can be held to it.

Letters: B items of a batch, R images of them, N image tokens of an image (padded), G draws.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunezoo.core.budgets import Keep
from prunezoo.core.contract import PruneOutput, Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import build_pruner
from prunezoo.host import HostOutput, encode, full_forward
from prunezoo.host.families import find_family
from prunezoo.host.group import group_forward
from prunezoo.host.run import run_pruned
from prunezoo.host.signals.language import encode_needs
from trainers.data.conversation import IGNORED, ConversationCollator
from trainers.data.suite import Item, Suite

from .budgets import Budget
from .draws import Draws, draw_masks
from .flops import flops_share
from .journal import Journal
from .measure import Answers, by_item, check_groups, measurement_of
from .methods import GivenScores
from .scores import ALL_TOKENS, FULL, NO_TOKENS, NONE, ItemScores, Key, Measurement
from .written import Judge, moved

Seen = tuple[Tensor, Tensor, Tensor]
"""Right (or the score), agreement and KL of items, or of items and draws, as :class:`ItemScores` has them."""


class Ways(NamedTuple):
    """Names of what is compared at a budget, as a record has them."""

    chosen: str  # by the pruner itself
    mean: str
    best: str
    lot_mean: str
    lot_best: str

    @classmethod
    def of(cls, pruner: str, number: int) -> "Ways":
        """For a pruner and so many draws."""
        return cls(pruner, *(f"{by}{kind} of {number}" for by in ("", "random, ") for kind in ("mean", "best")))


class Reader:
    """A batch of items that is encoded once, and read by the frozen model under any choice of tokens.

    Args:
        vlm: the model.
        processor: its processor.
        suite: of the items; it says what is right.
        items: the batch.
        needs: signals that the pruner wants.
    """

    def __init__(self, vlm: Any, processor: Any, suite: Suite, items: Sequence[Item], needs: tuple[str, ...]) -> None:
        batch = moved(ConversationCollator(processor)(items), vlm.device)
        self.vlm, self.items, self.encoded = vlm, len(items), encode(vlm, batch, needs=needs, clips=suite.clips)
        labels = self.encoded.labels
        assert labels is not None  # the collator wrote them
        # logits from the position before the earliest answer on; a shorter prompt ends where the long one does
        self.tail = labels.shape[1] - int((labels != IGNORED).any(dim=0).int().argmax()) + 1
        self.judge = Judge(vlm, processor, suite, items) if suite.scorer is not None else None
        self.full = self._answers(full_forward(vlm, self.encoded, logits_to_keep=self.tail))

    def _answers(self, output: HostOutput) -> Answers:
        assert output.labels is not None
        return Answers.read(output.logits, output.labels[:, -self.tail :])

    def whole(self) -> tuple[Tensor, ...]:
        """What :class:`ItemScores` holds, of all tokens: (B, layers), then (B,) four times."""
        right, agreement, kl = self.full.compare(self.full, self.items)
        layers = self.encoded.tokens[:, None].expand(-1, find_family(self.vlm).decoder().depth)
        right = self.judge() if self.judge else right
        return by_item(self.encoded, layers), right, agreement, kl, flops_share(self.vlm, self.encoded, None)

    def chosen(self, pruner: Pruner, keep: Keep) -> tuple[tuple[Tensor, ...], PruneOutput]:
        """The same of what a pruner chooses, and what it said."""
        run = run_pruned(self.vlm, self.encoded, pruner, keep, logits_to_keep=self.tail)
        right, agreement, kl = self._answers(run.host).compare(self.full, self.items)
        right = self.judge(pruner, keep) if self.judge else right
        share = flops_share(self.vlm, self.encoded, run)
        return (by_item(self.encoded, run.layers), right, agreement, kl, share), run.output

    def drawn(self, pruner: Pruner, masks: Tensor) -> Seen:
        """Right, agreement and KL, (B, G) each, of subsets (G, R, N), by the model as the pruner adapts it."""
        number = len(masks)
        with pruner.adapt(self.vlm):
            said = self._answers(group_forward(self.vlm, self.encoded, masks, logits_to_keep=self.tail))
            judged = [self._judged(mask) for mask in masks] if self.judge else []
        owner, place = self.full.item, torch.arange(len(self.full.item), device=masks.device)
        # the positions of an item stand together, and each of its draws has as many
        again = torch.cat([place[owner == item].repeat(number) for item in range(self.items)])
        full = Answers(said.item, self.full.target[again], self.full.choice[again], self.full.log_probs[again])
        right, agreement, kl = (each.view(-1, number) for each in said.compare(full, self.items * number))
        return torch.stack(judged, 1) if judged else right, agreement, kl

    def _judged(self, mask: Tensor) -> Tensor:
        """Scores (B,) of the answers that the model writes from one subset (R, N) of each image."""
        assert self.judge is not None
        return self.judge(GivenScores(mask.float()).eval(), mask.sum(1))


def check_drawable(name: str, pruner: Pruner, reader: Reader, budgets: Sequence[Budget]) -> None:
    """Refuse a pruner whose choice is no subset of the projector's tokens by scores, by running it.

    Args:
        name: as on the command line.
        pruner: in eval mode.
        reader: of any items.
        budgets: all.

    Raises:
        PruneZooError: what is in the way, and what would work.
    """
    why = None
    if [part for part, _ in pruner.parts(1.0)] != [pruner]:
        why = "it is several pruners"
    elif pruner.stage != "prompt":
        why = f"it acts in the {pruner.stage} stage"
    elif not pruner.scores_tokens:
        why = "it does not score tokens"
    elif pruner.remembers:
        why = "it remembers other questions"
    else:
        outputs = [reader.chosen(pruner, budget.keep)[1] for budget in budgets]
        if any(out.scores is None or out.features is not None or out.groups is not None for out in outputs):
            why = "it merges tokens or makes others"
    if why:
        raise PruneZooError(
            f"--pruner {name}: {why}, and subsets are drawn by the scores of a pruner of the prompt stage: "
            "take one like ppm-tiny or policy-tiny"
        )


def passes(budgets: Sequence[Budget], draws: Draws) -> int:
    """Answers that are read of one item, with all tokens and with none included."""
    return 2 + len(budgets) * (1 + 2 * draws.number)


@torch.no_grad()
def measure_drawn(
    vlm: Any,
    processor: Any,
    suite: Suite,
    name: str,
    pruner: Pruner,
    budgets: Sequence[Budget],
    draws: Draws,
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda answers: None,
    journal: Journal | None = None,
) -> Measurement:
    """Measure a pruner's choice, draws by its scores and draws by lot, on every item of a suite.

    Args:
        vlm: the frozen model, in eval mode.
        processor: its processor.
        suite: the items.
        name: of the pruner, in the scores.
        pruner: of the prompt stage, with scores; in eval mode.
        budgets: at how many tokens.
        draws: how subsets are drawn.
        batch_size: B; so many items, times G, are read at once. It moves nothing that is measured.
        advance: told how many answers were read.
        journal: where to note what is done after each batch, and to read what was done before.

    Returns:
        Scores of the full model, of zero tokens and, at each budget, of the :class:`Ways`. The best of G is the best in
        each measure by itself: right where any draw is, of the least KL of all. All have the tokens of the choice.

    Raises:
        PruneZooError: an empty suite, a group that it does not announce, or a pruner without scores to draw by.
    """
    if not len(suite):
        raise PruneZooError(f"suite {suite.name}: split {suite.split} has no items")
    ways, depth, needs = Ways.of(name, draws.number), find_family(vlm).decoder().depth, encode_needs(pruner)
    keys: list[Key] = [(FULL, ALL_TOKENS), (NONE, NO_TOKENS)]
    keys += [(way, budget.label) for budget in budgets for way in ways]
    scores = {key: ItemScores.empty(len(suite), depth) for key in keys}
    group_names = [""] * len(suite)
    nothing = build_pruner(NONE).eval()
    check_drawable(name, pruner, Reader(vlm, processor, suite, [suite[0]], needs), budgets)
    done = journal.read(scores, group_names) if journal else 0
    advance(done * passes(budgets, draws))

    for begin in range(done, len(suite), batch_size):
        places = range(begin, min(begin + batch_size, len(suite)))
        items = [suite[place] for place in places]
        group_names[places.start : places.stop] = [item.group for item in items]
        check_groups(suite, group_names)
        reader = Reader(vlm, processor, suite, items, needs)

        def put_down(key: Key, values: Sequence[Tensor], here: range = places) -> None:
            for whole, part in zip(vars(scores[key]).values(), values, strict=True):
                whole[here.start : here.stop] = part.double().cpu().numpy()

        put_down((FULL, ALL_TOKENS), reader.whole())
        put_down((NONE, NO_TOKENS), reader.chosen(nothing, 1)[0])
        advance(2 * len(items))
        for budget in budgets:
            chosen, output = reader.chosen(pruner, budget.keep)
            put_down((ways.chosen, budget.label), chosen)
            advance(len(items))
            assert output.scores is not None  # check_drawable has looked
            for by_lot, mean, best in ((False, ways.mean, ways.best), (True, ways.lot_mean, ways.lot_best)):
                asked = (output.scores, reader.encoded.inputs.valid, output.count, reader.encoded.rows, places)
                right, agreement, kl = reader.drawn(pruner, draw_masks(*asked, draws, by_lot))
                tokens, share = chosen[0], chosen[-1]
                put_down(
                    (mean, budget.label), (tokens, *(each.double().mean(1) for each in (right, agreement, kl)), share)
                )
                put_down((best, budget.label), (tokens, right.amax(1), agreement.amax(1), kl.amin(1), share))
                advance(draws.number * len(items))
        if journal:
            journal.write(scores, group_names, places.stop)
    return measurement_of(suite, group_names, scores)
