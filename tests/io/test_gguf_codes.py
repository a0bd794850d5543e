"""Claims: ggml's blocks hold our codes bit for bit, and what they cannot hold is refused, never rounded."""

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from quantized import same_qtensor

from fewbit.errors import InputError
from fewbit.format import BF16, FORMATS, FP16, FP32, Channel, Format, Group, MinMax, PerTensor, Zero
from fewbit.grid import Int, by_name
from fewbit.io.gguf_blocks import KINDS, block_bytes, pack, unpack
from fewbit.io.gguf_codes import decode, encode, holds, settled

ALL = pytest.mark.parametrize("name", KINDS)


def gauss(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def type_of(name):
    return gguf.GGMLQuantizationType[name]


def random_bytes(name, rows=32, blocks=3):
    """Bytes in which everything is random but for d and m, which are finite."""
    kind, rng = KINDS[name], np.random.default_rng(1)
    got = unpack(kind, rng.integers(0, 256, (rows * blocks, block_bytes(kind)), dtype=np.uint8))
    halves = {
        p: rng.standard_normal(rows * blocks).astype(np.float16) for p in "dm" if getattr(got, p) is not None
    }
    if got.e is not None:
        halves["e"] = rng.integers(0, 255, rows * blocks, dtype=np.uint8)  # 255 is NaN
    return pack(kind, dataclasses.replace(got, **halves)).reshape(rows, -1), (rows, blocks * kind.size)


@ALL
def test_random_bytes_decode_as_in_gguf_and_come_back(name):
    raw, shape = random_bytes(name)
    assert (KINDS[name].size, block_bytes(KINDS[name])) == gguf.GGML_QUANT_SIZES[type_of(name)]
    q = decode(name, raw, shape)
    assert np.array_equal(q.dequantize().numpy(), dequantize(raw, type_of(name)))
    kind, back = encode(q)
    assert kind == name == settled(q.format)
    assert np.array_equal(back, raw)


@ALL
def test_round_trip_code_for_code(name):
    q = FORMATS[name.lower()].quantize(gauss(24, 512))
    kind, raw = encode(q)
    assert kind == name
    assert raw.shape == (24, 512 // KINDS[name].size * block_bytes(KINDS[name]))
    assert same_qtensor(decode(kind, raw, (24, 512)), q)
    assert np.array_equal(q.dequantize().numpy(), dequantize(raw, type_of(name)))
    assert 8 * raw.size / q.codes.numel() == q.bits_per_weight


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_bytes_are_those_of_ggmls_own_rounding(name):
    """On values of the grid, where its codes from unrounded steps and ours from stored ones are the same."""
    x = FORMATS[name.lower()].quantize(gauss(64, 512, seed=3)).dequantize()
    _, raw = encode(FORMATS[name.lower()].quantize(x))
    assert np.array_equal(raw, quantize(x.numpy(), type_of(name)))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
def test_never_worse_than_ggmls_own_rounding(name):
    x = gauss(256, 512, seed=4)
    theirs = torch.from_numpy(dequantize(quantize(x.numpy(), type_of(name)), type_of(name)))
    ours = FORMATS[name.lower()].quantize(x).dequantize()
    assert (ours - x).square().mean() <= 1.0001 * (theirs - x).square().mean()


WIDER = {
    "int4 per 64, bf16 steps": (Format(grid=Int(4), block=Group(64), scale=BF16), "Q4_0"),
    "int3 per 128": (Format(grid=Int(3), block=Group(128), scale=FP16), "Q4_0"),
    "int5 per row": (Format(grid=Int(5), block=Channel(), scale=FP16), "Q5_0"),
    "int6 per 32": (Format(grid=Int(6), block=Group(32), scale=FP16), "Q8_0"),
    "int8 per row": (Format(grid=Int(8), block=Channel(), scale=FP16), "Q8_0"),
    "int8 per tensor": (Format(grid=Int(8), block=PerTensor(), scale=BF16), "Q8_0"),
    "uint3 with offset": (
        Format(grid=Int(3, signed=False), block=Group(64), zero=Zero.OFFSET, range=MinMax(), scale=FP16),
        "Q4_1",
    ),
    "uint4 with zero": (
        Format(grid=Int(4, signed=False), block=Group(64), zero=Zero.INTEGER, range=MinMax(), scale=FP16),
        "Q5_0",
    ),
    "uint7 with zero": (
        Format(grid=Int(7, signed=False), block=Group(64), zero=Zero.INTEGER, range=MinMax(), scale=FP16),
        "Q8_0",
    ),
    "mxfp4 per 64": (dataclasses.replace(FORMATS["mxfp4"], block=Group(64)), "MXFP4"),
    "bf16": (Format(grid=by_name("bf16")), "BF16"),
    "fp16": (Format(grid=by_name("fp16")), "F16"),
}


@pytest.mark.parametrize("what", WIDER)
def test_other_formats_fit_without_rounding(what):
    fmt, kind = WIDER[what]
    q = fmt.quantize(gauss(16, 256))
    assert holds(fmt) is None
    got, raw = encode(q)
    assert got == kind
    assert np.array_equal(dequantize(raw, type_of(kind)), q.dequantize().numpy())


def test_an_integer_zero_becomes_an_offset_where_that_is_exact():
    """Steps that are powers of two make every -z s a float16 number: Q4_1, in fewer bits than Q5_0."""
    fmt = Format(grid=Int(4, signed=False), block=Group(32), zero=Zero.INTEGER, range=MinMax(), scale=FP16)
    q = fmt.quantize(gauss(8, 64))
    scale = q.scale.float().log2().round().exp2().half()
    q = dataclasses.replace(q, scale=scale)
    kind, raw = encode(q)
    assert kind == "Q4_1"
    assert np.array_equal(dequantize(raw, type_of(kind)), q.dequantize().numpy())
    centred = dataclasses.replace(q, zero=torch.full_like(q.zero, 8))
    assert encode(centred)[0] == "Q4_0"


REFUSED = {
    "nf4": (FORMATS["nf4"], "nf4 with fp32 steps is none of them"),
    "nvfp4": (FORMATS["nvfp4"], "e2m1 with"),
    "fp8": (Format(grid=by_name("e4m3fn"), block=Channel(), scale=FP32), "e4m3fn"),
    "groups of 16": (Format(grid=Int(4), block=Group(16), scale=FP16), "hold 32 neighbours"),
    "float zeros": (
        Format(grid=Int(4), block=Group(32), zero=Zero.FLOAT, range=MinMax(), scale=FP16),
        "no float zeros",
    ),
    "offsets under 6 bits": (
        Format(grid=Int(6, signed=False), block=Group(32), zero=Zero.OFFSET, range=MinMax(), scale=FP16),
        "4 or 5 bits, not 6",
    ),
    "uint8": (Format(grid=Int(8, signed=False), block=Group(32), scale=FP16), "widest field of a GGUF 127"),
    "steps in powers of two": (Format(grid=Int(4), block=Group(32), scale=FORMATS["mxfp4"].scale), "e8m0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_block_cannot_hold_is_refused_with_the_reason(what):
    fmt, reason = REFUSED[what]
    assert reason in holds(fmt)
    with pytest.raises(InputError, match="layer q cannot go into a GGUF as it is"):
        encode(fmt.quantize(gauss(4, 64).abs()), "layer q")


def test_numbers_that_do_not_fit_are_refused_too():
    float32 = Format(grid=Int(4), block=Group(32), scale=FP32)
    assert holds(float32) is None  # it depends on the steps
    with pytest.raises(
        InputError, match="8 of its 8 steps are no float16 numbers; quantize it with scale=fp16"
    ):
        encode(float32.quantize(gauss(4, 64)))
    wide = Format(grid=Int(8, signed=False), block=Group(32), zero=Zero.INTEGER, range=MinMax(), scale=FP16)
    with pytest.raises(InputError, match="wider than 8 bits"):
        encode(wide.quantize(gauss(4, 64) + 1))
    with pytest.raises(InputError, match="its 48 columns are no whole blocks of 32"):
        encode(Format(grid=Int(4), block=Channel(), scale=FP16).quantize(gauss(4, 48)))
    with pytest.raises(InputError, match="group size 8 does not divide the 18 input columns of the steps"):
        FORMATS["q4_k"].quantize(gauss(4, 576))
