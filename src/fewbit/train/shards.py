"""Parameters of which this process holds a part (DTensor: FSDP2, tensor parallel), without asking which kind.

Road not taken: DTensor arithmetic throughout. Codes and steps of a shard are no shards of anything, and every
operator would need its rule.
"""

from __future__ import annotations

from torch import Tensor


def local(x: Tensor) -> Tensor:
    """The part of a tensor that this process holds: the shard of a DTensor, or the tensor itself."""
    return x.to_local() if hasattr(x, "to_local") else x


def total(p: Tensor, part: Tensor) -> Tensor:
    """The sum [] over all shards of ``p`` of what each computed, ``part`` []; replicas count once."""
    if local(p) is p:
        return part
    from torch.distributed.tensor import DTensor, Partial, Replicate

    sums = [Partial() if place.is_shard() else Replicate() for place in p.placements]
    return DTensor.from_local(part, p.device_mesh, sums, run_check=False).full_tensor()


def mean(p: Tensor, x: Tensor) -> Tensor:
    """Mean [] of ``x``, the local part of something of the shape of ``p``, over all of it."""
    return total(p, x.sum()) / max(1, p.numel())


def like(p: Tensor, x: Tensor) -> Tensor:
    """A copy of ``x``, a DTensor where ``p`` is one, of which it is the local part."""
    if local(p) is p:
        return x.clone()
    from torch.distributed.tensor import DTensor

    where = {"shape": p.shape, "stride": p.stride(), "run_check": False}
    return DTensor.from_local(x.clone(), p.device_mesh, p.placements, **where)
