"""Start a training from the weights of a trained PPM, or of a policy, which has the same body."""

from pathlib import Path

from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import load_pruner
from prunezoo.learned.ppm import PPM


def start_from(pruner: Pruner, source: str) -> None:
    """Give a PPM or policy the weights of a trained one of the same sizes.

    Args:
        pruner: What is about to be trained; changed in place.
        source: Folder or Hub id of the trained one.

    Raises:
        PruneZooError: Another method, or another size; the message names the fields.
    """
    start = load_pruner(source)
    for what, it in (("model.pruner", pruner), (f"warm_start {source}", start)):
        if not isinstance(it, PPM):
            raise PruneZooError(f"{what} is a '{it.name}': a warm start is from a 'ppm' or 'policy' to one of these")
    theirs, ours = start.config.to_dict(), pruner.config.to_dict()
    unlike = [f"{k}={ours[k]} (there {v})" for k, v in theirs.items() if k != "temperature" and ours[k] != v]
    if unlike:
        raise PruneZooError(f"warm_start {Path(source)} has other sizes than model.pruner: {', '.join(unlike)}")
    pruner.load_state_dict(start.state_dict(), strict=True)
