"""The vision stage in training: a tower in which every token keeps its row, and weighs as much as its gate says.

For rates that are learned by gradient, after DiffRate's training. In each block ``log(gate + eps)`` is added to the
attention logits of a patch, but where it looks at itself, so that what has gone changes nothing and its gate has a
gradient; log(size) likewise. Between attention and MLP the pruner's `relax` says what becomes of states, gates, sizes.
What is left behind each block, with gradient, can be read when the pass is over.
Letters: R images, P tokens before the patches (CLS or none), N patches, D width of the tower.
"""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from ...core.contract import PruneInputs
from ..parts.tower import Tower
from ..signals.vision import VisionTap


class Relaxing(Protocol):
    """What a pruner must have."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The signals of a block that it reads."""

    def relax(self, inputs: PruneInputs, gates: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features ``(R, N, D)``, gates and sizes ``(R, N)`` behind the block ``inputs.layer``, of those that enter its
        middle.
        """


class RelaxedTower:
    """Hooks on a tower, from ``__enter__`` to ``__exit__``, for one pass over pictures of one size."""

    def __init__(self, tower: Tower, pruner: Relaxing, name: str, patches: PruneInputs, log_eps: float = 1e-6) -> None:
        """Plan the pass.

        Args:
            tower: A plain ViT.
            pruner: Relaxes.
            name: Of the pruner, for messages.
            patches: The pictures, whose features do not matter.
            log_eps: Weight that a closed gate still leaks, > 0; what makes its gradient finite.

        Raises:
            PruneZooError: The tower cannot be shortened, so there is nothing to train for.
        """
        tower.check_can_shrink(name)
        self.tower, self.pruner, self.log_eps, self.patches = tower, pruner, log_eps, patches
        self.left: list[Tensor] = []  # ``(R,)`` float each: tokens behind each block
        self.gates: Tensor | None = None
        self.sizes: Tensor | None = None
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        """Put the hooks on."""
        with self.stack:  # which takes them off again if one of them cannot be put on
            for block in range(self.tower.depth):
                attention = self.tower.attention(block).module
                handle = attention.register_forward_pre_hook(self._weigh, with_kwargs=True)
                self.stack.callback(handle.remove)
                self._relax(block, self.stack.enter_context(VisionTap(self.tower, block, self.pruner.needs)))
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Take them off."""
        self.stack.close()

    def _weigh(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """The mask of a block's attention, ``(R, 1, P + N, P + N)``."""
        if self.gates is None or self.sizes is None:
            return None
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        prefix = self.tower.prefix
        keys = (self.gates + self.log_eps).log() + self.sizes.log()
        keys = nn.functional.pad(keys, (prefix, 0))
        own = nn.functional.pad(self.sizes.log(), (prefix, 0))
        itself = torch.eye(keys.shape[1], dtype=torch.bool, device=keys.device)
        mask = torch.where(itself, own[:, None], keys[:, None])[:, None]
        return args, {**kwargs, "attention_mask": mask.to(hidden.dtype)}

    def _relax(self, block: int, tap: VisionTap) -> None:
        """Hook a block so that its MLP gets what the pruner makes of its states, and the block hands on the sum."""
        norm, mlp = self.tower.mlp(block)
        made: list[Tensor] = []  # what the norm is given, and what the MLP makes of it
        prefix = self.tower.prefix

        def change(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            hidden = args[0]
            patches = hidden[:, prefix:]
            if block == 0:
                self.left.clear()
                self.gates = self.sizes = patches.new_ones(patches.shape[:2], dtype=torch.float32)
            assert self.gates is not None and self.sizes is not None
            looking = nn.functional.pad(self.gates.detach(), (prefix, 0), value=1.0)  # what has gone looks at nothing
            signals = {name: tap.read(name, looking) for name in self.pruner.needs}
            inputs = replace(self.patches, features=patches, signals=signals, layer=block, depth=self.tower.depth)
            patches, self.gates, self.sizes = self.pruner.relax(inputs, self.gates, self.sizes)
            self.left.append(self.gates.sum(1))
            made[:] = [torch.cat([hidden[:, :prefix], patches], 1)]
            return (made[0],)

        def hold(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            made.append(output)
            return output.new_zeros(())  # what the block can add to its own states, to no effect

        def hand_on(_module: nn.Module, _args: Any, _output: Tensor) -> Tensor:
            return made[0] + made[1]

        self.stack.callback(norm.register_forward_pre_hook(change).remove)
        self.stack.callback(mlp.register_forward_hook(hold).remove)
        self.stack.callback(self.tower.blocks[block].register_forward_hook(hand_on, prepend=True).remove)
