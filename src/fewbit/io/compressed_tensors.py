"""The compressed-tensors layout: what transformers and vLLM load without any code of ours.

    integers, 1-8 bits     X.weight_packed      int32 [out, ceil(in * b / 32)]  fields q + 2^(b-1), LSB first
    ("pack-quantized")     X.weight_scale       float [out, groups]             x = (q - z) * s
                           X.weight_zero_point  int32 [ceil(out * b / 32), groups], packed down the columns
                           X.weight_shape       int64 [2] = out, in
    integers, inputs too   X.weight             int8 [out, in], a byte also for fewer bits (W4A8)
    ("int-quantized")      X.weight_scale       float [out, groups] or [1]
                           X.weight_zero_point  int8, of the same shape
    FP8 E4M3 weights       X.weight             float8_e4m3fn [out, in]
    ("naive-", "float-")   X.weight_scale       float [1], [out, 1] or [out / r, in / c]
    NVFP4                  X.weight_packed      uint8 [out, in / 2], even columns in the low half
                           X.weight_scale       float8_e4m3fn [out, in / 16]
                           X.weight_global_scale  float32 [1], what is divided by: x = q s / G
    MXFP4, MXFP6, MXFP8    X.weight_packed or X.weight, X.weight_scale uint8 [out, in / 32]  E8M0
    static inputs          X.input_scale        float [1]  (``fewbit.io.inputs``)
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
from fewbit.format.bits import pack, unpack
from fewbit.format.block import Block2d, Channel, Group
from fewbit.format.format import Format, Params, Zero
from fewbit.format.named import BF16, E8M0
from fewbit.format.qtensor import QTensor
from fewbit.grid.integer import Int
from fewbit.io import inputs
from fewbit.io.base import TensorInfo
from fewbit.io.compressed_args import E4M3, NVFP4, PACKED, layout_of, pack_words, unpack_words
from fewbit.io.compressed_config import (
    QUANT_METHOD,
    caveats,
    formats_from_config,
    quantization_config,
    refusal,
    schemes_from_config,
)
from fewbit.io.entry import Entry, Shape
from fewbit.io.parts import info, missing, plain_steps, spread, take

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

optional, input_names = (), {}
GLOBAL = "input_global_scale"  # 1 / the stored step of inputs whose other steps are local


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
    shapes = read([f"{m}.weight_shape" for m in found if f"{m}.weight_shape" in infos])
    out = {}
    for module, (fmt, activation) in found.items():
        shape = _shape(module, fmt, infos, shapes.get(f"{module}.weight_shape"))
        out[module] = Entry(format=_tiling(fmt, shape), shape=shape, activation=activation)
    return out


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


def to_dict(module: str, q: QTensor, activation: Activation | None = None) -> dict[str, Tensor]:
    """The tensors of a file for the quantized weight of ``module``, names as above.

    activation: how its input is quantized, which decides the layout of integers. Raises ``InputError`` with
    the reason where ``refusal`` gives one.
    """
    why = "an order of columns has no place there"
    if isinstance(q, QTensor):
        why = refusal(q.format, activation=activation)
    if why:
        raise InputError(
            f"{module} cannot be written as compressed-tensors: {why}; write a native checkpoint"
        )
    parts = _steps(q)
    match layout_of(q.format, activation):
        case "pack-quantized":
            parts["weight_packed"] = pack_words(q.format.grid, q.codes)
            parts["weight_shape"] = torch.tensor(tuple(q.shape), dtype=torch.int64)
            if q.zero is not None:
                parts["weight_zero_point"] = pack_words(q.format.grid, q.zero.T).T.contiguous()
        case "int-quantized":
            parts["weight"] = _signed(q.format.grid, q.codes)
            if q.zero is not None:
                parts["weight_zero_point"] = torch.atleast_1d(_signed(q.format.grid, q.zero))
        case "naive-quantized" | "float-quantized" | "mxfp8-quantized":
            parts["weight"] = q.codes.view(torch.float8_e4m3fn)
        case _:
            parts["weight_packed"] = pack(q.codes, q.format.grid.bits)
    return {f"{module}.{name}": tensor.contiguous() for name, tensor in parts.items()}


def _steps(q: QTensor) -> dict[str, Tensor]:
    if not isinstance(q.scale, QTensor):
        return {"weight_scale": torch.atleast_1d(q.scale)}
    if q.format.scale == E8M0:
        return {"weight_scale": q.scale.codes}
    outer = _inverse(q.scale.scale)
    return {"weight_scale": q.scale.codes.view(torch.float8_e4m3fn), "weight_global_scale": outer}


def _inverse(step: Tensor) -> Tensor:
    """G [1] float32 whose reciprocal is ``step``, if there is one, and else the nearest."""
    inverse = 1 / torch.atleast_1d(step.float())
    for other in (inverse.nextafter(inverse * 2), inverse.nextafter(inverse / 2)):
        inverse = torch.where((1 / inverse != step) & (1 / other == step), other, inverse)
    return inverse


def input_to_dict(module: str, activation: Activation, params: Params) -> dict[str, Tensor]:
    """The tensors of a file for the static input of ``module``."""
    if activation.local:
        return {f"{module}.{GLOBAL}": _inverse(params.scale)}
    return inputs.to_dict(module, params)


def _signed(grid: Int, codes: Tensor) -> Tensor:
    """int8 codes of b bits; unsigned ones move down by 2^(b-1)."""
    return codes if grid.signed else (codes.to(torch.int16) - 2 ** (grid.bits - 1)).to(torch.int8)


def _codes(grid: Int, tensors: Mapping[str, Tensor], name: str, shape: Shape) -> Tensor:
    """Inverse of ``_signed`` for the tensor ``name``, whose numbers must fit into the grid's bits."""
    stored = take(tensors, name, shape, torch.int8).to(torch.int16) + 2 ** (grid.bits - 1)
    if stored.numel() and not 0 <= int(stored.min()) <= int(stored.max()) < 2**grid.bits:
        raise InputError(f"{name} holds numbers of more than {grid.bits} bits; the file is damaged")
    return grid.from_unsigned(stored)


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
    return [f"{module}.{part}" for part in parts]


def from_dict(module: str, tensors: Mapping[str, Tensor], format: Format, shape: Shape) -> QTensor:
    """Inverse of ``to_dict`` for the Format that ``entries`` gives; ``shape`` is [out, in].

    Raises ``InputError`` for a missing tensor or another shape, such as the padded words of version 0.17.
    """
    format.block.check(shape, module)
    size, zero, name = torch.Size(shape), None, f"{module}.weight"
    blocks = format.block.scale_shape(shape)
    if plain_steps(format) is None:
        scale = _nested(module, tensors, format, blocks)
    else:
        scale = _plain(module, tensors, format, shape)
    if name in tensors:
        if isinstance(format.grid, Int):
            codes = _codes(format.grid, tensors, name, shape)
            if format.zero is Zero.INTEGER:
                zero = _codes(format.grid, tensors, f"{name}_zero_point", blocks or (1,)).reshape(blocks)
        else:
            codes = take(tensors, name, shape, torch.float8_e4m3fn).view(torch.uint8)
    elif plain_steps(format) is None:
        packed = (shape[0], shape[1] * format.grid.bits // 8)
        codes = unpack(take(tensors, f"{name}_packed", packed, torch.uint8), format.grid.bits, shape[1])
    else:
        if format.zero is Zero.INTEGER:
            stored = _get(tensors, f"{module}.weight_zero_point", torch.int32)
            zero = unpack_words(format.grid, stored.T, shape[0], module).T.contiguous()
        words = _get(tensors, f"{module}.weight_packed", torch.int32)
        codes = unpack_words(format.grid, words, shape[1], module)
    q = QTensor(codes=codes, scale=scale, zero=zero, format=format, shape=size)
    if tuple(codes.shape) != tuple(shape) or (zero is not None and tuple(zero.shape) != tuple(blocks)):
        raise InputError(
            f"the codes or zeros of {module} have shape {list(codes.shape)} instead of {list(shape)}; "
            "configuration and file do not belong together"
        )
    return q


def _nested(module: str, tensors: Mapping[str, Tensor], format: Format, blocks: Shape) -> QTensor:
    """Steps of NVFP4 or an MX format."""
    kind = torch.uint8 if format.scale == E8M0 else torch.float8_e4m3fn
    codes, outer = take(tensors, f"{module}.weight_scale", blocks, kind).view(torch.uint8), None
    if kind != torch.uint8:
        name = f"{module}.weight_global_scale"
        inverse = take(tensors, name, (1,), torch.float32)[0]
        if not 0 < inverse < math.inf:
            raise InputError(f"{name} is {float(inverse)}, which nothing can be divided by; it is damaged")
        outer = 1 / inverse
    return QTensor(codes=codes, scale=outer, zero=None, format=format.scale, shape=torch.Size(blocks))


def _plain(module: str, tensors: Mapping[str, Tensor], format: Format, shape: Shape) -> Tensor:
    """Steps in their own dtype; of tiles that are cut short at the edges, for smaller ones that are not."""
    blocks = format.block.scale_shape(shape)
    scale = _get(tensors, f"{module}.weight_scale", plain_steps(format))
    if scale.numel() == math.prod(blocks):
        return scale.reshape(blocks)
    if isinstance(format.block, Block2d) and scale.shape == tuple(-(-n // 128) for n in shape):
        return spread(scale, shape, (format.block.rows, format.block.cols), (128, 128))
    raise InputError(
        f"{module}.weight_scale has shape {list(scale.shape)}, but a weight of shape {list(shape)} in "
        f"{format} has scales of shape {list(blocks)}; configuration and file do not belong together"
    )


def _get(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """A tensor of any shape."""
    if name not in tensors:
        raise missing(name)
    return take(tensors, name, tuple(tensors[name].shape), dtype)
