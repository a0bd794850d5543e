"""What the layouts of other tools share: tensors taken from a file with a look at them, and packed words.

Words are int32, least significant field first, dense along the last axis (``fewbit.format.bits``); 3 bits lay
32 fields in 3 words. A layout that packs along another axis transposes before and after.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.affine import NATIVE
from fewbit.format.bits import pack, row_bytes, unpack
from fewbit.format.block import Channel, Group
from fewbit.format.format import Format, Zero
from fewbit.grid.integer import Int
from fewbit.io.base import TensorInfo

WORD = 4  # bytes of an int32
STEPS = {dtype: name for name, dtype in NATIVE.items()}  # dtypes of plain steps -> their grids


def take(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
    """The tensor ``name``, which must have ``shape`` and one of ``dtypes``.

    Raises ``InputError`` for one that is missing or is something else.
    """
    if name not in tensors:
        raise missing(name)
    got = tensors[name]
    if tuple(got.shape) != tuple(shape) or got.dtype not in dtypes:
        raise InputError(
            f"tensor {name} is {say(got.dtype)} of shape {list(got.shape)} instead of "
            f"{' or '.join(say(d) for d in dtypes)} of shape {list(shape)}; configuration and file do not "
            "belong together"
        )
    return got


def info(infos: Mapping[str, TensorInfo], name: str, dims: int, *dtypes: torch.dtype) -> TensorInfo:
    """What the header says of ``name``, which must have ``dims`` positive sides and one of ``dtypes``."""
    if name not in infos:
        raise missing(name)
    got = infos[name]
    if len(got.shape) != dims or min(got.shape, default=1) < 1 or got.dtype not in dtypes:
        raise InputError(
            f"tensor {name} is {say(got.dtype)} of shape {list(got.shape)} instead of "
            f"{' or '.join(say(d) for d in dtypes)} with {dims} sides; the file is damaged or of another kind"
        )
    return got


def missing(name: str) -> InputError:
    """The error of a checkpoint that lacks a tensor."""
    return InputError(
        f"the checkpoint has no tensor {name}, which its configuration asks for; it is incomplete"
    )


def no_integers(name: str, bits: tuple[int, ...], format: Format) -> str | None:
    """Why files called ``name``, of integers of ``bits`` cannot hold ``format``; or None."""
    if not isinstance(format.grid, Int) or format.grid.bits not in bits:
        widths = " or ".join(", ".join(map(str, bits)).rsplit(", ", 1))
        return f"{name} files hold integers of {widths} bits, not {format.grid.name}"
    if type(format.block) not in (Group, Channel):
        return f"{name} files have one step per group or channel, not per {format.block}"
    if format.zero not in (Zero.NONE, Zero.INTEGER):
        return f"zeros are integers in {name} files, not a {format.zero} zero"
    if format.zero is Zero.NONE and not format.grid.signed:
        return f"unsigned codes without a zero ({format.grid.name}) have no counterpart in {name} files"
    if plain_steps(format) is None:
        return f"steps are float16 in {name} files, not {format.scale}"
    return None


def say(dtype: torch.dtype) -> str:
    """ "float16"."""
    return str(dtype).removeprefix("torch.")


def to_words(fields: Tensor, bits: int) -> Tensor:
    """Fields [rows, n] -> int32 [rows, ceil(n bits / 32)]."""
    return pack(fields, bits, word=WORD).view(torch.int32)


def from_words(words: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of ``to_words``: int32 [rows, words] -> uint8 [rows, n]."""
    return unpack(words.contiguous().view(torch.uint8), bits, n)


def words(n: int, bits: int) -> int:
    """Words of ``n`` fields."""
    return row_bytes(n, bits, WORD) // WORD


def plain_steps(format: Format) -> torch.dtype | None:
    """The dtype of steps that are kept as a tensor; None for steps of another kind, or without steps."""
    own = format.scale
    return NATIVE.get(own.grid.name) if own is not None and own.scale is None else None


def as_dtype(scale: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Steps in another dtype, contiguous. Raises ``InputError`` where one becomes 0 or infinite."""
    out = scale.to(dtype).contiguous()
    bad = int((~torch.isfinite(out) | ((out == 0) & (scale != 0))).sum())
    if bad:
        raise InputError(
            f"{bad} steps of {what} do not fit into {say(dtype)}, the dtype of steps there; quantize with "
            f"{say(dtype)} scales"
        )
    return out


def spread(scale: Tensor, shape: tuple[int, ...], small: tuple[int, int], large: tuple[int, int]) -> Tensor:
    """Steps of large tiles repeated for the small ones in them, cut at the edges of a matrix of ``shape``."""
    for axis in (0, 1):
        scale = scale.repeat_interleave(large[axis] // small[axis], axis)
        scale = scale.narrow(axis, 0, shape[axis] // small[axis])
    return scale.contiguous()
