"""Errors of every format on known distributions against formulas, published figures and bounds."""

import functools
import math

import pytest
import torch

from fewbit.analyze import distribution, error
from fewbit.analyze.distribution import TABLED, Distribution
from fewbit.analyze.error import View
from fewbit.errors import InputError
from fewbit.format import FP32, Channel, Format, Group
from fewbit.format.named import FORMATS
from fewbit.format.prior import Prior, expected_error
from fewbit.grid import GRIDS, Grid, Int, Table, by_name

GAUSS, LAPLACE, STUDENT, UNIFORM = (
    Distribution.GAUSS,
    Distribution.LAPLACE,
    Distribution.STUDENT,
    Distribution.UNIFORM,
)
SMALL = [grid for grid in GRIDS if grid.bits <= 8 * grid.width]
SCALAR = [grid for grid in SMALL if grid.width == 1]
VECTOR = [grid for grid in GRIDS if grid.width > 1]

# Max 1960, Quantizing for minimum distortion, tables I and II: best points, and best evenly spaced points.
MAX_1960 = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
MAX_1960_EVEN = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154}

# Mean squared error on N(0, 1), from other code than this: numpy, one million draws.
BLOCK_GAUSS = {
    "mxfp4": 0.01325, "mxfp4-even": 0.01254, "mxfp4-rceil": 0.01334, "nvfp4": 0.00902, "mxfp6-e2m3": 8.05e-4,
    "mxfp6-e3m2": 2.92e-3, "mxint8": 6.8e-5, "mxfp8-e4m3": 8.6e-4, "mxfp8-e4m3-ceil": 7.0e-4,
    "mxfp8-e5m2": 2.9e-3, "nf4": 0.00846, "fp4-bnb": 0.01488,
}  # fmt: skip
BLOCK_GAUSS_DB = {"mx9": 46.53, "mx6": 28.30, "mx4": 15.71, "msfp16": 42.8, "msfp14": 30.7, "msfp12": 18.6}


@functools.cache
def block_row(name: str, law: Distribution):
    return error.format_row(name, FORMATS[name], law)


@functools.cache
def grid_row(grid: Grid, law: Distribution):
    return error.grid_row(grid, law, n=1 << (16 if grid.width == 1 else 12))


# -- scalar grids


def test_uniform_data_on_evenly_spaced_points_are_at_the_textbook_error():
    for bits in (1, 4, 8):
        _, least = error.best_expected(Int(bits, signed=False), UNIFORM)
        assert least == pytest.approx(4.0**-bits, rel=1e-4)


@pytest.mark.parametrize("law", TABLED)
def test_every_scalar_grid_is_within_1_percent_of_theory_at_its_best_scale(law):
    for grid in SCALAR:
        row = grid_row(grid, law)
        assert row.measured == pytest.approx(row.expected, rel=0.01), grid.name


@pytest.mark.parametrize(("law", "prior"), [(GAUSS, Prior.GAUSS), (LAPLACE, Prior.LAPLACE)])
def test_range_rules_and_this_table_expect_the_same_error(law, prior):
    spread = {Prior.GAUSS: 1.0, Prior.LAPLACE: math.sqrt(2.0)}[prior]  # sigma of the prior
    for grid in SCALAR:
        if error.view_of(grid) is View.SIGNED and grid.max < 1e6:
            step, least = error.best_expected(grid, law)
            points = torch.from_numpy(error.points_of(grid)) * step * spread
            assert expected_error(points, prior) / spread**2 == pytest.approx(least, rel=1e-6), grid.name


@pytest.mark.parametrize("bits", MAX_1960_EVEN)
def test_even_points_reach_the_published_error(bits):
    row = grid_row(Int(bits, signed=False), GAUSS)
    assert row.measured == pytest.approx(MAX_1960_EVEN[bits], rel=0.01)


@pytest.mark.parametrize("bits", MAX_1960)
def test_lloyd_max_points_reach_the_published_error(bits):
    row = grid_row(by_name(f"lloyd{bits}"), GAUSS)
    assert row.measured == pytest.approx(MAX_1960[bits], rel=0.01)


def test_no_scalar_grid_beats_lloyd_max_on_gauss():
    for grid in SCALAR:
        if error.view_of(grid) is not View.MAGNITUDE:
            best = grid_row(by_name(f"lloyd{grid.bits}"), GAUSS).expected
            assert grid_row(grid, GAUSS).expected >= best * (1 - 1e-6), grid.name


@pytest.mark.parametrize("law", TABLED)
def test_no_grid_beats_the_bound(law):
    for grid in SMALL:
        if grid.bits <= 8:
            row = grid_row(grid, law)
            assert row.measured > row.bound, grid.name


def test_vectors_beat_the_best_scalars_of_the_same_bits():
    assert VECTOR
    for grid in VECTOR:
        bits = grid.bits / grid.width
        if bits == int(bits) and grid.bits <= 8 and bits > 1:
            _, measured = error.best_measured(grid, GAUSS, n=1 << 18)
            assert distribution.lower_bound(GAUSS, bits) < measured
            assert measured < error.best_expected(by_name(f"lloyd{int(bits)}"), GAUSS)[1], grid.name


def test_views():
    assert error.view_of(Int(4)) is View.SIGNED
    assert error.view_of(Int(4, signed=False)) is View.CENTRED
    assert error.view_of(by_name("ue4m3")) is View.MAGNITUDE
    assert error.points_of(Int(2, signed=False)).tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert error.points_of(Table("two", (1, 3))).tolist() == [-3, -1, 1, 3]


def test_points_of_a_vector_grid_are_refused():
    with pytest.raises(InputError, match="coordinates"):
        error.points_of(VECTOR[0])


# -- block formats


@pytest.mark.parametrize("name", BLOCK_GAUSS)
def test_block_formats_have_the_known_error_on_gauss(name):
    assert block_row(name, GAUSS).measured == pytest.approx(BLOCK_GAUSS[name], rel=0.02)


@pytest.mark.parametrize("name", BLOCK_GAUSS_DB)
def test_shared_exponents_have_the_known_signal_to_noise_ratio(name):
    db = -10 * math.log10(block_row(name, GAUSS).measured)
    assert db == pytest.approx(BLOCK_GAUSS_DB[name], abs=0.1)


@pytest.mark.parametrize(("law", "within"), [(GAUSS, 0.005), (LAPLACE, 0.01), (STUDENT, 0.03)])
def test_block_formats_meet_the_integral_over_the_largest_of_a_block(law, within):
    checked = 0
    for name in FORMATS:
        row = block_row(name, law)
        if row.expected is not None:
            assert row.measured == pytest.approx(row.expected, rel=within), name
            checked += 1
    assert checked >= 25


@pytest.mark.parametrize("law", TABLED)
def test_no_block_format_beats_the_bound(law):
    for name in FORMATS:
        row = block_row(name, law)
        assert row.measured > row.bound, name


def test_double_quantization_costs_less_than_1_percent_of_error():
    for law in TABLED:
        assert block_row("nf4-dq", law).measured < 1.01 * block_row("nf4", law).measured


def test_formats_whose_steps_depend_on_more_than_the_largest_have_no_formula():
    assert error.expected_block_error(FORMATS["mx9"], GAUSS) is None
    assert error.expected_block_error(FORMATS["nf4-dq"], GAUSS) is None
    assert error.expected_block_error(Format(grid=Int(4), block=Channel(), scale=FP32), GAUSS) is None


# -- Inf and NaN given back to numbers (MoFQ)


def test_giving_inf_and_nan_back_to_numbers_pays_most_on_heavy_tails():
    gains = []
    for law in (UNIFORM, GAUSS, LAPLACE, STUDENT):
        x = distribution.random_samples(law, side=512)
        fp4, ieee = (
            error.relative_error(Format(grid=by_name(name), block=Group(128), scale=FP32), x)
            for name in ("e2m1", "e2m1-ieee")
        )
        gains.append(1 - fp4 / ieee)
    assert gains == sorted(gains)
    assert gains == pytest.approx([0.13, 0.44, 0.60, 0.64], abs=0.02)
