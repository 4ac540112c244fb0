"""Start a training from the weights of a trained pruner: of the same method, or of a PPM for a policy, and back."""

from pathlib import Path

from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import load_pruner
from prunezoo.learned.ppm import PPM


def start_from(pruner: Pruner, source: str) -> None:
    """Give a pruner the weights of a trained one of the same config; all of it goes on learning.

    A PPM and a policy have the same body, and either starts from the other; a temperature is no size.

    Args:
        pruner: What is about to be trained; changed in place.
        source: Folder or Hub id of the trained one.

    Raises:
        PruneZooError: Another method, or another config; the message names the fields.
    """
    start = load_pruner(source)
    both_ppm = isinstance(start, PPM) and isinstance(pruner, PPM)
    if not both_ppm and start.name != pruner.name:
        raise PruneZooError(
            f"warm_start {source} is a '{start.name}': a warm start is from the method of model.pruner, "
            f"'{pruner.name}', or from a 'ppm' or 'policy' to one of these"
        )
    theirs, ours = start.config.to_dict(), pruner.config.to_dict()
    unlike = [f"{k}={ours[k]} (there {v})" for k, v in theirs.items() if k != "temperature" and ours[k] != v]
    if unlike:
        raise PruneZooError(f"warm_start {Path(source)} has other sizes than model.pruner: {', '.join(unlike)}")
    pruner.load_state_dict(start.state_dict(), strict=True)
