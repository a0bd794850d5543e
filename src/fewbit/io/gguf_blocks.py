"""The bytes of ggml's blocks: what numbers a block of a GGUF file holds and where each of its bits lies.

A block of 32 or 256 neighbours in a row holds unsigned fields q and a float16 d, and as its type has it an
offset or a second level of steps s and offsets m, a pair for every 16 or 32 elements:

    Q4_0 Q5_0 Q8_0    x = d (q - 2^(b-1))          Q4_1 Q5_1         x = d q + m
    Q3_K Q6_K         x = d s (q - 2^(b-1))        Q2_K Q4_K Q5_K    x = d s q - dmin m
    MXFP4             x = 2^(e - 127) E2M1(q)

Fields are cut into bits that stand together: those of elements i, i + run, i + 2 run ... share a byte, lowest
first. With that one rule a type is a row of data: which parts follow each other in its block.

Layout: ggml's ``block_q*`` (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h). Legend: n
blocks; fields [n, 32 or 256] uint8; d, m [n] float16; s, mins [n, 8 or 16]; bytes [n, size] uint8.

Road not taken: ``gguf.quants``, which decodes to float only and encodes no K-quant.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bits:
    """``count`` bits of every field from bit ``shift`` on; a byte holds elements ``run`` apart."""

    shift: int
    count: int
    run: int


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A ggml type: elements of a block and of a group, and the parts of a block in their order.

    Parts are `Bits`, "d", "m" (float16), "e" (one byte) and "steps" (second level, packed as ``pack_steps``).
    ``step_bits``: of the second level, 0 without one.
    """

    name: str
    parts: tuple
    size: int = 32
    group: int = 32
    step_bits: int = 0


_NIBBLES, _PAIRS = Bits(0, 4, 16), Bits(0, 2, 32)
KINDS = {
    kind.name: kind
    for kind in (
        Kind(name="Q8_0", parts=("d", Bits(0, 8, 1))),
        Kind(name="Q4_0", parts=("d", _NIBBLES)),
        Kind(name="Q4_1", parts=("d", "m", _NIBBLES)),
        Kind(name="Q5_0", parts=("d", Bits(4, 1, 1), _NIBBLES)),
        Kind(name="Q5_1", parts=("d", "m", Bits(4, 1, 1), _NIBBLES)),
        Kind(name="MXFP4", parts=("e", _NIBBLES)),
        Kind(name="Q2_K", parts=("steps", _PAIRS, "d", "m"), size=256, group=16, step_bits=4),
        Kind(name="Q3_K", parts=(Bits(2, 1, 32), _PAIRS, "steps", "d"), size=256, group=16, step_bits=6),
        Kind(name="Q4_K", parts=("d", "m", "steps", Bits(0, 4, 32)), size=256, step_bits=6),
        Kind(name="Q5_K", parts=("d", "m", "steps", Bits(4, 1, 32), Bits(0, 4, 32)), size=256, step_bits=6),
        Kind(
            name="Q6_K", parts=(Bits(0, 4, 64), Bits(4, 2, 32), "steps", "d"), size=256, group=16, step_bits=8
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """What ``n`` blocks of one type hold, see the module's legend; what the type lacks is None.

    ``m`` is the offset of Q4_1 and Q5_1 and dmin of the K-quants; ``s`` are the steps of the second level as
    unsigned fields (offset binary where they have a sign); ``e`` [n] uint8 are MXFP4's exponents.
    """

    fields: np.ndarray
    d: np.ndarray | None = None
    m: np.ndarray | None = None
    e: np.ndarray | None = None
    s: np.ndarray | None = None
    mins: np.ndarray | None = None


def pack(kind: Kind, blocks: Blocks) -> np.ndarray:
    """The bytes of the blocks, uint8 [n, bytes of a block]."""
    out = []
    for part in kind.parts:
        if isinstance(part, Bits):
            top = 0x80 if kind.name == "Q8_0" else 0  # two's complement there, offset binary elsewhere
            out.append(_gather((blocks.fields ^ top) >> part.shift, part.count, part.run))
        elif part == "steps":
            out.append(_pack_steps(kind, blocks.s, blocks.mins))
        elif part == "e":
            out.append(blocks.e[:, None])
        else:
            out.append(np.ascontiguousarray(getattr(blocks, part))[:, None].view(np.uint8))
    return np.concatenate(out, 1)


def unpack(kind: Kind, raw: np.ndarray) -> Blocks:
    """Inverse of ``pack``; every pattern of bytes has a meaning."""
    got, at = {"fields": 0}, 0
    for part in kind.parts:
        width = _width(kind, part)
        piece, at = np.ascontiguousarray(raw[:, at : at + width]), at + width
        if isinstance(part, Bits):
            got["fields"] = got["fields"] | _scatter(piece, part.count, part.run) << np.uint8(part.shift)
        elif part == "steps":
            got["s"], got["mins"] = _unpack_steps(kind, piece)
        else:
            got[part] = piece[:, 0] if part == "e" else piece.view(np.float16)[:, 0]
    if kind.name == "Q8_0":
        got["fields"] = got["fields"] ^ np.uint8(0x80)
    return Blocks(**got)


def block_bytes(kind: Kind) -> int:
    """Bytes of one block."""
    return sum(_width(kind, part) for part in kind.parts)


def _width(kind: Kind, part) -> int:
    if isinstance(part, Bits):
        return kind.size * part.count // 8
    return {"d": 2, "m": 2, "e": 1}.get(part, 16 if kind.step_bits in (4, 8) else 12)


def _gather(fields: np.ndarray, bits: int, run: int) -> np.ndarray:
    """The low ``bits`` of fields [n, k] in bytes [n, k bits / 8]."""
    n, per = len(fields), 8 // bits
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    low = fields.astype(np.uint8).reshape(n, -1, per, run) & np.uint8(2**bits - 1)
    return np.bitwise_or.reduce(low << shifts, axis=2).reshape(n, -1)


def _scatter(packed: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Inverse of ``_gather``."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = packed.reshape(len(packed), -1, 1, run) >> shifts & np.uint8(2**bits - 1)
    return fields.reshape(len(packed), -1)


def _pack_steps(kind: Kind, s: np.ndarray, mins: np.ndarray | None) -> np.ndarray:
    """The second level: int8, a nibble each, or six bits in three ways of ggml's own."""
    if kind.name == "Q6_K":
        return s ^ np.uint8(0x80)
    if kind.name == "Q2_K":
        return s | mins << 4
    if kind.name == "Q3_K":
        return np.concatenate([_gather(s, 4, 8), _gather(s >> 4, 2, 4)], 1)
    high = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (s, mins)]
    return np.concatenate([*high, s[:, 4:] & 15 | mins[:, 4:] << 4], 1)


def _unpack_steps(kind: Kind, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Inverse of ``_pack_steps``."""
    if kind.name == "Q6_K":
        return raw ^ np.uint8(0x80), None
    if kind.name == "Q2_K":
        return raw & 15, raw >> 4
    if kind.name == "Q3_K":
        return _scatter(raw[:, :8], 4, 8) | _scatter(raw[:, 8:], 2, 4) << 4, None
    s, mins, rest = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    s = np.concatenate([s & 63, rest & 15 | s >> 6 << 4], 1)
    return s, np.concatenate([mins & 63, rest >> 4 | mins >> 6 << 4], 1)
