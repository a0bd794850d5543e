"""Training on several processes with 8 bits on the wire, on the engines of torch itself."""

from fewbit.train.distributed.hook import SharedScale, all_reduce_gradients, attach, hook
from fewbit.train.distributed.reduce import (
    E4M3,
    E5M2,
    Factor,
    Reduced,
    Road,
    mean,
    native_sum,
    shared_amax,
    shared_steps,
)
from fewbit.train.distributed.wire import Wire

__all__ = [
    "E4M3", "E5M2", "Factor", "Reduced", "Road", "SharedScale", "Wire", "all_reduce_gradients", "attach",
    "hook", "mean", "native_sum", "shared_amax", "shared_steps",
]  # fmt: skip
