"""The block formats of the literature by name: each a composition of grid, block, range rule and scale.

    name            element x step                                      bits  source
    nf4, fp4-bnb    table x FP32 per 64 in memory order                 4.5   QLoRA
    ...-dq          the steps in 8 bits less their mean, per 256        4.127
    mxfp8/6/4       float x E8M0 per 32                                 8.25, 6.25, 4.25   OCP MX v1.0
    mxint8          q1.6 x E8M0 per 32                                  8.25
    nvfp4           E2M1 x (UE4M3 x FP32 per tensor) per 16             4.5   NVIDIA
    mx9, mx6, mx4   int x ({1/2, 1} per 2 x E8M0 per 16)                9, 6, 4   shared microexponents
    msfp16 ... 12   int x E8M0 per 16: classic block floating point     8.5 ... 4.5   Microsoft floating point
    qoq             uint4 with zero x (uint8 per 128 x FP16 per row)    4.094 + 16 / columns   QServe
    q8_0, q5_0, q4_0    int x FP16 per 32                               8.5, 5.5, 4.5   ggml (GGUF files)
    q5_1, q4_1      uint x FP16 + FP16 per 32                           6, 5    ggml
    q6_k, q3_k      int x (int8, int6 x FP16 per 256) per 16            6.5625, 3.4375   ggml
    q5_k, q4_k      uint x and + (uint6 x FP16 per 256) per 32          5.5, 4.5   ggml
    q2_k            uint2 x and + (uint4 x FP16 per 256) per 16         2.625   ggml

QLoRA: https://arxiv.org/abs/2305.14314; MX: https://arxiv.org/abs/2310.10537; shared microexponents ("A
Little Shifting Goes a Long Way", not OCP's MX in spite of the names): https://arxiv.org/abs/2302.08007;
QServe: https://arxiv.org/abs/2405.04532; ggml: https://github.com/ggml-org/ggml. The OCP names mean its floor
rule; "-even", "-ceil" and "-rceil" after them choose another `Scaling`.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from types import MappingProxyType

from fewbit.errors import InputError
from fewbit.format.block import Channel, Flat, Group, PerTensor
from fewbit.format.fit import MinMax, PowerOfTwo, Progressive, Scaling
from fewbit.format.format import Divisor, Format, Zero
from fewbit.format.leastsquares import LeastSquares
from fewbit.grid import Int, by_name

FP32 = Format(grid=by_name("fp32"))
FP16 = Format(grid=by_name("fp16"))
BF16 = Format(grid=by_name("bf16"))
E8M0 = Format(grid=by_name("e8m0"))
# NVFP4's scales: E4M3 over one float32 scale for the tensor.
E4M3_OVER_FP32 = Format(grid=by_name("ue4m3"), block=PerTensor(), scale=FP32)
# QLoRA's double quantization as bitsandbytes does it: scales less their mean in 8 bits, blocks of 256.
DOUBLE_QUANT = Format(grid=by_name("dynamic8"), block=Flat(256), zero=Zero.MEAN, scale=FP32)
SCALES = (FP32, FP16, BF16, E8M0, E4M3_OVER_FP32, DOUBLE_QUANT)


def bitsandbytes(table: str, *, block: int = 64, double: bool = False) -> Format:
    """A 4-bit table ("nf4", "fp4-bnb", "af4") over blocks that ignore rows, with plain or quantized steps."""
    return Format(grid=by_name(table), block=Flat(block), scale=DOUBLE_QUANT if double else FP32)


def mx(element: str, *, rule: Scaling = Scaling.FLOOR, block: int = 32) -> Format:
    """OCP microscaling: elements of any grid and one power of two for ``block`` of them."""
    return Format(grid=by_name(element), block=Group(block), range=PowerOfTwo(rule=rule), scale=E8M0)


def nvfp4(*, block: int = 16) -> Format:
    """E2M1 elements, an E4M3 step per 16, one float32 per tensor that makes the largest step 448."""
    return Format(grid=by_name("e2m1"), block=Group(block), scale=E4M3_OVER_FP32)


def block_floating_point(magnitude_bits: int, *, block: int = 16) -> Format:
    """Sign and ``magnitude_bits`` bits under one shared exponent: step 2^(floor(log2 max|x|) - m + 1)."""
    grid = Int(magnitude_bits + 1, narrow=True)
    return Format(grid=grid, block=Group(block), range=PowerOfTwo(), scale=E8M0)


def microexponents(magnitude_bits: int) -> Format:
    """MX9, MX6 and MX4: 16 elements share an exponent, each pair of them one bit that halves its step."""
    pairs = Format(grid=by_name("micro1"), block=Group(8), range=PowerOfTwo(), scale=E8M0)
    grid = Int(magnitude_bits + 1, narrow=True)
    return Format(grid=grid, block=Group(2), range=PowerOfTwo(), scale=pairs)


def progressive(*, group: int = 128, protect: int = 119) -> Format:
    """QoQ's W4 over W8: 4-bit groups whose steps are whole multiples of an 8-bit row's step."""
    steps = Format(grid=Int(8, signed=False), block=Channel(), range=Progressive(protect=protect), scale=FP16)
    grid = Int(4, signed=False)
    return Format(grid=grid, block=Group(group), range=MinMax(), zero=Zero.INTEGER, scale=steps)


def ggml(bits: int, *, symmetric: bool, group: int = 32, step_bits: int = 0) -> Format:
    """Integers under a float16 step, and if not symmetric an offset, per ``group``.

    With ``step_bits`` (K-quants) these are whole units themselves, of one float16 per 256 weights, and are
    searched as ggml does it; the blocks of 32 fit their largest element.
    """
    rule = {"range": MinMax(), "divisor": Divisor.SIGNED}
    steps = Format(grid=Int(step_bits or 8, signed=symmetric), block=Group(256 // group), scale=FP16, **rule)
    rule |= {"block": Group(group), "scale": steps if step_bits else FP16}
    rule |= {"range": LeastSquares(weighted=False) if step_bits else MinMax()}
    if not symmetric:
        rule |= {"zero": Zero.OFFSET, "offsets": steps if step_bits else None}
    return Format(grid=Int(bits, signed=symmetric), **rule)


def _all() -> dict[str, Format]:
    found = {}
    for table in ("nf4", "af4", "fp4-bnb"):
        found[table] = bitsandbytes(table)
        found[f"{table}-dq"] = bitsandbytes(table, double=True)
    elements = {
        "mxfp8-e4m3": "e4m3fn", "mxfp8-e5m2": "e5m2", "mxfp6-e2m3": "e2m3", "mxfp6-e3m2": "e3m2",
        "mxfp4": "e2m1", "mxint8": "q1.6",
    }  # fmt: skip
    for name, element in elements.items():
        for rule in Scaling:
            found[name if rule is Scaling.FLOOR else f"{name}-{rule}"] = mx(element, rule=rule)
    found["nvfp4"] = nvfp4()
    found |= {f"mx{m + 2}": microexponents(m) for m in (7, 4, 2)}
    found |= {name: block_floating_point(m) for name, m in zip(_MSFP, (7, 5, 4, 3), strict=True)}
    found["qoq"] = progressive()
    found["q8_0"] = Format(grid=Int(8), block=Group(32), scale=FP16)
    for b in (4, 5):
        found |= {f"q{b}_0": ggml(b, symmetric=True), f"q{b}_1": ggml(b, symmetric=False)}
        found[f"q{b}_k"] = ggml(b, symmetric=False, step_bits=6)
    for b, step_bits in ((2, 4), (3, 6), (6, 8)):
        found[f"q{b}_k"] = ggml(b, symmetric=b > 2, group=16, step_bits=step_bits)
    return found


_MSFP = ("msfp16", "msfp14", "msfp13", "msfp12")
FORMATS = MappingProxyType(_all())


def find_format(name: str) -> Format | None:
    """The block format of that name, or None; "-g64" after it sets the block: "qoq-g64", "mxfp4-even-g16"."""
    key = name.lower()
    base, dash, size = key.rpartition("-g")
    if dash and size.isdigit() and base in FORMATS:
        return replace(FORMATS[base], block=replace(FORMATS[base].block, size=int(size)))
    return FORMATS.get(key)


def format_by_name(name: str) -> Format:
    """`find_format`, but raises ``InputError`` that lists near names when there is none."""
    found = find_format(name)
    if found is None:
        near = difflib.get_close_matches(name.lower(), FORMATS, n=5, cutoff=0.4)
        remedy = f"did you mean {', '.join(near)}?" if near else "`fewbit formats` lists them"
        raise InputError(f"there is no block format named {name!r}; {remedy}")
    return found
