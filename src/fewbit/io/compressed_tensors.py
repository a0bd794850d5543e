"""The compressed-tensors layout: what transformers and vLLM load without any code of ours.

    integers, 1-8 bits     X.weight_packed      int32 [out, ceil(in * b / 32)]  fields q + 2^(b-1), LSB first
    ("pack-quantized")     X.weight_scale       float [out, groups]             x = (q - z) * s
                           X.weight_zero_point  int32 [ceil(out * b / 32), groups], packed down the columns
                           X.weight_shape       int64 [2] = out, in
                           X.weight_g_idx       int32 [in], the group of each column ("actorder": "group")
    integers, inputs too   X.weight             int8 [out, in], a byte also for fewer bits (W4A8)
    ("int-quantized")      X.weight_scale       float [out, groups] or [1]
                           X.weight_zero_point  int8, of the same shape
    FP8 E4M3 weights       X.weight             float8_e4m3fn [out, in]
    ("naive-", "float-")   X.weight_scale       float [1], [out, 1] or [out / r, in / c]
    NVFP4                  X.weight_packed      uint8 [out, in / 2], even columns in the low half
                           X.weight_scale       float8_e4m3fn [out, in / 16]
                           X.weight_global_scale  float32 [1], what is divided by: x = q s / G
    MXFP4, MXFP6, MXFP8    X.weight_packed or X.weight, X.weight_scale uint8 [out, in / 32]  E8M0
    static inputs          X.input_scale        float [1], X.input_zero_point int8 [1] of asymmetric integers
    NVFP4 inputs ("local") X.input_global_scale  float32 [1], what steps are multiplied by, as of weights

Packing is dense for every width, as the library's version 0.18 made it and as vLLM reads it; 0.17 itself
padded 3, 5, 6 and 7 bits and would misread those. NVFP4's one step per tensor g is held as G = 1 / g in
float32, whose reciprocal may differ from g in the last of 24 bits. What fits in here, and the configuration
that goes with it, is ``fewbit.io.compressed_config``.

Format: compressed-tensors 0.17 to 0.20, https://github.com/vllm-project/compressed-tensors (its code is not
used here; a test compares the words bit by bit).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.activation import Activation
from fewbit.format.block import Block2d, Channel, Group
from fewbit.format.format import Format, Zero
from fewbit.format.named import BF16
from fewbit.grid.integer import Int
from fewbit.io import compressed_kv, compressed_maps, kv
from fewbit.io.base import TensorInfo
from fewbit.io.compressed_args import E4M3, NVFP4, PACKED, layout_of
from fewbit.io.compressed_caveats import caveats
from fewbit.io.compressed_config import (
    QUANT_METHOD,
    formats_from_config,
    quantization_config,
    refusal,
    schemes_from_config,
)
from fewbit.io.compressed_kv import from_config as kv_format
from fewbit.io.compressed_weights import (
    GLOBAL,
    from_dict,
    input_names,
    input_to_dict,
    order_of_columns,
    to_dict,
)
from fewbit.io.entry import Entry, Shape
from fewbit.io.parts import info, missing, plain_steps, take

__all__ = [
    "GLOBAL",
    "QUANT_METHOD",
    "caveats",
    "formats_from_config",
    "from_dict",
    "input_names",
    "input_to_dict",
    "kv_format",
    "names",
    "quantization_config",
    "refusal",
    "to_dict",
]

# Read where they are there: zeros of symmetric weights, which must be 0, and groups of columns.
optional = ("weight_zero_point", "weight_g_idx")


def entries(config: Mapping, infos: Mapping[str, TensorInfo], read: Callable) -> dict[str, Entry]:
    """What configuration and headers say of every quantized module, which are those with a ``weight_scale``;
    the shapes of packed ones are read.

    Raises ``InputError`` for what is not read, and for a module without a shape.
    """
    dtypes, steps = (
        {n.removesuffix(end): i.dtype for n, i in infos.items() if n.endswith(end)}
        for end in (".weight_scale", ".input_scale")
    )
    found = schemes_from_config(config, dtypes, steps)
    named = ("weight_shape", "weight_g_idx")
    small = read([name for m in found for part in named if (name := f"{m}.{part}") in infos])
    shapes = {m: _shape(m, f, infos, small.get(f"{m}.weight_shape")) for m, (f, _) in found.items()}
    maps = compressed_maps.from_config(config, shapes, infos, read)
    out = {}
    for module, (fmt, activation) in found.items():
        online, output = maps.get(module, (None, None))
        order = order_of_columns(module, small, fmt, shapes[module])
        if order is not None and online is not None:
            raise InputError(f"{module} has columns in another order and a map of its input; it is not read")
        out[module] = Entry(
            format=_tiling(fmt, shapes[module]),
            shape=shapes[module],
            activation=activation,
            online=online,
            output=output,
            ordered=order is not None,
        )
    return out


def beside(config: Mapping, infos: Mapping[str, TensorInfo]) -> list[str]:
    """Names of tensors that are no parameters and belong to no weight: matrices of maps, steps of keys and
    values.
    """
    return compressed_maps.stored(config, infos) + (kv.stored(infos) if config.get(compressed_kv.KEY) else [])


def _shape(module: str, format: Format, infos: Mapping[str, TensorInfo], packed: Tensor | None) -> Shape:
    """[out, in] of a module: as its own tensor says, or from the packed bytes."""
    if packed is not None:
        name = f"{module}.weight_shape"
        shape = tuple(take({name: packed}, name, (2,), torch.int64, torch.int32).tolist())
        words = info(infos, f"{module}.weight_packed", 2, torch.int32).shape
        if shape[0] != words[0] or not 0 < shape[1] <= words[1] * 32:
            raise InputError(f"{name} says {list(shape)}, which {list(words)} packed words do not hold")
        return shape
    if f"{module}.weight" in infos:
        return info(infos, f"{module}.weight", 2, torch.int8, torch.float8_e4m3fn).shape
    if format.grid.bits not in (4, 6) or plain_steps(format) is not None:
        raise missing(f"{module}.weight_shape")
    rows, columns = info(infos, f"{module}.weight_packed", 2, torch.uint8).shape
    return rows, columns * 8 // format.grid.bits


def _tiling(format: Format, shape: Shape) -> Format:
    """``format`` with tiles that divide ``shape``: those of the file may be cut short at the edges."""
    if not isinstance(format.block, Block2d):
        return format
    own = (format.block.rows, format.block.cols)
    return replace(format, block=Block2d(*(math.gcd(n, t) for n, t in zip(shape, own, strict=True))))


def holds(format: Format, shape: Shape | None = None, activation: Activation | None = None) -> str | None:
    """Why the weight of a torch.nn.Linear cannot be held; None when it can."""
    return refusal(format, activation=activation)


def stored_format(format: Format) -> Format:
    """``format`` as the file will say it: all of it, but for how ranges were chosen."""
    return format


def nearest(format: Format, shape: Shape) -> Format:
    """What a weight of ``shape`` that is not held can be rounded to: integers in groups of 128 or less."""
    bits = min(8, math.ceil(format.grid.bits / format.grid.width))
    if format.grid.name.startswith(("e4m3", "e5m2")):
        return Format(grid=E4M3, block=Channel(), scale=BF16)
    sizes = (g for g in (getattr(format.block, "size", 128), 128, 64, 32) if shape[1] % g == 0)
    size = next(sizes, None)
    return Format(grid=Int(bits), block=Channel() if size is None else Group(size), scale=BF16)


def names(
    module: str,
    format: Format,
    shape: Shape,
    apart: None = None,
    ordered: bool = False,
    *,
    activation: Activation | None = None,
    packed: bool = False,
) -> list[str]:
    """Names of the tensors that hold a weight in ``format``; activation: how the input is quantized; packed:
    the file has a ``weight_packed``, which is also allowed for integers with inputs.
    """
    layout = PACKED if packed and isinstance(format.grid, Int) else layout_of(format, activation)
    parts = ["weight_scale", "weight_packed" if "pack" in layout else "weight"]
    parts += {PACKED: ["weight_shape"], NVFP4: ["weight_global_scale"]}.get(layout, [])
    parts += ["weight_zero_point"] if format.zero is Zero.INTEGER else []
    parts += ["weight_g_idx"] if ordered else []
    return [f"{module}.{part}" for part in parts]
