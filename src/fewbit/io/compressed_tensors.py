"""The compressed-tensors layout: what transformers and vLLM load without any code of ours.

    integers, 1-8 bits     X.weight_packed      int32 [out, ceil(in * b / 32)]  fields q + 2^(b-1), LSB first
    ("pack-quantized")     X.weight_scale       float [out, groups]             x = (q - z) * s
                           X.weight_zero_point  int32 [ceil(out * b / 32), groups], packed down the columns
                           X.weight_shape       int64 [2] = out, in
    FP8 E4M3 weights       X.weight             float8_e4m3fn [out, in]
    ("naive-quantized")    X.weight_scale       float [1], [out, 1] or [out / r, in / c]

Packing is dense for every width, as the library's version 0.18 made it and as vLLM reads it; 0.17 itself
padded 3, 5, 6 and 7 bits and would misread those. What fits in here, and the configuration that goes with it,
is ``fewbit.io.compressed_config``.

Format: compressed-tensors 0.17 to 0.20, https://github.com/vllm-project/compressed-tensors (its code is not
used here; a test compares the words bit by bit).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.bits import pack, row_bytes, unpack
from fewbit.format.format import Format, Zero
from fewbit.format.qtensor import QTensor
from fewbit.grid.integer import Int
from fewbit.io.base import TensorInfo
from fewbit.io.compressed_config import (
    E4M3,
    QUANT_METHOD,
    caveats,
    formats_from_config,
    quantization_config,
    refusal,
)
from fewbit.io.native import Entry
from fewbit.io.parts import missing

__all__ = [
    "QUANT_METHOD",
    "caveats",
    "formats_from_config",
    "from_dict",
    "names",
    "quantization_config",
    "refusal",
    "to_dict",
]

_WORD = 4  # bytes of an int32
optional, input_names = (), {"input_zero": "input_zero_point"}


def entries(config: Mapping, infos: Mapping[str, TensorInfo], read: Callable) -> dict[str, Entry]:
    """What configuration and headers say of every quantized module, which are those with a ``weight_scale``;
    the shapes of packed ones are read.

    Raises ``InputError`` for what is not read, and for a module without a shape.
    """
    suffix = ".weight_scale"
    dtypes = {n.removesuffix(suffix): i.dtype for n, i in infos.items() if n.endswith(suffix)}
    formats = formats_from_config(config, dtypes)
    shapes = read([f"{m}.weight_shape" for m in formats if f"{m}.weight_shape" in infos])
    out = {}
    for module, fmt in formats.items():
        packed, plain = shapes.get(f"{module}.weight_shape"), infos.get(f"{module}.weight")
        if packed is None and plain is None:
            raise missing(f"{module}.weight_shape")
        out[module] = Entry(format=fmt, shape=plain.shape if packed is None else tuple(packed.tolist()))
    return out


def to_dict(module: str, q: QTensor) -> dict[str, Tensor]:
    """The tensors of a file for the quantized weight of ``module``, names as above.

    Raises ``InputError`` with the reason where ``refusal`` gives one.
    """
    why = refusal(q.format)
    if why:
        raise InputError(
            f"{module} cannot be written as compressed-tensors: {why}; write a native checkpoint"
        )
    scale = q.scale.reshape(1) if q.scale.ndim == 0 else q.scale
    if q.format.grid == E4M3:
        weight = q.codes.view(torch.float8_e4m3fn).contiguous()
        return {f"{module}.weight": weight, f"{module}.weight_scale": scale.contiguous()}
    out = {
        f"{module}.weight_packed": _pack(q.format.grid, q.codes),
        f"{module}.weight_scale": scale.contiguous(),
        f"{module}.weight_shape": torch.tensor(tuple(q.shape), dtype=torch.int64),
    }
    if q.zero is not None:
        out[f"{module}.weight_zero_point"] = _pack(q.format.grid, q.zero.T).T.contiguous()
    return out


def names(module: str, format: Format, shape: tuple[int, ...]) -> list[str]:
    """Names of the tensors that hold a weight in ``format``."""
    parts = (
        ["weight", "weight_scale"]
        if format.grid == E4M3
        else ["weight_packed", "weight_scale", "weight_shape"]
    )
    return [
        f"{module}.{p}" for p in (*parts, *(["weight_zero_point"] if format.zero is Zero.INTEGER else ()))
    ]


def from_dict(module: str, tensors: Mapping[str, Tensor], format: Format, shape: tuple[int, ...]) -> QTensor:
    """Inverse of ``to_dict`` for the Format that ``formats_from_config`` gives; ``shape`` is [out, in].

    Raises ``InputError`` for a missing tensor or another shape, such as the padded words of version 0.17.
    """
    format.block.check(shape, module)
    scale, blocks = _get(tensors, f"{module}.weight_scale"), format.block.scale_shape(shape)
    if scale.numel() != math.prod(blocks):
        raise InputError(
            f"{module}.weight_scale has shape {list(scale.shape)}, but a weight of shape {list(shape)} in "
            f"{format} has scales of shape {list(blocks)}; configuration and file do not belong together"
        )
    scale = scale.reshape(blocks)
    if format.grid == E4M3:
        codes = _get(tensors, f"{module}.weight").view(torch.uint8)
        return QTensor(codes=codes, scale=scale, zero=None, format=format, shape=torch.Size(shape))
    grid, (rows, columns) = format.grid, shape
    zero = None
    if format.zero is Zero.INTEGER:
        zero = _unpack(grid, _get(tensors, f"{module}.weight_zero_point").T, rows, module).T.contiguous()
    codes = _unpack(grid, _get(tensors, f"{module}.weight_packed"), columns, module)
    return QTensor(codes=codes, scale=scale, zero=zero, format=format, shape=torch.Size(shape))


def _get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise InputError(
            f"the checkpoint has no tensor {name}, which its configuration asks for; it is incomplete"
        )
    return tensors[name]


def _pack(grid: Int, codes: Tensor) -> Tensor:
    """[rows, n] codes -> int32 [rows, ceil(n * bits / 32)]."""
    return pack(grid.to_unsigned(codes), grid.bits, word=_WORD).view(torch.int32)


def _unpack(grid: Int, words: Tensor, n: int, module: str) -> Tensor:
    """Inverse of ``_pack``: int32 [rows, words] -> codes [rows, n]."""
    if words.shape[-1] * _WORD != row_bytes(n, grid.bits, _WORD):
        raise InputError(
            f"{module} packs {n} values of {grid.bits} bits in {words.shape[-1]} words instead of "
            f"{row_bytes(n, grid.bits, _WORD) // _WORD}; it was written by compressed-tensors before 0.18, "
            "save it again with a newer one"
        )
    return grid.from_unsigned(unpack(words.contiguous().view(torch.uint8), grid.bits, n))
