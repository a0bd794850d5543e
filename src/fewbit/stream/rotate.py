"""QuaRot in the loop: the ends of the model once, then each block when its weights are in memory.

The flows carry the rotated residual stream, x Q. To find out what a block does, and to prove that the rotated
block does the same, it is run on x, which is what the flows carry times Q^-1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.nn.blocks import weight_of
from fewbit.nn.linear import change_input, transform_input
from fewbit.seams.heads import find_values, fold_online, rotate_values_checked
from fewbit.seams.residual import find_residual, rotate_checked
from fewbit.seams.rotation import find_outside, rotate_outside, stream_map
from fewbit.stream.suspend import Stop
from fewbit.transform import Hadamard, Map
from fewbit.transform.rotation import Rotation


def rotate_ends(model: nn.Module, rotation: Rotation, stored: torch.dtype) -> tuple[Map, tuple[str, ...]]:
    """Rotate embeddings and head, in memory; the stream's map, and parameters to store for the first time."""
    outside = find_outside(model)
    q = stream_map(outside, rotation.seed)
    untied = rotate_outside(model, outside, q)
    for name in (*outside.embeddings, outside.norm, outside.head):
        if name is not None:
            round_to(model.get_submodule(name).parameters(recurse=False), stored)
    return q, untied


def rotate_block(block: nn.Module, rotation: Rotation, q: Map, stop: Stop) -> dict[str, Map]:
    """Rotate a block whose flows wait with rotated inputs; the online maps by linear, which then run."""
    args, kwargs = change_input(q.invert, stop.args, stop.kwargs)
    plain: Callable[[], object] = lambda: block(*args, **kwargs)  # noqa: E731
    residual = find_residual(block, plain)
    values = find_values(block, residual, plain)
    rotate_checked(block, residual, q, plain)
    if values is not None and rotation.values:
        r = Hadamard(values.head_dim, seed=rotation.seed)
        rotate_values_checked(block, values, r, lambda: block(*stop.args, **stop.kwargs))
    online = {}
    for name in residual.writers if rotation.online else ():
        if values is None or name != values.writer:
            module = block.get_submodule(name)
            online[name] = online_map(weight_of(module).shape[1], rotation)
            fold_online(module, online[name])
            transform_input(module, online[name].apply)
    return online


def online_map(size: int, rotation: Rotation) -> Map:
    """The Hadamard map that runs before a linear with ``size`` inputs."""
    return Hadamard(size, seed=rotation.seed)


@torch.no_grad()
def round_to(parameters, stored: torch.dtype) -> None:
    """Round parameters to the dtype in which they will be stored, as the file's readers will see them."""
    for p in parameters:
        p.copy_(p.to(stored))


def outer_tensors(model: nn.Module, names: dict[str, str], stored: torch.dtype) -> dict[str, Tensor]:
    """Rotated parameters outside the blocks, {name in the model: name in the checkpoint}, on the CPU."""
    out = {}
    for name, written in names.items():
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(model.get_submodule(owner), leaf)
        if tensor.is_meta:
            raise InputError(f"{name} was dropped from memory before it was written; please report this")
        out[written] = tensor.detach().to("cpu", stored)
    return out
