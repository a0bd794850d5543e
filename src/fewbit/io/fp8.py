"""The layout of fine-grained FP8 ("fp8" of transformers, DeepSeek-V3's files): E4M3 with a step per tile.

    X.weight            float8_e4m3fn [out, in]
    X.weight_scale_inv  float32 [ceil(out / r), ceil(in / c)]  w = q weight_scale_inv, tiles of 128 x 128
                        float32 [] or [1] where weight_block_size is null: one step for the tensor
    X.activation_scale  float32 [] or [1], where activation_scheme is static

The name says inverse and it multiplies all the same. Tiles at the lower and right edge may be cut short; a
Format knows only tiles that divide the matrix, so such a weight is read with the largest smaller tiles that
do, their steps repeated (576 rows: tiles of 64), and written the same way back: by value nothing changes.

Inputs: "dynamic" rounds groups of c columns of each token to E4M3 at every call, per tensor where there are
no tiles; "static" per tensor with a stored step. An engine cannot run dynamic groups that do not divide the
inputs: such a layer reads its input as it is.

DeepSeek-V3 technical report, https://arxiv.org/abs/2412.19437, section 3.3.2. Road not taken: steps of E8M0
("scale_fmt": "ue8m0"), which are refused until a file with them has been seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.activation import Activation
from fewbit.format.block import Block2d, Group, PerTensor
from fewbit.format.format import Format, Zero
from fewbit.format.named import FP32
from fewbit.format.qtensor import QTensor
from fewbit.grid import by_name
from fewbit.io.base import TensorInfo
from fewbit.io.entry import Entry, Shape
from fewbit.io.parts import STEPS, as_dtype, info, plain_steps, spread, take

quant_method = "fp8"
optional, input_names = (), {"input_scale": "activation_scale"}
E4M3 = by_name("e4m3fn")
TILE = (128, 128)
_STEP = "weight_scale_inv"


def holds(format: Format, shape: Shape | None = None, activation: Activation | None = None) -> str | None:
    """Why a weight in ``format`` cannot be held; None when it can."""
    if format.grid != E4M3:
        return f"FP8 files hold E4M3, not {format.grid.name}"
    if format.zero is not Zero.NONE or plain_steps(format) is None:
        return f"FP8 files have float32 steps and no zeros, not {format}"
    tile = _tile(format)
    if tile is not None and (TILE[0] % tile[0] or TILE[1] % tile[1]):
        return f"FP8 files have tiles of 128 x 128 or one step per tensor, not {format.block}"
    if tile is None and type(format.block) is not PerTensor:
        return f"FP8 files have one step per 128 x 128 tile or per tensor, not per {format.block}"
    if activation is not None and activation not in (_dynamic(format), _dynamic(format, 128), STATIC):
        return f"inputs of FP8 files are E4M3 per group of 128 or per tensor, not {activation}"
    return None


def stored_format(format: Format) -> Format:
    """``format`` as the file will say it: float32 steps."""
    return Format(grid=E4M3, block=format.block, scale=FP32)


def nearest(format: Format | None, shape: Shape) -> Format:
    """What a weight of ``shape`` that is not held can be rounded to."""
    return _format(shape, TILE, torch.float32)


def quantize(w: Tensor) -> QTensor:
    """``w`` [out, in] rounded to nearest in tiles of 128 x 128, those at the edges cut short."""
    whole = torch.nn.functional.pad(w, (0, -w.shape[1] % TILE[1], 0, -w.shape[0] % TILE[0]))
    q, fmt = Format(grid=E4M3, block=Block2d(*TILE), scale=FP32).quantize(whole), nearest(None, w.shape)
    scale = spread(q.scale, w.shape, _tile(fmt), TILE)
    codes = q.codes[: w.shape[0], : w.shape[1]].contiguous()
    return QTensor(codes=codes, scale=scale, zero=None, format=fmt, shape=w.shape)


def to_dict(module: str, q: QTensor) -> dict[str, Tensor]:
    """The tensors of a file for the weight of ``module``.

    Raises ``InputError`` where ``holds`` gives a reason, and for smaller tiles that differ within 128 x 128.
    """
    why = holds(q.format) if isinstance(q, QTensor) else "FP8 files have no order of columns"
    if why:
        raise InputError(f"{module} cannot be written: {why}; write a native checkpoint")
    scale, tile = as_dtype(q.scale, torch.float32, module), _tile(q.format)
    if tile is not None and tile != TILE:
        fine = scale
        scale = scale[:: TILE[0] // tile[0], :: TILE[1] // tile[1]].contiguous()
        if not torch.equal(spread(scale, q.shape, tile, TILE), fine):
            raise InputError(
                f"{module} has a step for each {tile[0]} x {tile[1]} tile, and FP8 files one for 128 x 128"
            )
    return {f"{module}.weight": q.codes.view(torch.float8_e4m3fn).contiguous(), f"{module}.{_STEP}": scale}


def quantization_config(entries: Mapping[str, Entry], left: Collection[str]) -> dict:
    """The ``quantization_config`` of config.json; left: linear modules that stay float.

    Raises ``InputError`` where some modules have tiles and others a single step.
    """
    tiled = {_tile(e.format) is not None for e in entries.values()}
    static = {e.activation is not None and e.activation.static for e in entries.values()}
    if len(tiled) > 1 or len(static) > 1:
        raise InputError("FP8 files have tiles for all modules or for none, and one kind of inputs")
    return {
        "quant_method": quant_method,
        "fmt": "e4m3",
        "activation_scheme": "static" if static.pop() else "dynamic",
        "weight_block_size": list(TILE) if tiled.pop() else None,
        "modules_to_not_convert": list(left) or None,
    }


def entries(config: Mapping, infos: Mapping[str, TensorInfo], read: Callable) -> dict[str, Entry]:
    """What the headers and the configuration say of every quantized module.

    Raises ``InputError`` for another layout under this name, and for shapes that do not fit together.
    """
    size = config.get("weight_block_size")
    usual = size is None or (
        isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
    )
    if not usual or config.get("scale_fmt", "float") != "float" or config.get("fmt", "e4m3") != "e4m3":
        raise InputError(
            f"this FP8 checkpoint has tiles {size!r:.40}, fmt {config.get('fmt')!r:.40} and scale_fmt "
            f"{config.get('scale_fmt')!r:.40}; read is e4m3 with float steps per tile or tensor"
        )
    static, found = config.get("activation_scheme") == "static", {}
    for name in (n for n in infos if n.endswith(f".{_STEP}")):
        module = name.removesuffix(f".{_STEP}")
        shape = info(infos, f"{module}.weight", 2, torch.float8_e4m3fn).shape
        steps = infos[name]
        tiles = () if size is None else tuple(-(-n // t) for n, t in zip(shape, size, strict=True))
        if steps.dtype not in STEPS or (steps.shape != tiles and (tiles or math.prod(steps.shape) != 1)):
            raise InputError(
                f"{name} has shape {list(steps.shape)} instead of {list(tiles)} for a weight of shape "
                f"{list(shape)} in tiles of {size}; configuration and file do not belong together"
            )
        if size is not None and tuple(size) != TILE and any(n % t for n, t in zip(shape, size, strict=True)):
            raise InputError(
                f"tiles of {list(size)} do not divide {module} of shape {list(shape)}, and only "
                "those of 128 x 128 are read when they are cut short at the edges"
            )
        fmt = _format(shape, size, steps.dtype)
        own = _dynamic(fmt, None if size is None else size[1])
        if size is not None and shape[1] % size[1]:
            own = None
        found[module] = Entry(format=fmt, shape=shape, activation=STATIC if static else own)
    if not found:
        raise InputError(f"this checkpoint says FP8 but holds no tensor named {_STEP}; it is incomplete")
    return found


def names(module: str, format: Format, shape: Shape) -> list[str]:
    """Names of the tensors that hold a weight."""
    return [f"{module}.weight", f"{module}.{_STEP}"]


def from_dict(module: str, tensors: Mapping[str, Tensor], format: Format, shape: Shape) -> QTensor:
    """Inverse of ``to_dict`` for an entry's format. Raises ``InputError`` for what does not fit it."""
    weight = take(tensors, f"{module}.weight", shape, torch.float8_e4m3fn)
    name, blocks = f"{module}.{_STEP}", format.block.scale_shape(shape)
    scale = tensors[name]
    if _tile(format) is None:
        scale = scale.reshape(())
    elif tuple(scale.shape) != tuple(blocks):
        # Tiles at the edges are cut short: the config's are the smallest that give these many.
        scale = spread(scale, shape, _tile(format), TILE)
    scale = take({name: scale}, name, blocks, plain_steps(format))
    return QTensor(
        codes=weight.view(torch.uint8), scale=scale, zero=None, format=format, shape=torch.Size(shape)
    )


def _tile(format: Format) -> tuple[int, int] | None:
    return (format.block.rows, format.block.cols) if isinstance(format.block, Block2d) else None


def _format(shape: Shape, size: Collection[int] | None, steps: torch.dtype) -> Format:
    """Tiles of ``size``, or where they do not divide ``shape`` the largest parts of them that do."""
    own = Format(grid=by_name(STEPS[steps]))
    if size is None:
        return Format(grid=E4M3, block=PerTensor(), scale=own)
    sides = (math.gcd(n, t) for n, t in zip(shape, size, strict=True))
    return Format(grid=E4M3, block=Block2d(*sides), scale=own)


def _dynamic(format: Format, columns: int | None = None) -> Activation:
    block = PerTensor() if columns is None else Group(columns)
    return Activation(format=Format(grid=E4M3, block=block, scale=FP32))


STATIC = Activation(format=Format(grid=E4M3, block=PerTensor(), scale=FP32), static=True)
