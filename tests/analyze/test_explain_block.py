"""A few numbers as blocks: the library's own values, and what the largest number costs the others."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from fewbit.analyze.exact import parse
from fewbit.analyze.explain_block import explain_block
from fewbit.errors import InputError
from fewbit.format import E8M0, FP16, FP32, Flat, Format, Group, MinMax, Zero
from fewbit.format.named import FORMATS
from fewbit.grid import by_name

NUMBERS = [parse(text) for text in ("0.1", "0.2", "-0.3", "8")]
FIVE = [parse(text) for text in ("0.5", "-1/3", "pi", "0", "-2.75")]
INT4 = Format(grid=by_name("int4"), block=Group(32), scale=FP16)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("numbers", [NUMBERS, FIVE], ids=["outlier", "five"])
def test_every_named_format_holds_what_the_library_dequantizes(name, numbers):
    found = explain_block(numbers, FORMATS[name])
    x = torch.tensor([[float(v) for v in numbers]], dtype=torch.float64)
    q = found.format.quantize(x)
    want = q.dequantize().flatten().tolist()
    assert [float(e.held) for e in found.elements] == pytest.approx(want, rel=1e-6, abs=1e-9)
    assert [e.given for e in found.elements] == numbers
    assert [e.code for e in found.elements] == [int(c) & (2**found.format.grid.bits - 1) for c in q.codes[0]]
    error = float((q.dequantize().double() - x).square().sum())
    assert float(found.squared_error) == pytest.approx(error, rel=1e-4, abs=1e-11)


def test_an_outlier_takes_the_others_steps_away():
    found = explain_block(NUMBERS, INT4)
    assert found.resized
    assert found.outlier == 3
    assert [float(e.held) for e in found.elements[:3]] == [0, 0, 0]
    assert found.squared_error_rest == Fraction(14, 100)
    assert found.without.squared_error < found.squared_error_rest / 100
    assert len(found.without.elements) == 3
    assert found.without.steps[0] < found.steps[0] / 20


def test_the_shared_scale_is_shown_as_it_is_stored():
    mxfp4 = Format(grid=by_name("e2m1"), block=Group(32), scale=E8M0)
    level = explain_block(NUMBERS, mxfp4).levels[0]
    assert level.grid.name == "e8m0"
    assert Fraction(level.points[0].value) == explain_block(NUMBERS, mxfp4).steps[0]
    nested = Format(
        grid=by_name("e2m1"), block=Group(16), scale=Format(grid=by_name("ue4m3"), block=Flat(8), scale=FP32)
    )
    found = explain_block(NUMBERS, nested)
    assert [level.grid.name for level in found.levels] == ["ue4m3", "fp32"]
    product = math.prod(Fraction(level.points[0].value) for level in found.levels)
    assert float(found.steps[0]) == pytest.approx(float(product), rel=1e-7)


def test_numbers_that_a_block_shape_tiles_keep_it():
    found = explain_block([*NUMBERS, *NUMBERS], replace(INT4, block=Group(4)))
    assert not found.resized
    assert [e.block for e in found.elements] == [0] * 4 + [1] * 4
    assert len(found.steps) == 2
    pairs = explain_block(NUMBERS, FORMATS["mx9"])
    assert pairs.resized
    assert [e.block for e in pairs.elements] == [0, 0, 1, 1]


@pytest.mark.parametrize("zero", [Zero.INTEGER, Zero.FLOAT, Zero.OFFSET])
def test_zeros_and_offsets_are_part_of_what_is_held(zero):
    fmt = Format(grid=by_name("uint4"), block=Group(32), range=MinMax(), zero=zero, scale=FP16)
    found = explain_block([Fraction(n, 10) for n in (-3, 1, 8, 12)], fmt)
    assert len(found.zeros) == 1
    assert abs(found.elements[0].error) <= found.steps[0]
    assert found.snr_db > 20


def test_exact_blocks_have_no_snr_and_zeros_no_signal():
    found = explain_block([Fraction(1), Fraction(-7)], INT4)
    assert (found.squared_error, found.snr_db) == (0, None)
    assert explain_block([Fraction(0)] * 3, INT4).squared_error == 0
    alone = explain_block([Fraction(3)], INT4)
    assert alone.without is None


def test_snr_is_ten_log_ten_of_signal_over_error():
    found = explain_block(FIVE, INT4)
    signal = sum(float(v) ** 2 for v in FIVE)
    assert found.snr_db == pytest.approx(10 * math.log10(signal / float(found.squared_error)))


def test_grids_of_vectors_code_several_numbers_at_once():
    from fewbit.grid import GRIDS

    for grid in GRIDS:
        if grid.width == 2:
            found = explain_block([Fraction(1), Fraction(-1, 2)], Format(grid=grid))
            assert found.elements[0].code == found.elements[1].code
            x = torch.tensor([1.0, -0.5], dtype=torch.float64)
            assert [float(e.held) for e in found.elements] == grid.value(
                grid.round(x), torch.float64
            ).tolist()
            with pytest.raises(InputError, match="multiple of 2"):
                explain_block([Fraction(1)], Format(grid=grid))


@pytest.mark.parametrize(
    ("numbers", "fmt"),
    [
        ([math.inf, Fraction(1)], INT4),
        ([math.nan], INT4),
        ([Fraction(10) ** 400], INT4),
        ([Fraction(1)], FP32),
    ],
)
def test_what_no_block_takes_is_refused(numbers, fmt):
    with pytest.raises(InputError):
        explain_block(numbers, fmt)
