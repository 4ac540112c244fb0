"""The layer stage: from a decoder layer on, hidden states, masks, positions and KV cache really are shorter.

Mechanism, for transformers 5.6 and later: a forward pre-hook with keywords on every decoder layer from the first one
concerned; no forward is replaced. The decoder's loop hands the original mask and positions to each layer, so they are
replaced in every layer behind a cut, not only where tokens go. What was cut is kept by cache object, because at decode
steps each layer's mask must fit the cache which that layer has.

What would go wrong without a word is seen to here: rows that lose different numbers of tokens are filled on the left,
and the filler is hidden at every later step; positions with gaps are not shown to kernels that would read them as the
seams of packed sequences; and static caches, prompts in pieces and caches that somebody else has cut are refused.

Letters: B samples, C copies of a sample (beams), R images, N image tokens alive, T words, L columns of the prompt,
S columns left of it, Q columns of a forward (the prompt's, and any behind), M columns of a layer's cache, D width.
"""

import inspect
from functools import partial
from typing import Any, NoReturn, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...core.budgets import Keep
from ...core.contract import Pruner
from ...core.errors import PruneZooError
from ...core.memory import Memory
from ..encoded import Encoded
from ..parts.hooks import copy_error, remove_hooks
from ..parts.model import VLM, KVCache
from .layer_cache import Keywords, Past, Step
from .layer_plan import LayerPlan
from .layer_prompt import Drop, Gate, Prompt
from .layer_return import Return
from .prompt import Positions


class LayerStage:
    """A pruner of the layer stage on a model, from ``__enter__`` to ``__exit__``.

    Each forward is announced to it: :meth:`prefill` a prompt with images, :meth:`resume` a step on a cache. One that
    was not passes untouched.
    """

    def __init__(
        self,
        vlm: VLM,
        pruner: Pruner,
        keep: Keep,
        positions: Positions = "original",
        leak: float | None = None,
        memory: Memory | None = None,
    ) -> None:
        """Check the pruner's stages and signals against the model.

        Args:
            vlm: A supported model.
            pruner: Of the layer stage.
            keep: What its last stage leaves of each image.
            positions: As in :func:`attach`.
            leak: Drop nothing, but let the pruner's gates weigh the image tokens, a closed gate with this weight, > 0.
            memory: What a pruner that remembers holds of the streams; None: each call is the first.

        Raises:
            PruneZooError: Layers that the model has not or where it needs all tokens, a signal of a layer that has not
                run, attention that cannot be cut.
        """
        self.plan = LayerPlan.make(vlm, pruner, keep, positions, leak)
        self.memory = memory
        self.pasts: WeakKeyDictionary[Any, Past] = WeakKeyDictionary()
        self._running: Prompt | Step | None = None

    def __enter__(self) -> Self:
        """Put the hooks on."""
        for layer in range(self.first, self.plan.decoder.depth):
            hook = partial(self._before_layer, layer)
            self.plan.decoder.layers[layer].register_forward_pre_hook(hook, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        """Take them off, as many as are on."""
        self._running = None
        for layer in self.plan.decoder.layers:
            remove_hooks(layer, self)

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        """No copy of layers with hooks is made."""
        raise copy_error()

    @property
    def first(self) -> int:
        """The first layer that is of any concern."""
        if self.plan.pruner.comes_back == "raw":
            return 0
        return min([*self.plan.stages, *(layer for layer, _ in self.plan.readings)])

    def prefill(self, encoded: Encoded, labels: Tensor | None = None) -> Prompt:
        """Announce a forward on ``encoded.batch``, each sample perhaps C times in a row, perhaps with words behind it.

        Args:
            encoded: From :func:`encode` or :func:`shorten_prompt`, with at least one image.
            labels: ``(B, L)``, those that the model is called with, the caller's to lose: they are shortened in place,
                so that the model computes its own loss.

        Returns:
            What will be known after the forward.
        """
        leak, drop = self.plan.leak, Return if self.plan.pruner.comes_back else Drop
        running = drop(self.plan, encoded, labels, self.pasts) if leak is None else Gate(self.plan, encoded, leak)
        running.memory = self.memory
        self._running = running
        return running

    def resume(self, cache: Any, mask: Any) -> None:
        """Announce a forward on a filled cache.

        Args:
            cache: Its ``past_key_values``.
            mask: Its ``attention_mask``, ``(B * C, past + Q)`` as if nothing had been cut, or None.
        """
        past, self._running = self.pasts.get(cache), None
        if past is not None:
            self._running = Step(self.plan, past, cache, mask)
        elif len({int(cache.get_seq_length(layer)) for layer in self.plan.decoder.keyed}) > 1:
            raise PruneZooError("this cache was pruned elsewhere: go on inside the `with attach(...)` that filled it")

    def check_assisted(self) -> None:
        """Refuse assisted decoding where its rejected candidates would stay in the shorter layers' caches."""
        if "tokens_to_remove" not in inspect.signature(KVCache.crop).parameters:
            raise PruneZooError(
                "assisted decoding in the layer stage needs a release of transformers that crops caches by a number of "
                "tokens, as 5.23 does, not to a length: upgrade it"
            )

    def pass_by(self) -> None:
        """Announce a forward that is no business of ours."""
        self._running = None

    @torch.compiler.disable
    def _before_layer(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: Keywords
    ) -> tuple[Any, Any] | None:
        """The hook of a layer."""
        if self._running is None:
            return None
        names = argument_names(type(module)) if len(args) > 1 else ("hidden_states",)
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden, kwargs = self._running.layer(layer, kwargs.pop("hidden_states"), kwargs)
        return (hidden,), kwargs


def argument_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """What a layer of that class calls its arguments: some decoders pass more than the hidden states by position."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]
