"""What every pruner is given, gives back, and promises.

Letters used in shapes: B images, N image tokens of an image (padded to the longest), D width of the language model,
T prompt tokens (padded), K tokens kept of an image (padded).

A row is one **image**, with the prompt it belongs to: a sample with two images is two rows, a sample without any is
none. So "64 tokens per image" is exact, and what one image keeps never depends on its neighbours in the batch, but for
methods that say ``together``: those see the images of one sample at once, and no others. The tiles that a model cuts an
image into belong to one row, and so do the frames of a clip. Its tokens are patches: newline tokens that some models
put behind each row of them are not shown to pruners and not counted in budgets; the host keeps one as long as a patch
of its row is left.

A method is one file in ``learned/``, ``training_free/`` or ``tokenizers/``; docs/add_a_method.md has an example.
The base class does budgets, validity, order, checks and gates. Tests, commands and cards find it by its name.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from .budgets import Keep, auto_mean, counts_of, upload
from .checks import require, require_no_nan
from .choosing import Choosing
from .errors import PruneZooError
from .gates import topk_gates
from .plan import gather_rows, group_sum, mask_to_index
from .signals import follow_tokens
from .staging import Staging


@dataclass(frozen=True)
class PruneInputs:
    """Everything a pruner may look at. Values on padding are finite, arbitrary, and must not matter."""

    features: Tensor  # (B, N, D) projected visual tokens, as the language model would read them; input stage: pixels
    valid: Tensor  # (B, N) bool, False for padding
    cells: Tensor  # (B, N, 3) long: tile (crop, thumbnail, frame), row and column of the patch in it; -1 on padding
    text: Tensor | None = None  # (B, T, D) embeddings of the prompt, without image placeholders and without the answer
    text_valid: Tensor | None = None  # (B, T) bool
    signals: Mapping[str, Tensor] = field(default_factory=dict)  # by name, those that the pruner `needs`
    layer: int | None = None  # decoder layer (layer stage) or vision block (vision stage) we stand at; else None
    depth: int | None = None  # how many decoder layers, or vision blocks that run, there are where `layer` is one
    step: int = 0  # which of the pruner's `stages` this is, from 0
    sizes: Tensor | None = None  # (B, N) float, patches that a token stands for, or what an earlier stage said instead
    away: Tensor | None = None  # (B, N) bool, for pruners that `comes_back`: left earlier, here to be chosen again
    sample: Tensor | None = None  # (B,) long: the prompt that an image belongs to; images of one prompt share it
    known: tuple[int, ...] | None = None  # (B) tokens of each image, where the host knows; see `counts`
    host_cells: np.ndarray | None = None  # `cells`, where the host knows them
    asked: tuple[int, ...] | None = None  # (B) tokens to keep of each, as `forward` tells it to `reduce`
    text_roles: Tensor | None = None  # (B, T) long: what each word is, see :class:`roles.Role`; None: nobody could tell
    memory: tuple[Mapping[str, Tensor] | None, ...] | None = None  # of each image, what `remember` returned last time
    carry: Mapping[str, Tensor] = field(default_factory=dict)  # (B, N, ...) each: from its stage before this one
    drop_only: bool = False  # vision stage: each is a whole cell of patches, the mean of which stands here: none merges
    pixels: tuple[int, int, int, int] | None = None  # input stage: frames, channels, rows, columns, whose product is D

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each image, as numbers of the host: no device is asked where shapes and ids have told already."""
        return tuple(self.valid.sum(1).tolist()) if self.known is None else self.known

    @property
    def most_asked(self) -> int:
        """The most that is to be kept of an image; inside of `reduce`."""
        assert self.asked is not None  # `forward` has set it
        return max(self.asked, default=0)

    @property
    def host_grids(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Slots ``(n,)`` and cells ``(n, 3)`` of each image's n tokens, on the host."""
        if self.host_cells is not None:  # as the host laid them out: tokens first, then padding
            return [(np.arange(n), own[:n]) for n, own in zip(self.counts, self.host_cells, strict=True)]
        places = [own.nonzero()[0] for own in self.valid.cpu().numpy()]
        return [(own, cells[own]) for own, cells in zip(places, self.cells.cpu().numpy(), strict=True)]

    @cached_property
    def tiles(self) -> int:
        """One more than the largest number of a tile."""
        return 1 + (int(self.cells[..., 0].max()) if self.host_cells is None else int(self.host_cells[..., 0].max()))

    def to(self, dtype: torch.dtype) -> Self:
        """The same in another floating type."""
        text = None if self.text is None else self.text.to(dtype)
        signals = {n: s.to(dtype) if s.is_floating_point() else s for n, s in self.signals.items()}
        return replace(self, features=self.features.to(dtype), text=text, signals=signals)

    def signal(self, name: str) -> Tensor:
        """A signal, by the name that `needs` gives it; see :mod:`signals` for names and shapes.

        Raises:
            PruneZooError: It was not computed, because `needs` does not list it or the caller did not ask for it.
        """
        if name not in self.signals:
            raise PruneZooError(f"signal '{name}' is missing: list it in the pruner's `needs`, or pass it to encode()")
        return self.signals[name]

    def after(self, output: "PruneOutput") -> "PruneInputs":
        """What a later stage finds: the tokens that ``output`` left, with their cells, signals, sizes and carry.

        A merged token has the cell, the signals and the carry of the token whose slot it takes.
        """
        index, valid, sizes, all_left = output.index, output.valid, self.sizes, output.is_all(self)
        take: Callable[[Tensor], Tensor] = lambda values: values if all_left else gather_rows(values, index)  # noqa: E731
        if output.sizes is not None:
            sizes = output.sizes
        elif output.groups is not None:
            whole = self.valid.float() if sizes is None else sizes  # which a half type could not count
            sizes = group_sum(whole, output.groups, valid.shape[1])
        elif sizes is not None:
            sizes = take(sizes)
        nothing: dict[str, Any] = dict.fromkeys(("asked", "memory", "away"))  # of one pruner's
        return replace(
            self,
            features=output.kept_features(self).to(self.features.dtype),
            valid=valid,
            cells=take(self.cells),
            host_cells=self.host_cells if all_left else None,
            signals={n: s if all_left else follow_tokens(n, s, index) for n, s in self.signals.items()},
            sizes=sizes,
            known=output.known,
            carry={name: take(values) for name, values in output.carry.items()},
            **nothing,
        )


@dataclass(frozen=True)
class PruneOutput:
    """What is left of each image."""

    index: Tensor  # (B, K) long: slots that survive, ascending; filler comes last and holds 0
    valid: Tensor  # (B, K) bool, False for filler
    features: Tensor | None = None  # (B, K, D) where tokens were merged or made anew; None: those at `index`
    scores: Tensor | None = None  # (B, N), higher is kept first; -inf on padding
    gates: Tensor | None = None  # (B, N) while training: 0 or 1 in value, soft in gradient
    groups: Tensor | None = None  # (B, N) long, where tokens were merged: the column of K each went into, -1 for none
    known: tuple[int, ...] | None = None  # (B) tokens left of each image, where the host knows; see `counts`
    carry: Mapping[str, Tensor] = field(default_factory=dict)  # (B, N, ...) each: for the pruner's next stage to find
    sizes: Tensor | None = None  # (B, K) float: how often each counts in attention from here on, if not as its group
    back: Tensor | None = None  # (B, N, K) vision stage, `restore`: shares of what is left that make each token again
    heads: Tensor | None = None  # (B, H) bool, vision stage: False for heads that give nothing in the blocks to come
    blocks: Tensor | None = (
        None  # (B, blocks, 2) long, on the host: tokens in attention and MLP, where a tower got less
    )

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Tokens left of each image, as numbers of the host."""
        return tuple(self.valid.sum(1).tolist()) if self.known is None else self.known

    @property
    def count(self) -> Tensor:
        """``(B,)`` long: tokens left of each image."""
        return self.valid.sum(1)

    def is_all(self, inputs: PruneInputs) -> bool:
        """Whether every token stands where it stood, as far as the host knows: then nothing need be moved."""
        changed = self.features is not None or self.groups is not None or self.index.shape != inputs.valid.shape
        return not changed and inputs.host_cells is not None and self.known == inputs.counts

    def kept_features(self, inputs: PruneInputs) -> Tensor:
        """``(B, K, D)``: the tokens to hand to the language model (arbitrary on filler)."""
        if self.features is not None:
            return self.features
        return inputs.features if self.is_all(inputs) else gather_rows(inputs.features, self.index)


class Pruner(Staging, Choosing):
    """A method that chooses or makes the visual tokens which a frozen language model reads.

    A subclass overrides :meth:`score` or :meth:`reduce`, one of the two. It must not name a submodule ``module``.
    """

    # `name` is set by @register_pruner
    needs: ClassVar[tuple[str, ...]] = ()  # signals it wants; a property where it depends on the config
    together: ClassVar[bool] = False  # images of one prompt see each other, by `sample`; False: neighbours never matter
    across_batch: ClassVar[str] = ""  # the option, `scaling='batch'`, that compares images of a batch; or a property
    remembers: ClassVar[bool] = (
        False  # holds something of a stream between calls: :meth:`remember`; prompt, layer stage
    )
    exact: ClassVar[bool] = True  # keeps exactly what it is asked for; False: decides alone (all, none, adaptive)
    comes_back: ClassVar[Literal["", "raw", "last"]] = ""  # layer stage: in which state, see `stages/layer_return.py`
    restore: ClassVar[bool] = False  # vision stage: the tower puts out every patch again, and the model reads them all
    gate_temperature: float = 1.0  # of the soft gates, in units of the score; an instance may set its own

    @property
    def scores_tokens(self) -> bool:
        """Whether the class overrides :meth:`score`."""
        return type(self).score is not Pruner.score

    def parts(self, keep: Keep) -> Sequence[tuple["Pruner", Keep]]:
        """The pruners that this one consists of, each with its own ``keep``, in the order input, vision, prompt, layer.

        Itself by default. A combination of pruners of several stages, kept in one folder, names them here.
        """
        return ((self, keep),)

    def adapt(self, vlm: nn.Module) -> AbstractContextManager[None]:
        """What the host enters around every use of this pruner: a change to the frozen model, undone on leaving.

        Nothing by default. A method that trains an adapter of the language model (LoRA) switches it on here.
        """
        return nullcontext()

    def go_on(self, pruned: bool) -> None:
        """What the host says before a call without images, inside of :meth:`adapt`, where :meth:`reduce` is not asked.

        Args:
            pruned: It goes on with a cache whose prompt was shortened; else with any other, or with none.
        """

    @classmethod
    def tiny_config(cls, feature_dim: int, text_dim: int) -> dict[str, Any]:
        """Config fields of the smallest sensible instance for tokens of ``feature_dim`` and text of ``text_dim``.

        The shared tests build every registered method with it; override it where a width or a size is configured.
        """
        return {}

    def score(self, inputs: PruneInputs) -> Tensor:
        """Rate the tokens: ``(B, N)`` float, higher is kept first. Values on padding do not matter."""
        raise NotImplementedError(f"{type(self).__name__} must override score() or reduce()")

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Bring each image to ``keep (B,)`` tokens.

        By default those that `select` takes by :meth:`score`; in training the best, with gates. The next stage finds
        the scores in ``inputs.carry["scores"]``.
        """
        return self._keep_best(self._checked_scores(inputs), inputs, keep)

    def _keep_best(self, scores: Tensor, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """What :meth:`reduce` does by default, with ``scores (B, N)``."""
        self.check_gates()
        inputs = self.asked_of(inputs, keep)
        gates = topk_gates(scores, inputs.valid, keep, self.gate_temperature) if self.training else None
        index, valid = mask_to_index(self.choose(scores.detach(), inputs, keep), inputs.most_asked)
        carry = {"scores": scores.masked_fill(~inputs.valid, 0)}
        output = PruneOutput(index=index, valid=valid, scores=scores, gates=gates, carry=carry)
        return self.beside(inputs, output)

    def beside(self, inputs: PruneInputs, output: PruneOutput) -> PruneOutput:
        """What a method that scores tokens says besides; the output as it is by default."""
        return output

    def _checked_scores(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` by :meth:`score`, -inf on padding."""
        scores = self.score(inputs)
        if scores.shape != inputs.valid.shape:
            raise PruneZooError(
                f"pruner '{self.name}' scored {tuple(scores.shape)} for tokens {tuple(inputs.valid.shape)}: "
                "score() must return (B, N)"
            )
        scores = scores.masked_fill(~inputs.valid, -torch.inf)
        require_no_nan(scores, self.name, "scored")
        return scores

    def forward(self, inputs: PruneInputs, keep: Keep) -> PruneOutput:
        """Prune.

        Args:
            inputs: What is known of the images.
            keep: An ``int`` is tokens per image, clamped to what the image has; a ``float`` in (0, 1] is a share of
                them, rounded, at least one; a ``(B,)`` integer tensor is tokens of each image, clamped likewise.
                So 1.0 is all and 1 is one token. "auto" leaves it to the pruner, image by image, and so does "auto:64",
                where the mean over images should be 64 tokens; for pruners that set budgets (:meth:`choose_budget`).

        Raises:
            PruneZooError: ``keep`` is outside its range, a score is NaN, or the method broke the contract.
        """
        self.check_keep(keep)
        given = inputs.features
        weight = next((p for p in self.parameters() if p.is_floating_point()), None)
        if weight is not None:  # a pruner works in the type of its own weights, whatever the host's
            inputs = inputs.to(weight.dtype)
        if inputs.valid.numel() == 0:  # a batch of text
            nothing, scores = inputs.valid, inputs.features.new_zeros(inputs.valid.shape)
            return PruneOutput(nothing.long(), nothing, scores=scores, gates=scores if self.training else None)
        asked: Keep = keep
        found: Tensor | None = None
        if isinstance(keep, str) and self.threshold is not None:  # scored once, to count and to choose
            found = self._checked_scores(inputs)
            asked = self.above(found.detach(), inputs.valid)
        elif isinstance(keep, str):
            asked = self.choose_budget(inputs, auto_mean(keep))
        counts = counts_of(asked, inputs.counts)
        wanted = upload(counts, inputs.valid.device)
        inputs = replace(inputs, asked=counts)
        output = self.reduce(inputs, wanted) if found is None else self._keep_best(found, inputs, wanted)
        if self.exact:
            count = output.count
            require((count != wanted).any(), lambda: self._wrong_counts(count, counts))
            output = replace(output, known=counts)
        if self.exact and output.features is not None and output.features.dtype != given.dtype:
            # An image that keeps all its tokens keeps them to the bit, not as rounded to the pruner's type.
            whole = (wanted == inputs.valid.sum(1))[:, None, None]
            features = torch.where(whole, gather_rows(given, output.index), output.features.to(given.dtype))
            output = replace(output, features=features)
        return output

    def _wrong_counts(self, count: Tensor, asked: tuple[int, ...]) -> str:
        return f"pruner '{self.name}' kept {count.tolist()} tokens where {list(asked)} were asked for"

    @property
    def sets_budgets(self) -> bool:
        """Whether ``keep="auto"`` works: by a threshold, :meth:`choose_budget`, or a calibrated distribution."""
        own = type(self).choose_budget is not Pruner.choose_budget
        return own or self.mass is not None or self.threshold is not None

    def choose_budget(self, inputs: PruneInputs, mean: float | None) -> Tensor:
        """How many tokens each image keeps, where the caller leaves that to the pruner; of the prompt and input stage.

        By default those above the `threshold`, or what :class:`mass.Mass` says of a `distribution`: the fewest that
        hold enough of the probability.

        Args:
            inputs: As in :meth:`forward`.
            mean: Tokens wanted in the mean over images like those that the pruner was made for; None: its own choice.

        Returns:
            ``(B,)`` long, at least 1.
        """
        if self.threshold is not None:
            return self.above(self._checked_scores(inputs).detach(), inputs.valid)
        if self.mass is None:
            raise NotImplementedError(f"{type(self).__name__} sets no budgets")
        return self.mass.counts(self._checked_scores(inputs).detach(), inputs.valid, mean)

    def remember(self, inputs: PruneInputs, output: PruneOutput) -> Sequence[Mapping[str, Tensor]]:
        """What a pruner that `remembers` wants to find in ``inputs.memory`` next time, of each image.

        In the layer stage it is asked behind each of the :meth:`stages`, and the next one finds it already.

        Args:
            inputs: What it was given, with what it held before; None for an image that is the first of its stream.
            output: What it left.

        Returns:
            B states, tensors by name, without gradient.
        """
        raise NotImplementedError(f"{type(self).__name__} must override remember()")

    def loss_terms(self, output: PruneOutput) -> dict[str, Tensor]:
        """Losses of the method's own, by name, each a weighted scalar; none by default."""
        return {}
