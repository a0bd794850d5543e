"""compressed-tensors' QuantizationArgs: a Format or an Activation in its words, and back.

    weights               layout                   held as
    int 1-8 bits          pack-quantized           group, channel; symmetric or with integer zeros
    int8, input int8      int-quantized            channel, tensor
    int < 8, input int8   int-quantized            group, channel; a byte for each weight (W4A8)
    E4M3                  naive-quantized          tensor, channel, block
    E4M3, input E4M3      float-quantized          the same; inputs per token, tensor, group; static
    E2M1 x E4M3 per 16    nvfp4-pack-quantized     alone, or with inputs of the same kind ("local" steps)
    E2M1 x E8M0 per 32    mxfp4-pack-quantized     alone, or with inputs of the same kind
    E2M3 x E8M0 per 32    mxfp6-pack-quantized     alone
    E4M3 x E8M0 per 32    mxfp8-quantized          alone, or with inputs of the same kind

How a range was chosen, and which symmetric divisor, is not recorded there and does not matter for stored
codes. Steps of inputs that are found at every call are the engine's: engines differ in the last of 256 codes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.activation import Activation
from fewbit.format.bits import pack, row_bytes, unpack
from fewbit.format.block import Block, Block2d, Channel, Group, PerTensor, Token
from fewbit.format.fit import AbsMax, MinMax, PowerOfTwo
from fewbit.format.format import Format, Zero
from fewbit.format.named import E4M3_OVER_FP32, E8M0, FP32, mx, nvfp4
from fewbit.grid import by_name
from fewbit.grid.integer import Int
from fewbit.io.parts import STEPS, WORD, plain_steps
from fewbit.io.typed import MOST

PACKED, BYTES = "pack-quantized", "int-quantized"
NAIVE, FLOATS = "naive-quantized", "float-quantized"
NVFP4, MXFP4, MXFP6, MXFP8 = (
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
)
E4M3, E2M1, E2M3 = (by_name(name) for name in ("e4m3fn", "e2m1", "e2m3"))
_MX = {E2M1: MXFP4, E2M3: MXFP6, E4M3: MXFP8}
_ELEMENTS = {4: "e2m1", 6: "e2m3", 8: "e4m3fn"}


def layout_of(format: Format, activation: Activation | None = None) -> str | None:
    """The layout of a weight in ``format`` whose module's input is quantized so; None where there is none.

    It goes by the grid and the kind of steps; ``refusal`` (``compressed_config``) looks at the rest.
    """
    whole = isinstance(format.grid, Int)
    if plain_steps(format) is not None:
        if whole:
            return PACKED if activation is None else BYTES
        return None if format.grid != E4M3 else NAIVE if activation is None else FLOATS
    if format.scale == E8M0 and format.block == Group(32):
        return _MX.get(format.grid)
    return NVFP4 if (format.grid, format.block, format.scale) == (E2M1, Group(16), E4M3_OVER_FP32) else None


def args_of(format: Format, *, dynamic: bool | None = None) -> dict:
    """QuantizationArgs of a weight, or with ``dynamic`` of an input, in ``format``."""
    whole = isinstance(format.grid, Int)
    args = {
        "num_bits": format.grid.bits,
        "type": "int" if whole else "float",
        "symmetric": format.zero is Zero.NONE,
        "dynamic": bool(dynamic),
    }
    if format.scale == E4M3_OVER_FP32:
        return args | {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
    if format.scale == E8M0:
        args["scale_dtype"] = "torch.uint8"
    match format.block:
        case Group(size):
            return args | {"strategy": "group", "group_size": size}
        case Block2d(rows, cols):
            return args | {"strategy": "block", "block_structure": [rows, cols]}
        case PerTensor():
            return args | {"strategy": "tensor"}
    return args | {"strategy": "channel" if dynamic is None else "token"}


def format_of(args: Mapping, layout: str | None, steps: torch.dtype) -> Format | None:
    """The Format of a weight; None where it is not read. steps: dtype of its ``weight_scale``."""
    bits, kind = args.get("num_bits", 8), args.get("type", "int")
    symmetric, size = args.get("symmetric", True), args.get("group_size")
    if not isinstance(symmetric, bool):
        return None
    if kind == "float" and layout in (NVFP4, MXFP4, MXFP6, MXFP8):
        wide = {NVFP4: nvfp4(), MXFP4: mx("e2m1"), MXFP6: mx("e2m3"), MXFP8: mx("e4m3fn")}[layout]
        stored = torch.float8_e4m3fn if layout == NVFP4 else torch.uint8
        fits = bits == wide.grid.bits and size == wide.block.size and symmetric and steps == stored
        return wide if fits else None
    block = _block(args)
    fits = layout in ((PACKED, BYTES) if kind == "int" else (NAIVE, FLOATS))
    if block is None or steps not in STEPS or not fits or not (kind == "int" or (bits == 8 and symmetric)):
        return None
    if kind == "int" and not (isinstance(bits, int) and 1 <= bits <= 8):
        return None
    return Format(
        grid=Int(bits) if kind == "int" else E4M3,
        block=block,
        range=AbsMax() if symmetric else MinMax(),
        zero=Zero.NONE if symmetric else Zero.INTEGER,
        scale=Format(grid=by_name(STEPS[steps])),
    )


def activation_of(args: Mapping, steps: torch.dtype | None) -> Activation | None:
    """The Activation of a module's input; None where it is not read. steps: dtype of ``input_scale``."""
    bits, kind, dynamic = args.get("num_bits", 8), args.get("type", "int"), args.get("dynamic", False)
    symmetric, size = args.get("symmetric", True), args.get("group_size")
    if dynamic == "local":  # the step of steps is stored, the steps are found at every call
        fits = (kind, bits, size, symmetric, args.get("strategy")) == ("float", 4, 16, True, "tensor_group")
        return Activation(format=nvfp4(), static=True) if fits else None
    if args.get("scale_dtype") == "torch.uint8":
        found = mx(_ELEMENTS.get(bits, "e2m1"))
        fits = kind == "float" and bits in _ELEMENTS and size == 32 and symmetric and dynamic is True
        return Activation(format=found) if fits else None
    block = {"token": Token(), "tensor": PerTensor()}.get(args.get("strategy"))
    if args.get("strategy") == "group" and size and size > 0:
        block = Group(size)
    grid = Int(8) if (kind, bits) == ("int", 8) else E4M3 if (kind, bits) == ("float", 8) else None
    if kind == "int" and bits == 4:
        grid = Int(4)
    if block is None or grid is None or dynamic not in (True, False) or (kind == "float" and not symmetric):
        return None
    fmt = Format(
        grid=grid,
        block=block,
        range=AbsMax() if symmetric else MinMax(),
        zero=Zero.NONE if symmetric else Zero.INTEGER,
        scale=FP32 if steps not in STEPS else Format(grid=by_name(STEPS[steps])),
    )
    if dynamic:
        return Activation(format=fmt)
    return Activation(format=fmt, static=True) if block == PerTensor() and steps in STEPS else None


def refuse_input(format: Format, activation: Activation) -> str | None:
    """Why an input cannot be described beside a weight in ``format``; None when it can."""
    own = activation.format
    if activation.outliers is not None or activation.groups is not None or activation.centred:
        return "inputs have no outliers in float, sorted groups or means there"
    if format.scale == E8M0 or own.scale == E8M0:
        if (format.scale, format.grid, format.block) != (
            own.scale,
            own.grid,
            own.block,
        ) or format.grid == E2M3:
            return f"MX weights take inputs of the same MX format there, not {own}"
        return (
            None
            if not activation.static and own.range == PowerOfTwo()
            else "MX inputs take OCP's own rule there"
        )
    if own == nvfp4() and layout_of(format) == NVFP4:
        stored = "NVFP4 inputs have one stored step per tensor there; quantize with static inputs"
        return None if activation.static else stored
    if plain_steps(own) is None or plain_steps(format) is None:
        return f"inputs of {own} are not written there"
    if isinstance(format.grid, Int) != isinstance(own.grid, Int) or own.grid.bits != 8:
        return f"weights in {format.grid.name} with inputs in {own.grid.name} are not written there"
    steps = (Channel, PerTensor) if format.grid.bits == 8 else (Channel, Group)
    if isinstance(format.grid, Int) and type(format.block) not in steps:
        kinds = "channel or tensor" if format.grid.bits == 8 else "group or channel"
        return f"int weights with int8 inputs have one step per {kinds} there, not per {format.block}"
    if not isinstance(own.grid, Int) and own.grid != E4M3:
        return f"FP8 inputs are e4m3fn there, not {own.grid.name}"
    whole = own.zero is Zero.NONE or (own.zero is Zero.INTEGER and isinstance(own.grid, Int))
    if activation.static:
        if type(own.block) is not PerTensor or not whole:
            return f"static inputs have one step, and integers one integer zero, per tensor there, not {own}"
        return None
    if type(own.block) not in (Token, Channel, PerTensor, Group) or not whole:
        return f"inputs have steps per token, group or tensor there, not {own}"
    if own.range not in (AbsMax(), MinMax()):
        return f"steps of inputs follow their largest magnitude there, not {type(own.range).__name__}"
    return None


def _block(args: Mapping) -> Block | None:
    size, shape = args.get("group_size"), args.get("block_structure")
    strategy = args.get("strategy") or ("tensor" if size is None else "channel")
    if size is not None and not (isinstance(size, int) and size < MOST):
        return None
    if size and size > 0:
        return Group(size)
    if strategy == "block":
        usual = isinstance(shape, list | tuple) and len(shape) == 2 and all(isinstance(n, int) for n in shape)
        return Block2d(*shape) if usual and min(shape) > 0 else None
    return {"channel": Channel(), "tensor": PerTensor()}.get(strategy)


def pack_words(grid: Int, codes: Tensor) -> Tensor:
    """[rows, n] codes -> int32 [rows, ceil(n * bits / 32)]."""
    return pack(grid.to_unsigned(codes), grid.bits, word=WORD).view(torch.int32)


def unpack_words(grid: Int, words: Tensor, n: int, module: str) -> Tensor:
    """Inverse of ``pack_words``: int32 [rows, words] -> codes [rows, n]."""
    if words.shape[-1] * WORD != row_bytes(n, grid.bits, WORD):
        raise InputError(
            f"{module} packs {n} values of {grid.bits} bits in {words.shape[-1]} words instead of "
            f"{row_bytes(n, grid.bits, WORD) // WORD}; it was written by compressed-tensors before 0.18, "
            "save it again with a newer one"
        )
    return grid.from_unsigned(unpack(words.contiguous().view(torch.uint8), grid.bits, n))
