"""Floats: bit for bit what torch and ml_dtypes hold, over all encodings and a dense sweep of float32."""

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

from fewbit.grid import by_name
from fewbit.grid.floating import FLOATS, Float

ML = {
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e8m0": ml_dtypes.float8_e8m0fnu,
}
IN_TORCH = [grid for grid in FLOATS if grid.torch_dtype is not None]


def grids(names):
    return pytest.mark.parametrize("grid", [by_name(n) for n in names], ids=str)


@pytest.fixture(scope="module")
def sweep():
    """4.2 million float32: every leading 20 bits (all signs, exponents, 11 fraction bits, NaN and Inf among
    them), followed by nothing, the least bit, one half and all ones."""
    top = torch.arange(2**20, dtype=torch.int64) << 12
    low = torch.tensor([0, 1, 0x800, 0xFFF])
    return (top[:, None] | low).flatten().to(torch.int32).view(torch.float32)


def midpoints(grid):
    """Every midpoint of neighbouring finite values with its float32 neighbours, [3 n]."""
    values = grid.value(grid.codes(), torch.float64)
    points = torch.unique(values[values.isfinite()] + 0.0)
    middle = ((points[1:] + points[:-1]) / 2).float()
    up, down = (torch.nextafter(middle, torch.tensor(s * math.inf)) for s in (1, -1))
    return torch.cat([middle, up, down])


def cast(x, grid):
    """The bit patterns that ml_dtypes (numpy for float16) makes of float32."""
    with np.errstate(invalid="ignore", over="ignore"):
        array = x.numpy().astype(ML[grid.name])
    return torch.from_numpy(array.view(np.uint8 if array.dtype.itemsize == 1 else np.int16).copy())


def assert_same_codes(grid, got, want):
    """Equal bit patterns, or both NaN."""
    differ = got != want
    assert bool(grid.value(got[differ]).isnan().all())
    assert bool(grid.value(want[differ]).isnan().all())


# All encodings


@grids(ML)
def test_every_encoding_decodes_as_in_ml_dtypes(grid):
    codes = grid.codes()
    with np.errstate(invalid="ignore"):
        want = codes.numpy().view(ML[grid.name]).astype(np.float64)
    got = grid.value(codes, torch.float64).numpy()
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got[~np.isnan(got)]), np.signbit(want[~np.isnan(want)]))


@pytest.mark.parametrize("grid", [g for g in IN_TORCH if g.bits <= 16], ids=str)
def test_every_encoding_decodes_as_in_torch(grid):
    codes = grid.codes()
    for got in (grid.value(codes), grid._decode(codes).float()):
        want = codes.view(grid.torch_dtype).float()
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got.signbit()[~got.isnan()], want.signbit()[~want.isnan()])


@pytest.mark.parametrize(
    ("name", "top", "normal", "subnormal", "epsilon", "distinct"),
    [
        ("fp32", 3.4028234663852886e38, 2.0**-126, 2.0**-149, 2.0**-23, 2**32 - 2**25 + 1 + 2**24 - 2),
        ("tf32", 3.4011621342146535e38, 2.0**-126, 2.0**-136, 2.0**-10, 2 * 255 * 2**10 - 1),
        ("bf16", 3.3895313892515355e38, 2.0**-126, 2.0**-133, 2.0**-7, 2 * 255 * 2**7 - 1),
        ("fp16", 65504.0, 2.0**-14, 2.0**-24, 2.0**-10, 2 * 31 * 2**10 - 1),
        ("e4m3fn", 448.0, 2.0**-6, 2.0**-9, 2.0**-3, 253),
        ("e5m2", 57344.0, 2.0**-14, 2.0**-16, 2.0**-2, 247),
        ("e4m3fnuz", 240.0, 2.0**-7, 2.0**-10, 2.0**-3, 255),
        ("e5m2fnuz", 57344.0, 2.0**-15, 2.0**-17, 2.0**-2, 255),
        ("e3m2", 28.0, 0.25, 0.0625, 0.25, 63),
        ("e2m3", 7.5, 1.0, 0.125, 0.125, 63),
        ("e2m1", 6.0, 1.0, 0.5, 0.5, 15),
        ("e2m1-ieee", 3.0, 1.0, 0.5, 0.5, 11),
        ("e8m0", 2.0**127, 2.0**-127, None, 1.0, 255),
        ("ue4m3", 448.0, 2.0**-6, 2.0**-9, 2.0**-3, 127),
    ],
)
def test_published_limits(name, top, normal, subnormal, epsilon, distinct):
    d = by_name(name).describe()
    assert (d.max, d.min_normal, d.smallest_subnormal, d.epsilon) == (top, normal, subnormal, epsilon)
    assert d.distinct == distinct


def test_four_bit_values():
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]
    e2m1, ieee = by_name("e2m1"), by_name("e2m1-ieee")
    assert e2m1.value(e2m1.codes()).tolist() == [*positive, 4, 6, *(-v for v in positive), -4, -6]
    assert ieee.value(ieee.codes())[:7].tolist() == [*positive, math.inf]
    assert math.isnan(ieee.value(ieee.codes())[7])
    assert by_name("e2m1-reallocated") is e2m1


# Rounding


@grids(ML)
def test_rounding_is_that_of_ml_dtypes_inside_the_range(grid, sweep):
    x = torch.cat([sweep, midpoints(grid)])
    x = x[(x >= grid.min) & (x <= grid.max) | x.isnan()] if grid.bits >= 8 else x[x.abs() <= grid.max]
    want = cast(x, grid)
    assert_same_codes(grid, grid.round(x), want)
    assert_same_codes(grid, grid._encode(x), want)


@grids([g for g in ML if by_name(g).bits >= 8])
def test_overflow_is_that_of_ml_dtypes_without_saturation(grid, sweep):
    grid = replace(grid, saturate=False)
    x = torch.cat([sweep, midpoints(grid), torch.tensor([464.0, 464.01, 61439.0, 61440.0, 248.0, 247.99])])
    want = cast(x, grid)
    assert_same_codes(grid, grid.round(x), want)
    assert_same_codes(grid, grid._encode(x), want)


@grids(["e3m2", "e2m3", "e2m1"])
def test_overflow_of_formats_without_specials_is_that_of_ml_dtypes(grid, sweep):
    x = torch.cat([sweep[~sweep.isnan()], midpoints(grid)])
    assert torch.equal(grid.round(x), cast(x, grid))
    assert grid.value(grid.round(torch.tensor([math.nan]))).tolist() == [0.0]


@pytest.mark.parametrize("grid", IN_TORCH, ids=str)
def test_the_definition_is_torchs_cast_inside_the_range(grid, sweep):
    x = torch.cat([sweep, midpoints(grid) if grid.bits <= 16 else sweep[:0]])
    x = x[(x >= grid.min) & (x <= grid.max) | x.isnan()]
    want = x.to(grid.torch_dtype).view(grid.code_dtype)
    assert_same_codes(grid, grid._encode(x), want)
    assert_same_codes(grid, grid.round(x), want)


@pytest.mark.parametrize("grid", FLOATS, ids=str)
def test_the_fast_paths_equal_the_definition(grid, sweep):
    x = sweep[::5]
    for g in (grid, replace(grid, saturate=False) if grid.describe().specials[-1:] == ("nan",) else grid):
        got, want = g.round(x), g._encode(x)
        if g.bits <= 8:
            assert torch.equal(got, want)  # the codes of NaN too
        else:
            assert_same_codes(g, got, want)


def test_tf32_rounds_the_float32_pattern_to_even(sweep):
    grid = by_name("tf32")
    x = sweep[sweep.abs() <= grid.max]
    u = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    want = (u + 0xFFF + ((u >> 13) & 1)) >> 13
    assert torch.equal(grid.round(x).to(torch.int64), want)
    assert torch.equal(grid.value(grid.round(x)).view(torch.int32), (want << 13).to(torch.int32))


def test_ue4m3_is_e4m3fn_without_sign(sweep):
    u, e = by_name("ue4m3"), by_name("e4m3fn")
    x = sweep[~sweep.signbit()]
    assert torch.equal(u.round(x), e.round(x))
    assert u.codes().tolist() == list(range(128))
    assert u.bits == 8
    assert u.round(torch.tensor([-0.0, -1e-9, -5.0, -math.inf])).tolist() == [0, 0, 0, 0]
    assert replace(u, saturate=False).round(torch.tensor([-0.0, -1.0, 500.0])).tolist() == [0, 127, 127]


def test_e8m0_has_neither_zero_nor_sign():
    grid = by_name("e8m0")
    assert grid.value(grid.codes(), torch.float64)[:255].tolist() == [2.0 ** (c - 127) for c in range(255)]
    x = torch.tensor([0.0, -0.0, -3.0, 1e-45, 2.0**-127, 1.0, 1.5, 3.0, 0.75, 2.9, math.inf, math.nan])
    # Half-way goes up: the significand 1 x 2^(e+1) is the even one of 1 x 2^e and 2 x 2^e.
    assert grid.round(x).tolist() == [0, 0, 0, 0, 0, 127, 128, 129, 127, 128, 254, 255]
    # Between the two smallest values torch and ml_dtypes round up whatever the distance.
    tiny = torch.tensor([2.0**-127, 2.0**-127 * 1.001, 2.0**-127 * 1.999, 2.0**-126], dtype=torch.float64)
    assert grid.round(tiny).tolist() == grid.round(tiny.float()).tolist() == [0, 1, 1, 1]
    strict = replace(grid, saturate=False)
    assert strict.round(x).tolist() == [255, 255, 255, 0, 0, 127, 128, 129, 127, 128, 255, 255]


@pytest.mark.parametrize("grid", [g for g in FLOATS if 4 <= g.bits <= 16 and g.mantissa_bits], ids=str)
def test_midpoints_go_to_the_even_code(grid):
    n = len(midpoints(grid)) // 3
    middle = midpoints(grid)[:n]
    assert bool((grid.round(middle) & 1 == 0).all())


def test_published_ties():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.01])
    e2m1 = by_name("e2m1")
    assert e2m1.value(e2m1.round(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
    e4m3fn = by_name("e4m3fn")
    x = torch.tensor([17.0, 19.0, 464.0, 1e6, -1e6])
    assert e4m3fn.value(e4m3fn.round(x)).tolist() == [16, 20, 448, 448, -448]
    ieee = replace(by_name("e2m1-ieee"), saturate=False)
    assert ieee.value(ieee.round(torch.tensor([3.49, 3.5, -9.0]))).tolist() == [3, math.inf, -math.inf]


def test_signed_zero_and_underflow():
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30])
    for name in ("fp16", "e4m3fn", "e5m2", "e3m2", "e2m3", "e2m1", "e2m1-ieee"):
        grid = by_name(name)
        sign = 2 ** (grid.bits - 1)
        assert grid.to_unsigned(grid.round(x)).tolist() == [0, sign, 0, sign], name
    for name in ("e4m3fnuz", "e5m2fnuz"):
        assert by_name(name).round(x).tolist() == [0, 0, 0, 0]


def test_nan_stays_nan_where_there_is_one():
    x = torch.tensor([math.nan, -math.nan])
    for grid in FLOATS:
        for dtype in (torch.float32, torch.float16, torch.float64):
            got = grid.value(grid.round(x.to(dtype)))
            assert bool(got.isnan().all()) == ("nan" in grid.describe().specials), grid.name
            assert bool(got.isnan().any()) == ("nan" in grid.describe().specials), grid.name


def test_a_new_format_is_one_row():
    """QLoRA's FP4 E3M0: signed powers of two and zero."""
    grid = Float(name="e3m0", exponent_bits=3, mantissa_bits=0, bias=3)
    assert grid.value(grid.codes())[:8].tolist() == [0, 0.25, 0.5, 1, 2, 4, 8, 16]
    x = torch.tensor([0.12, 0.13, 1.4, 1.5, 2.9, 3.0, -20.0, 1e9])
    assert grid.value(grid.round(x)).tolist() == [0, 0.25, 1, 2, 2, 4, -16, 16]


def test_four_bits_without_specials_spend_them_on_steps_or_on_range():
    """The three ways to split three magnitude bits: even steps, OCP's FP4, and powers of two."""
    held = {"e1m2": (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5), "e2m1": (0, 0.5, 1, 1.5, 2, 3, 4, 6)}
    held["e3m0"] = (0, 0.25, 0.5, 1, 2, 4, 8, 16)
    for name, magnitudes in held.items():
        grid = by_name(name)
        assert grid.value(grid.codes())[:8].tolist() == list(magnitudes), name
        assert grid.bits == 4
