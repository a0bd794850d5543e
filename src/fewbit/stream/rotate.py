"""QuaRot in the loop: the ends of the model once, then each block when its weights are in memory.

SpinQuant's map of the stream is learned before the loop, with the whole model in memory, and kept in the
job's folder: what is folded is always read from there, so an interrupted run ends as one that was not.

The flows carry the rotated residual stream, x Q. To find out what a block does, and to prove that the rotated
block does the same, it is run on x, which is what the flows carry times Q^-1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.io.checkpoint import save_tensors
from fewbit.io.skeleton import build_skeleton, materialize, parameter_map
from fewbit.io.source import check_finite
from fewbit.nn.blocks import weight_of
from fewbit.nn.linear import change_input, transform_input
from fewbit.seams.heads import find_values, fold_online, rotate_values_checked
from fewbit.seams.learn import learn_rotation
from fewbit.seams.residual import find_residual, rotate_checked
from fewbit.seams.rotation import find_outside, rotate_outside, stream_map
from fewbit.stream.job import Job
from fewbit.stream.planned import Plan
from fewbit.stream.progress import Progress
from fewbit.stream.suspend import Stop
from fewbit.stream.weights import tensor
from fewbit.transform import Hadamard, Map, Orthogonal
from fewbit.transform.rotation import Rotation

_LEARNED = "rotation.safetensors"


def learned_map(plan: Plan, tokens: Tensor | None, job: Job, progress: Progress) -> Map | None:
    """The map of the stream that the recipe wants learned, from the job's folder, learned where it is not
    there yet; None for recipes that learn none. Holds the whole model meanwhile.
    """
    rotation, device = plan.recipe.rotation, plan.device
    if rotation is None or not rotation.steps:
        return None
    file = job.part / _LEARNED
    if not file.exists():
        model = build_skeleton(plan.source)
        mapping, _ = parameter_map(plan.source, model)
        dtype = torch.float32 if device == "cpu" else plan.source.dtype
        materialize(model, mapping, plan.source, mapping, device, dtype)
        for name, stored in mapping.items():
            check_finite(stored, tensor(model, name))
        activations = {layer.module: layer.activation for layer in plan.layers if layer.activation}

        def watch(step: int, loss: float) -> None:
            progress.phase(f"learning the rotation, step {step} of {rotation.steps}: loss {loss:.4f}")

        learned = learn_rotation(model, tokens, activations, rotation, watch)
        plan.source.release()
        save_tensors(file, {"matrix": learned.map.matrix.cpu()})
    return Orthogonal(load_file(file, device=device)["matrix"])


def rotate_ends(
    model: nn.Module, rotation: Rotation, stored: torch.dtype, learned: Map | None = None
) -> tuple[Map, tuple[str, ...]]:
    """Rotate embeddings and head, in memory; the stream's map, and parameters to store for the first time.

    learned: the stream's map; None: a random Hadamard map.
    """
    outside = find_outside(model)
    q = stream_map(outside, rotation.seed) if learned is None else learned
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
