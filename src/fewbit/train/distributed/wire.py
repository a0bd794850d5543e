"""What collectives put on the wire: each call, its type, and the bytes that a rank has to send.

    all-reduce  2 (W - 1) / W n      reduce-scatter, all-to-all  (W - 1) / W n      all-gather  (W - 1) n
    broadcast, reduce  n             with n the bytes that a rank hands in

which is what the ring algorithms send, and no algorithm sends less. Counted where torch dispatches its
collectives, so what DDP, FSDP2 and DTensor call is seen as well as what is called here.

Road not taken: counters around the functions of `torch.distributed`; the engines call them by other names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# torch 2.13 gave two collectives new names, and warns of the old ones
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# what the operators are called in c10d and in the functional collectives; copies of the latter end in _
_KINDS = {
    "allreduce_": "all-reduce", "allreduce_coalesced_": "all-reduce", "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce", "_allgather_base_": "all-gather", "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather", "all_gather_into_tensor": "all-gather",
    "all_gather_into_tensor_out": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter", "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter", "alltoall_base_": "all-to-all",
    "all_to_all_single": "all-to-all", "broadcast_": "broadcast", "broadcast": "broadcast",
    "reduce_": "reduce",
}  # fmt: skip
_INPUT = {"_allgather_base_", "allgather_", "_reduce_scatter_base_", "reduce_scatter_", "alltoall_base_"}


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One collective: its kind, the type of the numbers, how many a rank handed in, bytes that it sent."""

    kind: str
    dtype: torch.dtype
    numel: int
    nbytes: float


class Wire(TorchDispatchMode):
    """Context in which collectives are listed: ``with Wire() as wire: ...; wire.nbytes``.

    world: ranks of the groups that are used, those of the default group where None.
    """

    def __init__(self, world: int | None = None):
        super().__init__()
        self.world = dist.get_world_size() if world is None else world
        self.calls: list[Sent] = []

    @property
    def nbytes(self) -> float:
        """Bytes that this rank sent."""
        return sum(call.nbytes for call in self.calls)

    def of(self, *dtypes: torch.dtype) -> float:
        """Bytes that this rank sent in numbers of these types."""
        return sum(call.nbytes for call in self.calls if call.dtype in dtypes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self._note(func._schema.name.rpartition("::")[2], args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: tuple) -> None:
        kind = _KINDS.get(name)
        if kind is None:
            return  # waits, barriers
        given = _tensors(args[1] if name in _INPUT else args[0])
        numel = sum(t.numel() for t in given)
        share = {
            "all-reduce": 2 * (self.world - 1) / self.world, "all-gather": self.world - 1,
            "reduce-scatter": (self.world - 1) / self.world, "all-to-all": (self.world - 1) / self.world,
        }.get(kind, 1.0)  # fmt: skip
        nbytes = share * sum(t.numel() * t.element_size() for t in given)
        self.calls.append(Sent(kind=kind, dtype=given[0].dtype, numel=numel, nbytes=nbytes))


def _tensors(value) -> list[Tensor]:
    """The tensors of an argument: itself, or those of a list of (lists of) tensors."""
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)]
