"""QTensors as ggml's blocks and back: codes and steps as they are, or a reason why not.

    x = (q - z) s  or  q s + m        of a row, a group of 32 k or a tensor, against one float16 d per 32

A ggml type holds a format *exactly* when its blocks can repeat the format's steps and its fields reach the
codes; nothing is rounded here. So a wider group is written as several blocks of the same d, and an integer
zero goes where it fits: into the offset m = -z s where that is a float16 number, into the code q - z where a
wider field holds it (a 4-bit code less its zero fits Q5_0). The smallest type that holds the tensor is taken.

Types and layouts: ``fewbit.io.gguf_blocks``. Shapes: weights [out, in]; bytes [out, bytes of a row].
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format import FORMATS, Channel, Format, Group, PerTensor, QTensor, Zero
from fewbit.format.affine import NATIVE
from fewbit.grid.integer import Int
from fewbit.io.gguf_blocks import KINDS, Blocks, Kind, block_bytes, pack, unpack

FORMAT_OF = {name: FORMATS[name.lower()] for name in KINDS}
# by bits: which fields hold signed integers, and which unsigned ones beside an offset
SIGNED = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}
OFFSET = {"Q4_1": 4, "Q5_1": 5}
BY_SIZE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
FLOATS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


def holds(format: Format) -> str | None:
    """None when a GGUF type can hold tensors of ``format`` without change, else the reason why none can.

    Where it depends on the numbers (a step must be a float16, an offset too), None: ``encode`` looks at them.
    """
    if format.scale is None and format.grid.name in FLOATS:
        return None
    if same_structure(format) is not None:
        return None
    if not isinstance(format.grid, Int):
        return (
            f"GGUF has integers, E2M1 under a power of two per 32, and plain floats; {format.grid.name} with "
            f"{format.scale} steps is none of them"
        )
    if format.scale is None or format.scale.scale is not None or format.scale.grid.name not in NATIVE:
        return (
            f"blocks of a GGUF have float16 steps or the two levels of its K-quants, not {format.scale} ones"
        )
    if not _repeats(format, 32):
        return f"blocks of a GGUF hold 32 neighbours in a row, which {format.block} cuts or joins otherwise"
    if format.zero in (Zero.FLOAT, Zero.MEAN):
        return f"blocks of a GGUF have integer codes and offsets, no {format.zero} zeros"
    if format.zero is Zero.OFFSET and format.grid.bits > max(OFFSET.values()):
        return f"blocks of a GGUF with an offset have codes of 4 or 5 bits, not {format.grid.bits}"
    if format.zero is Zero.NONE and format.grid.max > 127:
        return f"{format.grid.name} reaches {format.grid.max:g} and the widest field of a GGUF 127"
    return None


def encode(q: QTensor, what: str = "tensor") -> tuple[str, np.ndarray]:
    """The smallest ggml type that holds ``q`` [out, in] as it is, and its bytes, uint8 [out, bytes of a row].

    Raises ``InputError`` with the reason, ``what`` being the tensor's name.
    """
    reason = holds(q.format)
    if reason is not None:
        raise InputError(f"{what} cannot go into a GGUF as it is: {reason}")
    if q.format.scale is None:
        return _plain(q.dequantize(NATIVE[q.format.grid.name]))
    kind = same_structure(q.format)
    if q.shape[-1] % 32:
        raise InputError(
            f"{what} cannot go into a GGUF as it is: its {q.shape[-1]} columns are no whole blocks of 32"
        )
    if kind is None:
        kind, blocks = _one_level(q, what)
    elif kind.name == "MXFP4":
        exponents = _per_block(q, q.scale.format.grid.to_unsigned(q.scale.codes))
        blocks = Blocks(fields=_fields(q, kind), e=exponents.numpy())
    else:
        blocks = _two_levels(q, kind, what)
    return kind.name, pack(kind, blocks).reshape(len(q.codes), -1)


def decode(name: str, raw: np.ndarray, shape: tuple[int, ...]) -> QTensor:
    """The QTensor of ``shape`` [out, in] in ggml type ``name`` (a key of `KINDS`) from its bytes.

    Code for code: ``encode`` of the result gives the bytes back.
    """
    kind, fmt = KINDS[name], FORMAT_OF[name]
    got = unpack(kind, np.ascontiguousarray(raw).reshape(-1, block_bytes(kind)))
    blocks, rows = tuple(fmt.block.scale_shape(shape)), torch.Size(shape)
    codes = fmt.grid.from_unsigned(_tensor(got.fields)).reshape(shape)
    if name == "MXFP4":
        own = fmt.scale
        scale = QTensor(
            codes=own.grid.from_unsigned(_tensor(got.e)).reshape(blocks), scale=None, zero=None, format=own,
            shape=torch.Size(blocks),
        )  # fmt: skip
        return QTensor(codes=codes, scale=scale, zero=None, format=fmt, shape=rows)
    if not kind.step_bits:
        zero = None if got.m is None else _tensor(got.m).reshape(blocks)
        return QTensor(codes=codes, scale=_tensor(got.d).reshape(blocks), zero=zero, format=fmt, shape=rows)
    scale = _level(fmt.scale, got.s, got.d, blocks)
    zero = None if got.mins is None else _level(fmt.offsets, got.mins, -got.m, blocks)
    return QTensor(codes=codes, scale=scale, zero=zero, format=fmt, shape=rows)


def floats(w: Tensor, what: str = "tensor") -> tuple[str, np.ndarray]:
    """A float tensor in its own dtype: the ggml type and the bytes, uint8 [..., bytes of a row].

    Raises ``InputError`` for a dtype that GGUF has no type for.
    """
    if w.dtype not in NATIVE.values():
        raise InputError(
            f"{what} is {w.dtype}, and a GGUF holds float32, float16 and bfloat16; cast it first"
        )
    return _plain(w)


def settled(format: Format) -> str | None:
    """The ggml type of every tensor of a format that GGUF holds, or None where the numbers decide."""
    if format.scale is None:
        return FLOATS[format.grid.name]
    kind = same_structure(format)
    if kind is not None:
        return kind.name
    if format.zero is Zero.OFFSET and not format.grid.signed and format.scale.grid.name == "fp16":
        return next(name for name, bits in OFFSET.items() if format.grid.bits <= bits)
    if format.zero is not Zero.NONE:
        return None
    low, high = format.grid.min, format.grid.max
    return next(name for name, bits in SIGNED.items() if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1))


# -- how a format lies in blocks --


def same_structure(format: Format) -> Kind | None:
    """The K-quant or MXFP4 whose levels the format has; range rules and divisors leave no trace in them."""
    for name, fmt in FORMAT_OF.items():
        if fmt.scale is None or format.scale is None or format.grid != fmt.grid:
            continue
        if name == "MXFP4" and format.scale.scale is None and format.scale.grid == fmt.scale.grid:
            return KINDS[name] if format.zero is Zero.NONE and _repeats(format, 32) else None
        pairs = ((format.scale, fmt.scale), (format.offsets, fmt.offsets))
        if (
            KINDS[name].step_bits
            and (format.zero, format.block) == (fmt.zero, fmt.block)
            and all(_same_level(a, b) for a, b in pairs)
        ):
            return KINDS[name]
    return None


def _same_level(a: Format | None, b: Format | None) -> bool:
    if a is None or b is None:
        return a is b
    plain = a.scale is not None and a.scale.scale is None and a.scale.grid.name in NATIVE
    return plain and (a.grid, a.block, a.zero) == (b.grid, b.block, Zero.NONE)


def _repeats(format: Format, size: int) -> bool:
    """True when every ``size`` neighbours share a step."""
    if isinstance(format.block, Group):
        return format.block.size % size == 0
    return isinstance(format.block, Channel | PerTensor)


def _per_block(q: QTensor, p: Tensor) -> Tensor:
    """Steps or zeros [*scale_shape] of every 32 neighbours, [out * in / 32]."""
    rows, n = q.shape[0], q.shape[-1] // 32
    if isinstance(q.format.block, Group):
        return p.repeat_interleave(q.format.block.size // 32, -1).reshape(-1)
    return p.expand(rows, n).reshape(-1)


def _one_level(q: QTensor, what: str) -> tuple[Kind, Blocks]:
    """The first kind by size that holds the codes less their zeros, or beside an offset."""
    d, wrong = _half(_per_block(q, q.scale))
    if wrong:
        raise InputError(
            f"{what} cannot go into a GGUF as it is: {wrong} of its {len(d)} steps are no float16 numbers; "
            "quantize it with scale=fp16"
        )
    codes = q.codes.reshape(len(d), 32).short()
    for kind, fields, m in _ways(q, codes, _per_block(q, q.scale).double()):
        half, wrong = (None, 0) if m is None else _half(m)
        if not wrong:
            return kind, Blocks(fields=fields.byte().numpy(), d=d, m=half)
    raise InputError(
        f"{what} cannot go into a GGUF as it is: its codes less their zeros are wider than 8 bits, or its "
        "offsets are no float16 numbers; quantize it with format=q4_1 or another of ggml's"
    )


def _ways(q: QTensor, codes: Tensor, d: Tensor) -> Iterator[tuple[Kind, Tensor, Tensor | None]]:
    """Kinds by size that reach the codes [n, 32]: the kind, its fields, and the offsets m [n] it needs."""
    grid, zero = q.format.grid, q.format.zero
    low, high = int(grid.min), int(grid.max)
    m = signed = None
    if zero is Zero.OFFSET:
        m = _per_block(q, q.zero).double() + low * d
    elif zero is Zero.NONE:
        signed = codes
    else:
        z = _per_block(q, q.zero).short()
        signed, m = codes - z[:, None], (low - z).double() * d
        low, high = int(signed.min()), int(signed.max())
    for name in BY_SIZE:
        bits = SIGNED.get(name)
        if bits and signed is not None and -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1):
            yield KINDS[name], signed + 2 ** (bits - 1), None
        if name in OFFSET and m is not None and grid.bits <= OFFSET[name]:
            yield KINDS[name], codes - int(grid.min), m


def _two_levels(q: QTensor, kind: Kind, what: str) -> Blocks:
    """A K-quant, whose every part is a field already."""
    steps, least = {}, {}
    for part, into, sign in ((q.scale, steps, 1), (q.zero, least, -1)):
        if part is None:
            continue
        into["d"], wrong = _half(sign * part.scale.reshape(-1))
        if wrong:
            raise InputError(
                f"{what} cannot go into a GGUF as it is: {wrong} of its steps of steps are no float16 numbers"
            )
        fields = part.format.grid.to_unsigned(part.codes)
        into["fields"] = fields.reshape(-1, kind.size // kind.group).numpy()
    return Blocks(
        fields=_fields(q, kind), d=steps["d"], s=steps["fields"], m=least.get("d"), mins=least.get("fields")
    )


def _fields(q: QTensor, kind: Kind) -> np.ndarray:
    return q.format.grid.to_unsigned(q.codes).reshape(-1, kind.size).numpy()


def _level(fmt: Format, fields: np.ndarray, unit: np.ndarray, shape: tuple[int, ...]) -> QTensor:
    codes = fmt.grid.from_unsigned(_tensor(fields)).reshape(shape)
    scale = _tensor(unit).reshape(tuple(fmt.block.scale_shape(shape)))
    return QTensor(codes=codes, scale=scale, zero=None, format=fmt, shape=torch.Size(shape))


def _half(x: Tensor) -> tuple[np.ndarray, int]:
    """``x`` as float16, and how many of its elements are not the same number there."""
    half = x.half()
    return half.numpy(), int((half.double() != x.double()).sum())


def _plain(w: Tensor) -> tuple[str, np.ndarray]:
    name = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[w.dtype]
    return name, w.contiguous().view(torch.uint8).numpy()


def _tensor(a: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(a))
