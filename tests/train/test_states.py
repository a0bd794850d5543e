"""Optimizer states in Formats: the tables, round trips, what stays positive, bytes, files."""

import io
import math

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import FP32, format_by_name
from fewbit.grid import by_name
from fewbit.train.states import (
    DYNAMIC4,
    DYNAMIC_UNSIGNED8,
    SIXTEENTHS,
    STATES,
    Held,
    States,
    one_step,
    per,
    quantize,
)

FORMATS = {f"{n}-{part}": f for n, s in STATES.items() for part, f in vars(s).items() if f is not None}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wide_v(n=20_000):
    """Squares that span eight decades, as second moments do."""
    return torch.pow(10.0, randn(n) * 2 - 12)


def test_the_dynamic_maps_are_those_of_the_paper():
    u = DYNAMIC_UNSIGNED8.values
    assert len(set(u)) == 256
    assert list(u) == sorted(u)
    assert (u[0], u[1], u[-1]) == (0, pytest.approx(3.25e-7), 1)
    magnitudes = (0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875)
    assert DYNAMIC4.values == pytest.approx((*(-v for v in reversed(magnitudes)), 0, *magnitudes, 1))
    assert SIXTEENTHS.values == tuple(i / 16 for i in range(1, 17))
    signed = by_name("dynamic8")
    assert (signed.min, signed.max, signed.least) == pytest.approx((-0.99296875, 1.0, 5.5e-7))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_what_is_stored_is_stored_again_without_change(fmt):
    x = randn(5, 700).abs() if fmt.grid.min > 0 or fmt.grid == DYNAMIC_UNSIGNED8 else randn(5, 700)
    held = Held(x, fmt)
    once = held.read().clone()
    held.write(once)
    assert torch.equal(held.read(), once)
    zeros = Held(torch.zeros(5, 700), fmt).read()
    assert zeros.max() < 1e-37  # exactly 0 where the grid holds 0


@pytest.mark.parametrize("table", ["dynamic8", DYNAMIC_UNSIGNED8, DYNAMIC4], ids=str)
def test_errors_are_half_a_gap_of_the_table_at_most(table):
    fmt = per(256, table)
    points = torch.tensor(sorted(fmt.grid.values), dtype=torch.float64)
    x = randn(4, 256).clamp(-1.9, 1.9)
    x[:, 0] = 2.0  # so that the whole table spans [-2, 2]
    x = x.abs() if fmt.grid.min == 0 else x
    unit = (x / 2).double()
    above = torch.bucketize(unit, points).clamp(1, len(points) - 1)
    error = (quantize(x, fmt).dequantize().double() - x).abs() / 2
    inside = unit >= points[0]
    assert (error <= points.diff()[above - 1] / 2 + 1e-7)[inside].all()


def test_the_signed_map_keeps_a_gaussian_as_published():
    x = randn(1000, 256)
    error = quantize(x, per(256, "dynamic8")).dequantize() - x
    assert 10 * math.log10(x.square().sum() / error.square().sum()) == pytest.approx(39.3, abs=0.2)


@pytest.mark.parametrize("name", [n for n, s in STATES.items() if s.second is not None])
def test_second_moments_above_zero_stay_above_zero(name):
    v = wide_v()
    v[::7] = 0
    held = Held(v, STATES[name].second, positive=True)
    assert (held.read()[v > 0] > 0).all()
    if name != "adamw-4bit":  # whose table has no zero
        assert (held.read()[v == 0] == 0).all()
    plain = quantize(v, STATES[name].second).dequantize()
    assert (plain[held.read() != plain] == 0).all()  # nothing else is moved


def test_scaled_fp16_holds_forty_binades_and_fp8_eighteen():
    """Why v in E4M3 under one step diverges, and in scaled FP16 does not."""
    v = torch.logspace(0, -50, 51, base=2.0)
    for grid, binades in (("fp16", 40), ("e4m3fn", 18)):
        kept = (quantize(v, one_step(grid)).dequantize() > 0).sum()
        assert kept - 1 == pytest.approx(binades, abs=1)


def test_steps_of_one_step_are_the_least_powers_of_two_that_saturate_nothing():
    for amax in (448.0, 449.0, 1e-12, 3e7, 0.0):
        x = torch.tensor([amax, -amax / 3])
        scale = quantize(x, one_step("e4m3fn")).scale
        assert torch.frexp(scale).mantissa == 0.5
        if amax:
            assert scale == 2.0 ** -math.floor(math.log2(448 / amax))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_make_their_block_nan_and_no_other(bad):
    x = randn(4, 256)
    x[1, 3] = bad
    for fmt in (one_step("e4m3fn"), per(256, "e4m3fn"), one_step("fp16")):
        got = quantize(x, fmt).dequantize().isnan()
        assert got.all() if got[0].any() else got[1].all() and got.sum() == 256


@pytest.mark.parametrize("name", STATES)
def test_bytes_are_those_of_the_table(name):
    states, n = STATES[name], 256 * 128
    bits = {"fp32": 32, "fp16": 16, "e4m3fn": 8, "dynamic8": 8, "dynamic-unsigned8": 8}
    for fmt in (states.first, states.second):
        held = Held(torch.ones(256, 128), fmt)
        each = 4 if fmt is None else bits.get(fmt.grid.name, 4) / 8
        assert held.codes.untyped_storage().nbytes() == n * each
        steps = 0 if fmt is None else 1 if fmt.block == one_step("fp16").block else n // fmt.block.size
        assert (0 if held.scale is None else held.scale.untyped_storage().nbytes()) == 4 * steps


@pytest.mark.parametrize("fmt", [None, *FORMATS.values()], ids=["fp32", *FORMATS])
def test_a_file_without_classes_gives_the_same_bits_back(fmt):
    held, file = Held(randn(9, 500).abs(), fmt, positive=True), io.BytesIO()
    torch.save(held.to_dict(), file)
    file.seek(0)
    other = Held(torch.zeros(9, 500), fmt, positive=True)
    other.load(torch.load(file, weights_only=True))
    assert torch.equal(other.codes, held.codes)
    assert torch.equal(other.read(), held.read())


def test_a_state_loads_into_another_format_by_value():
    x = randn(8, 256)
    held, eight = Held(x, None), Held(torch.zeros_like(x), per(256, "dynamic8"))
    eight.load(held.to_dict())
    assert torch.equal(eight.read(), quantize(x, per(256, "dynamic8")).dequantize())
    held.load(eight.to_dict())
    assert torch.equal(held.read(), eight.read())
    with pytest.raises(InputError, match=r"shape \[8, 256\] does not belong"):
        Held(torch.zeros(4, 256), None).load(eight.to_dict())


def test_rounding_at_random_has_the_right_mean():
    x = torch.full((40_001,), 1 + 2**-12)
    x[0] = 60_000.0  # a step of 1: the gap above 1 is 2^-10
    got = quantize(x, one_step("fp16"), generator=torch.Generator().manual_seed(0)).dequantize()[1:]
    assert set(got.tolist()) == {1.0, 1 + 2**-10}
    sigma = 2**-10 * math.sqrt(3 / 16 / 40_000)
    assert got.double().mean() == pytest.approx(1 + 2**-12, abs=3 * sigma)


def test_formats_that_cannot_be_fitted_anew_are_refused():
    with pytest.raises(InputError, match="the second part of an optimizer's state cannot be"):
        States(second=format_by_name("nvfp4"))
    with pytest.raises(InputError, match="take a scalar grid without zero point"):
        Held(torch.zeros(64), format_by_name("mxfp8-e4m3"))
    assert States(master=FP32).master == FP32
