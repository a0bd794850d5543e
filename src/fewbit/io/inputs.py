"""Static steps and means of quantized inputs, as both checkpoint layouts store them beside a weight.

    X.input_scale        the step in its own dtype, one per tensor or per group of columns; of steps in two
                         levels the outer one
    X.input_zero         a code of the grid or a float, where the format has one
                         (compressed-tensors writes only symmetric ones, under its own name input_scale)

Dynamic inputs store nothing, unless they are centred: then input_zero is the mean [in] that they take off, in
bfloat16. A scale of no dimensions is written as [1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.activation import Activation
from fewbit.format.affine import NATIVE
from fewbit.format.format import Params, Zero


def layout(activation: Activation | None, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name (without the module) -> shape and dtype of what is stored for an input of ``columns``."""
    if activation is not None and activation.centred:
        return {"input_zero": ((columns,), torch.bfloat16)}
    if activation is None or not activation.static:
        return {}
    fmt = activation.format
    steps = fmt.scale.scale if activation.local else fmt.scale
    if steps.grid.name not in NATIVE:
        raise InputError(f"static steps of inputs are plain floats in a file, not {fmt.scale!s:.60}")
    fmt.block.check((1, columns), "an input")
    shape = (not activation.local and fmt.block.scale_shape((1, columns))) or (1,)
    out = {"input_scale": (shape, NATIVE[steps.grid.name])}
    if fmt.zero is not Zero.NONE:
        out["input_zero"] = (shape, fmt.grid.code_dtype if fmt.zero is Zero.INTEGER else fmt.zero_dtype)
    return out


def bits(activation: Activation | None, columns: int) -> int:
    """Stored bits of an input of ``columns``."""
    stored = layout(activation, columns).values()
    return sum(8 * dtype.itemsize * math.prod(shape) for shape, dtype in stored)


def to_dict(module: str, params: Params | None) -> dict[str, Tensor]:
    """The tensors of a file for the static or centred input of ``module``."""
    if params is None:
        return {}
    both = {"input_scale": params.scale, "input_zero": params.zero}
    return {f"{module}.{n}": torch.atleast_1d(v).contiguous() for n, v in both.items() if v is not None}


def from_dict(
    module: str, tensors: Mapping[str, Tensor], activation: Activation | None, columns: int
) -> Params | None:
    """Inverse of ``to_dict``; None for an input that stores nothing. ``columns``: the width of the input."""
    wanted = layout(activation, columns)
    if not wanted:
        return None
    zero = tensors.get(f"{module}.input_zero")
    if activation.centred:
        return Params(scale=None, zero=zero)
    shape = () if activation.local else activation.format.block.scale_shape((1, columns))
    for name, (stored, _) in wanted.items():
        got = tensors[f"{module}.{name}"]
        if got.numel() != math.prod(stored) or not torch.isfinite(got.float()).all():
            raise InputError(
                f"{module}.{name} has shape {list(got.shape)} instead of {list(stored)}, or is not finite; "
                "the checkpoint is damaged, get it again"
            )
    scale = tensors[f"{module}.input_scale"].reshape(shape)
    return Params(scale=scale, zero=None if zero is None else zero.reshape(shape))
