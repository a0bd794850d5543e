"""The tensors of one compressed-tensors module, made from a quantized weight and read back.

Their names and shapes are listed in ``fewbit.io.compressed_tensors``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.activation import Activation
from fewbit.format.bits import pack, unpack
from fewbit.format.block import Block2d, Group
from fewbit.format.format import Format, Params, Zero
from fewbit.format.named import E8M0
from fewbit.format.qtensor import QTensor
from fewbit.grid.integer import Int
from fewbit.io import inputs
from fewbit.io.compressed_args import layout_of, pack_words, unpack_words
from fewbit.io.compressed_config import refusal
from fewbit.io.entry import Shape
from fewbit.io.ordered import OrderedTensor, order_of
from fewbit.io.parts import missing, plain_steps, spread, take

GLOBAL = "input_global_scale"  # 1 / the stored step of inputs whose other steps are local
input_names = {"input_zero": "input_zero_point"}


def order_of_columns(
    module: str, tensors: Mapping[str, Tensor], format: Format, shape: Shape
) -> Tensor | None:
    """The order of columns that makes groups neighbours; None where they are, or none are given."""
    name = f"{module}.weight_g_idx"
    if name not in tensors or not isinstance(format.block, Group):
        return None
    g_idx = take(tensors, name, (shape[1],), torch.int32)
    return None if (g_idx == -1).all() else order_of(g_idx, format.block.size, name)


def to_dict(
    module: str, q: QTensor | OrderedTensor, activation: Activation | None = None
) -> dict[str, Tensor]:
    """The tensors of a file for the quantized weight of ``module``, names as above.

    activation: how its input is quantized, which decides the layout of integers. Raises ``InputError`` with
    the reason where ``refusal`` gives one.
    """
    order, q = (q.order, q.rest) if isinstance(q, OrderedTensor) else (None, q)
    why = "columns kept in float have no place there"
    if isinstance(q, QTensor):
        why = refusal(q.format, activation=activation, ordered=order is not None)
    if why:
        raise InputError(
            f"{module} cannot be written as compressed-tensors: {why}; write a native checkpoint"
        )
    parts = _steps(q)
    match layout_of(q.format, activation):
        case "pack-quantized":
            codes = q.codes
            if order is not None:
                back = order.argsort()
                codes = codes[:, back]
                parts["weight_g_idx"] = back.int() // q.format.block.size
            parts["weight_packed"] = pack_words(q.format.grid, codes)
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
    if params.zero is not None:
        params = replace(params, zero=_signed(activation.format.grid, params.zero))
    stored = inputs.to_dict(module, params)
    names = {f"{module}.{own}": f"{module}.{other}" for own, other in input_names.items()}
    return {names.get(n, n): tensor for n, tensor in stored.items()}


def _signed(grid: Int, codes: Tensor) -> Tensor:
    """int8 codes of b bits; unsigned ones move down by 2^(b-1)."""
    return codes if grid.signed else (codes.to(torch.int16) - 2 ** (grid.bits - 1)).to(torch.int8)


def _codes(grid: Int, tensors: Mapping[str, Tensor], name: str, shape: Shape) -> Tensor:
    """Inverse of ``_signed`` for the tensor ``name``, whose numbers must fit into the grid's bits."""
    stored = take(tensors, name, shape, torch.int8).to(torch.int16) + 2 ** (grid.bits - 1)
    if stored.numel() and not 0 <= int(stored.min()) <= int(stored.max()) < 2**grid.bits:
        raise InputError(f"{name} holds numbers of more than {grid.bits} bits; the file is damaged")
    return grid.from_unsigned(stored)


def from_dict(
    module: str,
    tensors: Mapping[str, Tensor],
    format: Format,
    shape: Shape,
    apart: None = None,
    ordered: bool = False,
) -> QTensor | OrderedTensor:
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
    if zero is None:
        _no_zeros(module, tensors, format, shape)
    order = order_of_columns(module, tensors, format, shape) if ordered else None
    codes = codes if order is None else codes[:, order]
    q = QTensor(codes=codes, scale=scale, zero=zero, format=format, shape=size)
    if tuple(codes.shape) != tuple(shape) or (zero is not None and tuple(zero.shape) != tuple(blocks)):
        raise InputError(
            f"the codes or zeros of {module} have shape {list(codes.shape)} instead of {list(shape)}; "
            "configuration and file do not belong together"
        )
    return q if order is None else OrderedTensor(rest=q, order=order)


def _no_zeros(module: str, tensors: Mapping[str, Tensor], format: Format, shape: Shape) -> None:
    """Zeros beside a weight that the configuration calls symmetric must all be 0, packed or not."""
    name = f"{module}.weight_zero_point"
    stored = tensors.get(name)
    if stored is None or not stored.any():
        return
    if stored.dtype == torch.int32 and stored.ndim == 2 and isinstance(format.grid, Int):
        stored = unpack_words(format.grid, stored.T, shape[0], module)
    if stored.any():
        raise InputError(
            f"{name} holds other zeros than 0, but the configuration says that the weights are symmetric; "
            'set "symmetric" to false in config.json'
        )


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
