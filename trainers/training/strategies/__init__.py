"""How a training is spread over processes: what Lightning's own strategies lack for a pruner beside a frozen model.

The pruner is trained by the strategy. The frozen model is no part of what it trains; where it is to be shared out among
the processes (ZeRO-3, FSDP2), it is done here, by the same library. Whatever the strategy, a checkpoint is one file
with the pruner alone: it can be resumed by other strategies, and by another number of processes.

`configs/strategy/*.yaml` name the classes of `zero.py` and `fsdp2.py`; docs/scale.md says how to launch them.
"""
