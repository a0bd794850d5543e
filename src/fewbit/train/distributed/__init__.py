"""Training on several processes with 8 bits on the wire, on the engines of torch itself."""

from fewbit.train.distributed.gather import fp8_gather, sync_steps
from fewbit.train.distributed.hook import SharedScale, all_reduce_gradients, attach, hook
from fewbit.train.distributed.parallel import Columns, Rows
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
from fewbit.train.distributed.scatter import BlockReduceScatter
from fewbit.train.distributed.wire import Sent, Wire
from fewbit.train.distributed.zero import Zero, partition

__all__ = [
    "E4M3", "E5M2", "BlockReduceScatter", "Columns", "Factor", "Reduced", "Road", "Rows", "Sent",
    "SharedScale", "Wire", "Zero", "all_reduce_gradients", "attach", "fp8_gather", "hook", "mean",
    "native_sum", "partition", "shared_amax", "shared_steps", "sync_steps",
]  # fmt: skip
