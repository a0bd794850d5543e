"""Explanations of single numbers: exact arithmetic agrees with the grids, and with what IEEE 754 says."""

import itertools
import math
import random
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from fewbit.analyze.exact import PI, binary, floor_log2, from_float, full, is_finite, parse, short
from fewbit.analyze.explain import Case, decode, explain
from fewbit.errors import InputError
from fewbit.grid import GRIDS, Float, Int, Table, by_name

SCALAR = [grid for grid in GRIDS if grid.width == 1]
SMALL = [grid for grid in SCALAR if grid.bits <= 8]


def code_by_grid(grid, x: float) -> int:
    """The pattern that `Grid.round` gives, two's complement for integers."""
    return int(grid.round(torch.tensor([x], dtype=torch.float64))) & (2**grid.bits - 1)


def points(grid):
    """Every code with its value, from the grid."""
    codes = grid.codes()
    patterns = [int(q) & (2**grid.bits - 1) for q in codes]
    return list(zip(patterns, grid.value(codes, torch.float64).tolist(), strict=True))


# Text.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3.14", Fraction(314, 100)), ("-1e-5", Fraction(-1, 100_000)), (".5", Fraction(1, 2)),
        ("+7.", Fraction(7)), ("0x1.8p3", Fraction(12)), ("-0X.8", Fraction(-1, 2)), ("0xff", Fraction(255)),
        ("1/3", Fraction(1, 3)), ("-2/4", Fraction(-1, 2)), ("pi", PI), ("-inf", -math.inf),
        ("Infinity", math.inf), (" 1E2 ", Fraction(100)),
    ],
)  # fmt: skip
def test_numbers_are_read_without_rounding(text, value):
    assert parse(text) == value


def test_what_no_rational_can_be_stays_a_float():
    assert math.isnan(parse("nan"))
    assert math.isnan(parse("-nan"))
    assert math.copysign(1, parse("-0.0")) == -1
    assert parse("0") == 0
    assert isinstance(parse("0"), Fraction)


@pytest.mark.parametrize(
    "text",
    ["", "-", "three", "1/0", "1.2.3", "0x", "1e", "e5", "1e2001", "0x1p-9999", "1_000", "٣", "1" * 500],
)
def test_other_text_is_refused_in_one_sentence(text):
    with pytest.raises(InputError, match=r"^[^\n]+$"):
        parse(text)


def test_decimals_are_written_in_full_and_read_back():
    rng = random.Random(0)
    for _ in range(300):
        x = Fraction(rng.getrandbits(60) - 2**59) * Fraction(2) ** rng.randint(-150, 100)
        assert Fraction(full(x)) == x
    assert full(Fraction(1, 3)) == "1/3"
    assert full(Fraction(-1, 8)) == "-0.125"
    assert short(Fraction(1, 3)) == "1/3"
    assert short(Fraction(2) ** -149) == "1.40129846432...e-45"
    assert short(Fraction(10) ** 39) == "1e+39"


def test_binary_digits_are_cut_and_say_when_more_follow():
    assert binary(Fraction(25, 8), 10) == "11.001"
    assert binary(Fraction(1, 3), 5) == "0.01010..."
    assert binary(Fraction(6), 3) == "110"
    assert [floor_log2(Fraction(n, 8)) for n in (1, 7, 8, 9, 15, 16)] == [-3, -1, 0, 0, 0, 1]


# Walks.


@pytest.mark.parametrize("text", ["3.1415926535", "pi"])
def test_pi_in_float32_rounds_up_where_truncation_would_not(text):
    found = explain(parse(text), by_name("fp32"))
    assert found.held.bits == "0 10000000 10010010000111111011011"
    assert found.walk.truncated.bits == "0 10000000 10010010000111111011010"
    assert full(found.held.value) == "3.1415927410125732421875"
    assert found.held.code == 0x40490FDB
    assert (found.below.code, found.above.code) == (0x40490FDA, 0x40490FDC)
    assert found.walk.exponent == 1
    assert abs(found.ulps) < Fraction(1, 2) < found.walk.rest


def test_pi_in_the_other_16_and_19_bit_formats():
    bits = {name: explain(PI, by_name(name)).held.bits for name in ("bf16", "fp16", "tf32")}
    assert bits == {
        "bf16": "0 10000000 1001001",
        "fp16": "0 10000 1001001000",
        "tf32": "0 10000000 1001001000",
    }


def test_rounding_twice_is_avoided():
    # A hair above the middle of 1 and 1 + 2^-23: float64 drops the hair, and the tie would go down.
    x = 1 + Fraction(1, 2**24) + Fraction(1, 2**80)
    assert float(x) == 1 + 2**-24
    assert explain(x, by_name("fp32")).held.value == 1 + Fraction(1, 2**23)
    assert explain(Fraction(float(x)), by_name("fp32")).held.value == 1
    assert explain(Fraction(5, 2) + Fraction(1, 10**40), by_name("int4")).held.value == 3


def test_subnormals_overflow_and_underflow():
    found = explain(parse("1e-40"), by_name("fp32"))
    assert found.walk.subnormal
    assert (found.walk.exponent, found.walk.used) == (-133, -126)
    assert dict(found.held.parts)["exponent"] == "0" * 8
    assert found.held.value == Fraction(float(torch.tensor(1e-40, dtype=torch.float32)))
    lost = explain(parse("-1e-46"), by_name("fp32"))
    assert full(lost.held.value) == "-0"
    over = explain(parse("1e39"), by_name("fp32"))
    assert (over.case, over.held.value, over.cast.value) == (Case.SATURATED, by_name("fp32").max, math.inf)
    assert math.isnan(explain(parse("1000"), by_name("e4m3fn")).cast.value)
    assert explain(parse("460"), by_name("e4m3fn")).cast is None  # rounds to 448 with or without saturation
    assert explain(parse("9"), by_name("e2m1")).cast is None  # nothing to overflow to
    assert explain(-math.inf, by_name("e5m2")).held.value == -57344
    assert explain(-math.inf, by_name("e5m2")).cast.value == -math.inf


def test_what_a_format_lacks():
    no_zero = explain(Fraction(0), by_name("e8m0"))
    assert (no_zero.case, no_zero.held.value) == (Case.NO_CODE, Fraction(1, 2**127))
    no_sign = explain(Fraction(-1), by_name("ue4m3"))
    assert (no_sign.case, no_sign.held.value) == (Case.NO_CODE, 0)
    assert math.isnan(no_sign.cast.value)
    assert explain(math.nan, by_name("int4")).held is None
    assert explain(math.nan, by_name("e2m1")).case is Case.NO_CODE
    assert math.isnan(explain(math.nan, by_name("fp16")).held.value)
    assert explain(-0.0, by_name("e4m3fn")).held.code == 0x80
    assert explain(-0.0, by_name("e4m3fnuz")).held.code == 0


@pytest.mark.parametrize(
    ("x", "value"), [("2.5", 2), ("3.5", 4), ("5", 4), ("0.25", 0), ("1.75", 2), ("-0.75", -1)]
)
def test_ties_go_to_the_even_code(x, value):
    found = explain(parse(x), by_name("e2m1"))
    assert (found.case, found.held.value) == (Case.TIE, value)


def test_ties_of_integers_are_even_and_of_tables_low():
    assert [explain(parse(t), Int(4)).held.value for t in ("-2.5", "-1.5", "0.5", "1.5")] == [-2, -2, 0, 2]
    table = Table("steps", (-1.0, 0.0, 1.0))
    assert [explain(parse(t), table).held.value for t in ("-0.5", "0.5")] == [-1, 0]


# Over all codes and many numbers.


@pytest.mark.parametrize("grid", SMALL, ids=lambda grid: grid.name)
def test_every_code_decodes_to_the_grids_value_and_explains_to_itself(grid):
    for code, value in points(grid):
        found = decode(code, grid)
        assert found.held.code == code
        assert found.held.bits.replace(" ", "").replace(".", "") == f"{code:0{grid.bits}b}"
        if math.isnan(value):
            assert math.isnan(found.held.value)
            continue
        assert found.held.value == value
        assert math.copysign(1, value) == math.copysign(1, float(found.held.value))
        if math.isfinite(value):
            again = explain(found.held.value, grid)
            assert again.error == 0
            assert again.held.code == code_by_grid(grid, value)
            # A table may hold a value twice; rounding takes the first.
            assert again.held.code == code or isinstance(grid, Table)


@pytest.mark.parametrize("grid", SMALL, ids=lambda grid: grid.name)
def test_middles_between_values_round_as_the_grid_rounds(grid):
    values = sorted({v for _, v in points(grid) if math.isfinite(v)})
    for low, high in itertools.pairwise(values):
        middle = (Fraction(low) + Fraction(high)) / 2
        found = explain(middle, grid)
        assert found.held.code == code_by_grid(grid, float(middle))
        assert found.held.value in (low, high)
        if grid.name != "e8m0" or low > 2.0**-127:
            assert found.case is Case.TIE


@pytest.mark.parametrize("grid", SCALAR, ids=lambda grid: grid.name)
def test_random_numbers_agree_with_the_grid_and_are_nearest(grid):
    rng = random.Random(grid.name)
    top = math.log2(grid.max) if grid.max > 0 else 0
    for _ in range(150):
        x = rng.choice((-1, 1)) * rng.random() * 2.0 ** rng.uniform(min(top - 12, -3), top + 1)
        if rng.random() < 0.1 and isinstance(grid, Float):
            x = math.ldexp(rng.random(), grid.emin - rng.randrange(grid.mantissa_bits + 3))
        found = explain(Fraction(x), grid)
        assert found.held.code == code_by_grid(grid, x)
        value = Fraction(found.held.value)
        if grid.name == "e8m0" and x < 2.0**-126:
            continue  # torch's own rule between the two smallest
        for other in (found.below, found.above):
            assert other is None or abs(Fraction(other.value) - Fraction(x)) >= abs(value - Fraction(x))
        if found.below is not None:
            assert found.below.value < value
            assert decode(found.below.code, grid).above.value == value
        if found.walk is not None and found.case is not Case.SATURATED:
            assert abs(found.ulps) <= Fraction(1, 2)
            size = found.walk.rounded * Fraction(2) ** (found.walk.used - grid.mantissa_bits)
            assert size == abs(value)
            assert abs(Fraction(found.walk.truncated.value)) <= abs(Fraction(x))


@pytest.mark.parametrize(
    "grid", [g for g in GRIDS if isinstance(g, Float) and g.saturate], ids=lambda g: g.name
)
def test_casts_agree_with_the_grid_that_does_not_saturate(grid):
    if grid.specials.name == "NONE":
        assert explain(Fraction(grid.max) * 4, grid).cast is None
        return
    loose = replace(grid, saturate=False)
    for x in (grid.max * 1.01, grid.max * 1.5, -grid.max * 1.5, math.inf, -math.inf, -1.0, 0.0, 1.0):
        found = explain(from_float(x), grid)
        cast = found.held if found.cast is None else found.cast
        want = loose.value(loose.round(torch.tensor(x, dtype=torch.float64)), torch.float64).item()
        got = float(cast.value)
        assert got == want or (math.isnan(got) and math.isnan(want))


def test_infinities_and_nans_decode():
    assert decode(0xFC, by_name("e5m2")).held.value == -math.inf
    assert decode(0x7B, by_name("e5m2")).above is None
    assert decode(0x7C, by_name("e5m2")).below.code == 0x7B
    for code in (0x7D, 0x7E, 0x7F):
        assert decode(code, by_name("e5m2")).held.code == code
        assert not is_finite(decode(code, by_name("e5m2")).held.value)
    assert decode(0x40490FDB, by_name("fp32")).held.value == Fraction("3.1415927410125732421875")
    assert full(decode(0x80000000, by_name("fp32")).held.value) == "-0"


@pytest.mark.parametrize(
    ("code", "name"), [(256, "e4m3fn"), (16, "e2m1"), (0x80, "ue4m3"), (-1, "int4"), (8, "int4-narrow")]
)
def test_patterns_that_are_no_code_are_refused(code, name):
    with pytest.raises(InputError, match=name):
        decode(code, by_name(name))
